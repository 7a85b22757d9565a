"""The state that a training begins with, made where it is to lie on the mesh: from random parameters or from weights.

Parameters lie as the table of parallel/sharding.py says, their average and what an optimizer keeps of each like the parameter, and all
else is whole on every device.
"""

import functools
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hunyuan_jax import convert
from hunyuan_jax.parallel.sharding import HOST_MEMORY, param_shardings, path_of, replicated
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.train_step import CriticState, TrainState, init_critic_state, init_state


def abstract_state(task: Task, optimizer: Any, mesh: jax.sharding.Mesh, *, spike_window: int = 0, offload: bool = False) -> TrainState:
    """Shapes, dtypes and shardings of the training state, without memory; with `offload` the optimizer's arrays are the hosts'."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_state(task.init(key), optimizer, init_critic_state(task, key), spike_window=spike_window))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    state = jax.tree.map(place, shapes, state_shardings(shapes, mesh))
    return state.replace(opt_state=jax.tree.map(_on_host, state.opt_state)) if offload else state


def make_state(
    task: Task, optimizer: Any, *, key: jax.Array, mesh: jax.sharding.Mesh, start: str = "", spike_window: int = 0, offload: bool = False
) -> TrainState:
    """The initial state, made in place on the mesh: from random parameters, or from the weights at `start`, in any layout.

    A critic is fresh in either case.
    """
    abstract = abstract_state(task, optimizer, mesh, spike_window=spike_window, offload=offload)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    critic = lambda: init_critic_state(task, jax.random.fold_in(key, 0xC217))  # noqa: E731
    begin = functools.partial(init_state, optimizer=optimizer, spike_window=spike_window)
    if start:
        by_path = traverse_util.flatten_dict(shardings.params, sep="/")
        params = convert.load(start, task.component, shardings=by_path)[1]
        return jax.jit(lambda params: begin(params, critic=critic()), out_shardings=shardings)(params)
    return jax.jit(lambda: begin(task.init(jax.random.fold_in(key, 0x1417)), critic=critic()), out_shardings=shardings)()


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> Any:
    """Parameters by their table; what an optimizer keeps for a parameter like that parameter; the rest whole everywhere."""
    params, opt_state = _shardings_of(state.params, state.opt_state, mesh)
    critic = state.critic
    if critic is not None:
        critic = CriticState(*_shardings_of(critic.params, critic.opt_state, mesh))
    whole = replicated(mesh)
    spikes = jax.tree.map(lambda _: whole, state.spikes)
    return TrainState(step=whole, skipped=whole, params=params, ema=params, opt_state=opt_state, critic=critic, spikes=spikes)  # type: ignore[arg-type]


def _on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same array in the memory of the host, unless it is but a count."""
    if not leaf.ndim:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(HOST_MEMORY))


def _shardings_of(params: Any, opt_state: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    by_params, whole = param_shardings(params, mesh), replicated(mesh)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(by_params), strict=True)
    homes = {path_of(path): _homes(leaf.shape, place) for (path, leaf), place in leaves}

    def place(path: Any, leaf: Any) -> Any:
        """The optimizer's path to an array that belongs to a parameter ends with that parameter's path."""
        names = path_of(path).split("/")
        owners = ("/".join(names[start:]) for start in range(len(names)))
        return next((homes[name][leaf.shape] for name in owners if leaf.shape in homes.get(name, {})), whole)

    return by_params, jax.tree_util.tree_map_with_path(place, opt_state)


def _homes(shape: tuple[int, ...], place: NamedSharding) -> dict[tuple[int, ...], NamedSharding]:
    """Where what belongs to a parameter lies, by shape: as the parameter, and a mean along one of its axes as the others do."""
    axes = tuple(place.spec)
    rests = [(shape[:n] + shape[n + 1 :], PartitionSpec(*axes[:n], *axes[n + 1 :])) for n in range(len(shape))]
    return {rest: NamedSharding(place.mesh, spec) for rest, spec in rests} | {shape: place}
