"""One training step as a pure function: gradients, guard, update, exponential moving average.

The guard: where the gradient's norm is not finite the step changes nothing but its count, without asking the host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.tasks.task import Params, Task


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes on the devices. `ema` is the moving average of `params`, in float32."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState


Step = Callable[[TrainState, VideoBatch], tuple[TrainState, dict[str, Float[Array, ""]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average keeps `decay` of itself each step, less at first: never more than (1 + step) / (10 + step)."""

    decay: float = 0.999


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    count = jnp.zeros((), jnp.int32)
    return TrainState(step=count, skipped=count, params=params, ema=jax.tree.map(jnp.copy, params), opt_state=optimizer.init(params))


def average(ema: Params, params: Params, *, step: Int[Array, ""], decay: float) -> Params:
    """The moving average after `step` (from 0)."""
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - keep) * (p.astype(e.dtype) - e), ema, params)


def make_step(task: Task, optimizer: optax.GradientTransformation, *, ema: EmaConfig, key: PRNGKeyArray) -> Step:
    """The step for a task. `key` is the run's; a sample's noise is folded from it and the sample's id alone."""

    def step(state: TrainState, batch: VideoBatch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, batch, key=key)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = (params, average(state.ema, params, step=state.step, decay=ema.decay), opt_state)
        kept = (state.params, state.ema, state.opt_state)
        params, averaged, opt_state = _choose(good, changed, kept)
        skipped = state.skipped + jnp.where(good, 0, 1)
        state = TrainState(step=state.step + 1, skipped=skipped, params=params, ema=averaged, opt_state=opt_state)
        return state, {"loss": loss, "grad_norm": grad_norm, "skipped": skipped.astype(jnp.float32), **metrics}

    return step


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
