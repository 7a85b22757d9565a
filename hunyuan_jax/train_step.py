"""One training step as a pure function: gradients, guard, update, exponential moving average.

The guard: where a gradient's norm is not finite the step changes nothing but its count, without asking the host; nor where it is a
spike (`spikes.py`), if those are to be skipped. A task with a critic has two gradients, taken at the same parameters, and one guard; a
critic is not averaged.

A batch may be too large to be held at once: its gradient is then the mean of those of `accumulate` parts, taken one after another.

    samples        0 1 2 3 | 4 5 6 7    on two devices, in two parts
    first part     0   2   | 4   6      every second one, so that each device has as many and none changes its device
    second part      1   3 |   5   7
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hunyuan_jax import spikes
from hunyuan_jax.block_norms import norms_by_block
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.errors import UserError
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.sharding import BATCH_AXES
from hunyuan_jax.spikes import Spikes
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

    `critic` is None for a task without one, `spikes` where none are skipped.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    critic: CriticState | None = None
    spikes: Spikes | None = None


Found = TypeVar("Found")
Step = Callable[[TrainState, VideoBatch], tuple[TrainState, dict[str, Float[Array, "..."]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average keeps `decay` of itself each step, less at first: never more than (1 + step) / (10 + step)."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"ema: decay must lie in [0, 1], not {self.decay}.")


def check_accumulation(accumulate: int, *, task: Task, buckets: Sequence[Bucket], mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` where the batch of a bucket does not divide into parts that divide over the mesh."""
    if task.critic is not None and task.critic.optimizer.accumulate != 1:
        raise UserError("critic.optimizer.accumulate must be 1: the critic sees the parts that optimizer.accumulate makes of a batch.")
    if task.critic is not None and task.critic.optimizer.skip_above:
        raise UserError("critic.optimizer.skip_above must be 0: a step is skipped for both networks, by optimizer.skip_above.")
    if accumulate == 1:
        return
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    least = accumulate * devices
    for bucket in buckets:
        if bucket.batch % least:
            nearest = max(1, round(bucket.batch / least)) * least
            raise UserError(
                f"Bucket {bucket.name}: a batch of {bucket.batch} does not divide into optimizer.accumulate={accumulate} parts over "
                f"{devices} devices (mesh.data x mesh.fsdp); set a multiple of {least}, such as {nearest}, or accumulate less."
            )


def init_state(
    params: Params, optimizer: optax.GradientTransformation, critic: CriticState | None = None, *, spike_window: int = 0
) -> TrainState:
    """The state before the first step; with a `spike_window` of as many norms, for a step that skips spikes."""
    count, averaged = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
    return TrainState(
        step=count, skipped=count, params=params, ema=averaged, opt_state=optimizer.init(params), critic=critic,
        spikes=spikes.no_spikes(spike_window) if spike_window else None,
    )  # fmt: skip


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


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    ema: EmaConfig,
    key: PRNGKeyArray,
    accumulate: int = 1,
    skip_above: float = math.inf,
    block_norms: bool = False,
    offload: bool = False,
) -> Step:
    """The step for a task. `key` is the run's; a sample's noise is folded from it and the sample's id alone.

    In `accumulate` parts a batch makes the same step within rounding, as far as losses are means over samples: the adaptive weight of
    a critic's opinion is no mean, and each part has its own. Beside the losses a step says what its batch is like (`data/...`) and,
    where asked for, `block_norms` (`grad_norm/...`, `param_norm/...`). A state with `spikes` skips those `skip_above`. With `offload`
    the state has the optimizer's arrays in the memory of the hosts.
    """
    learn = jax.value_and_grad(task.loss, has_aux=True)

    def step(state: TrainState, batch: VideoBatch) -> tuple[TrainState, dict[str, Float[Array, "..."]]]:
        critic = state.critic
        if critic is None:
            (loss, metrics), grads = _in_parts(lambda part: learn(state.params, part, key=key), batch, accumulate)
        else:
            judge, contest = critic.params, cast(AdversarialTask, task).gradients
            found = _in_parts(lambda part: contest(state.params, judge, part, key=key, step=state.step), batch, accumulate)
            loss, metrics, grads = found.loss, found.metrics, found.model
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        if critic is not None:
            critic_norm = optax.tree.norm(found.critic)
            good &= jnp.isfinite(critic_norm) & jnp.isfinite(found.critic_loss)
            metrics = metrics | {"critic_grad_norm": critic_norm}
        seen = state.spikes
        if seen is not None:
            spike = good & spikes.is_spike(seen, grad_norm, above=skip_above)
            good &= ~spike
            seen = spikes.after_step(seen, grad_norm, accepted=good, spike=spike)
            metrics = metrics | {"spikes": seen.skipped.astype(jnp.float32)}
        if critic is not None:
            critic = _choose(good & found.learns, _updated(task, critic, found.critic), critic)
        before = _moved(state.opt_state, jax.memory.Space.Device) if offload else state.opt_state
        updates, opt_state = optimizer.update(grads, before, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = (params, average(state.ema, params, step=state.step, decay=ema.decay), opt_state)
        params, averaged, opt_state = _choose(good, changed, (state.params, state.ema, before))
        opt_state = _moved(opt_state, jax.memory.Space.Host) if offload else opt_state
        skipped = state.skipped + jnp.where(good, 0, 1)
        metrics = metrics | batch.statistics() | (_norms(grads, params) if block_norms else {})
        state = TrainState(
            step=state.step + 1, skipped=skipped, params=params, ema=averaged, opt_state=opt_state, critic=critic, spikes=seen
        )
        return state, {"loss": loss, "grad_norm": grad_norm, "skipped": skipped.astype(jnp.float32), **metrics}

    return step


def configured_step(task: Task, settings: OptimizerConfig, *, ema: EmaConfig, key: PRNGKeyArray, block_norms: bool) -> Step:
    """The step of a training with these settings, whether it is run or planned."""
    return make_step(
        task, make_optimizer(settings), ema=ema, key=key, accumulate=settings.accumulate, skip_above=settings.skip_above,
        block_norms=block_norms, offload=settings.offload,
    )  # fmt: skip


def _norms(grads: Params, params: Params) -> dict[str, Float[Array, "..."]]:
    trees = {"grad_norm": grads, "param_norm": params}
    return {f"{what}/{block}": norms for what, tree in trees.items() for block, norms in norms_by_block(tree).items()}


def _in_parts(find: Callable[[VideoBatch], Found], batch: VideoBatch, parts: int) -> Found:
    """The mean, taken in float32, of what `find` says of each part of a batch; of one part what it says."""
    if parts == 1:
        return find(batch)
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    said = jax.eval_shape(find, jax.tree.map(lambda x: x[0], split))

    def add(total: Any, part: VideoBatch) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, find(part)), None

    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), said), split)
    mean: Found = jax.tree.map(lambda t, x: (t / parts).astype(x.dtype), total, said)
    return mean


def _updated(task: Task, critic: CriticState, grads: Params) -> CriticState:
    updates, opt_state = make_optimizer(task.critic.optimizer).update(grads, critic.opt_state, critic.params)
    return CriticState(params=optax.apply_updates(critic.params, updates), opt_state=opt_state)


def _moved(tree: Any, memory: jax.memory.Space) -> Any:
    """The arrays in that memory; counts stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, memory) if x.ndim else x, tree)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
