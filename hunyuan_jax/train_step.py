"""One training step as a pure function: gradients, guard, update, exponential moving average.

The guard: where a gradient's norm is not finite the step changes nothing but its count, without asking the host. A task with a
critic has two gradients, taken at the same parameters, and one guard; a critic is not averaged.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.optimizer import make_optimizer
from hunyuan_jax.tasks.critic import AdversarialTask
from hunyuan_jax.tasks.task import Params, Task


@flax.struct.dataclass
class CriticState:
    """A critic's parameters and what its optimizer keeps; the count of its schedule begins when the critic does."""

    params: Params
    opt_state: optax.OptState


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes on the devices. `ema` is the moving average of `params`, in float32.

    `critic` is None for a task without one.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    critic: CriticState | None = None


Step = Callable[[TrainState, VideoBatch], tuple[TrainState, dict[str, Float[Array, ""]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average keeps `decay` of itself each step, less at first: never more than (1 + step) / (10 + step)."""

    decay: float = 0.999


def init_state(params: Params, optimizer: optax.GradientTransformation, critic: CriticState | None = None) -> TrainState:
    count, averaged = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
    return TrainState(step=count, skipped=count, params=params, ema=averaged, opt_state=optimizer.init(params), critic=critic)


def init_critic_state(task: Task, key: PRNGKeyArray) -> CriticState | None:
    """A fresh critic, None for a task without one."""
    if task.critic is None:
        return None
    params = cast(AdversarialTask, task).init_critic(key)
    return CriticState(params=params, opt_state=make_optimizer(task.critic.optimizer).init(params))


def average(ema: Params, params: Params, *, step: Int[Array, ""], decay: float) -> Params:
    """The moving average after `step` (from 0)."""
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - keep) * (p.astype(e.dtype) - e), ema, params)


def make_step(task: Task, optimizer: optax.GradientTransformation, *, ema: EmaConfig, key: PRNGKeyArray) -> Step:
    """The step for a task. `key` is the run's; a sample's noise is folded from it and the sample's id alone."""

    def step(state: TrainState, batch: VideoBatch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        critic = state.critic
        if critic is None:
            (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, batch, key=key)
        else:
            found = cast(AdversarialTask, task).gradients(state.params, critic.params, batch, key=key, step=state.step)
            loss, metrics, grads = found.loss, found.metrics, found.model
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        if critic is not None:
            critic_norm = optax.tree.norm(found.critic)
            good &= jnp.isfinite(critic_norm) & jnp.isfinite(found.critic_loss)
            critic = _choose(good & found.learns, _updated(task, critic, found.critic), critic)
            metrics = metrics | {"critic_grad_norm": critic_norm}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = (params, average(state.ema, params, step=state.step, decay=ema.decay), opt_state)
        kept = (state.params, state.ema, state.opt_state)
        params, averaged, opt_state = _choose(good, changed, kept)
        skipped = state.skipped + jnp.where(good, 0, 1)
        state = TrainState(step=state.step + 1, skipped=skipped, params=params, ema=averaged, opt_state=opt_state, critic=critic)
        return state, {"loss": loss, "grad_norm": grad_norm, "skipped": skipped.astype(jnp.float32), **metrics}

    return step


def _updated(task: Task, critic: CriticState, grads: Params) -> CriticState:
    updates, opt_state = make_optimizer(task.critic.optimizer).update(grads, critic.opt_state, critic.params)
    return CriticState(params=optax.apply_updates(critic.params, updates), opt_state=opt_state)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
