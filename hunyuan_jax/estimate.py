"""What a training step holds, computes and sends, by arithmetic: what a plan knows before anything is compiled, and all it knows of GPUs.

State is exact to the byte, and so are the DiT's FLOPs; a VAE's are counted in its trace. What else a step holds is an estimate: what the
forward pass keeps for the way back, and beside it gradients, gathered parameters and the work of one block, as multiples of one array.
"""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hunyuan_jax.attention_kernels import filled_up
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket, token_count
from hunyuan_jax.flops import StepFlops, dit_step_flops, product_flops
from hunyuan_jax.hlo import Exchange
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.vae import VAEConfig
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import SEQUENCE, MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import BATCH_AXES, batch_sharding, check_rows, param_axes, path_of
from hunyuan_jax.settings import build
from hunyuan_jax.state import abstract_state
from hunyuan_jax.tasks import VAETask, planned_task
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.train_step import EmaConfig, TrainState, init_critic_state, init_state, make_step

# Of the DiT, in vectors of a token's width: what a block keeps for the backward pass, and what one block needs while it works.
KEPT_WIDTHS = {"none": 34.0, "attention": 2.0, "attention_host": 1.0, "full": 1.0}
WORKING_WIDTHS = 110.0
# Of the VAE, in arrays as large as the first one of a clip: what its last blocks, the critic and LPIPS need while they work.
WORKING_CLIPS = 25.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, and in the memory of its host."""

    parameters: float
    optimizer: float
    average: float
    activations: float  # that the forward pass keeps for the backward one
    temporaries: float  # all else of the step: gradients, gathered parameters, what one block works with
    host: float

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.average + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a step of a whole batch; `tokens` are one sample's image tokens, or frames' pixels for a VAE."""

    tokens: int
    flops: StepFlops
    memory: Memory
    exchanges: list[Exchange]
    checkpoint: float  # bytes
    offloaded: float  # of the optimizer's state, bytes that are in the host's memory instead of a device's


def estimate(config: ConfigDict, bucket: Bucket, mesh: Mapping[str, int], *, blocks: bool) -> Estimate:
    """Of a config's step on a mesh of these sizes; in `blocks`, with what fills up those of a TPU's attention kernels.

    Raises `UserError` where the model cannot be on that mesh.
    """
    state = state_bytes(state_shapes(config), mesh)
    work = (_dit_work if isinstance(planned_task(config).model, DiTConfig) else _vae_work)(config, bucket, mesh, state, blocks=blocks)
    offloaded = state.optimizer if build(OptimizerConfig, config.optimizer, where="optimizer").offload else 0.0
    optimizer, host = state.optimizer - offloaded, work.host + offloaded
    memory = Memory(state.parameters, optimizer, state.average, work.activations, work.temporaries, host)
    return Estimate(work.tokens, work.flops, memory, work.exchanges, state.checkpoint, offloaded)


class _Work(NamedTuple):
    """Of a step, apart from the state that it changes; memory in bytes on a device and on its host."""

    tokens: int
    flops: StepFlops
    activations: float
    temporaries: float
    host: float
    exchanges: list[Exchange]


def _samples(bucket: Bucket, mesh: Mapping[str, int]) -> float:
    """Of a batch, on a device or on those that share them."""
    return bucket.batch / math.prod(mesh[axis] for axis in BATCH_AXES)


def _apart_from(config: ConfigDict, names: Sequence[str]) -> str:
    """A config as JSON, apart from some sections and keys: what something is computed from, as a key of what is remembered."""
    sections = {name: section for name, section in config.to_dict().items() if name not in names}
    sections["model"] = {key: value for key, value in sections["model"].items() if f"model.{key}" not in names}
    return str(ConfigDict(sections).to_json(sort_keys=True))


# --- State ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes on a device of parameters, of the optimizer and of the moving average, a critic's included; and of a whole checkpoint."""

    parameters: float
    optimizer: float
    average: float
    checkpoint: float


def state_shapes(config: ConfigDict) -> TrainState:
    """Shapes and dtypes of the training state, the same on every mesh."""
    return _state_shapes(_apart_from(config, ("mesh", "model.remat", "model.context", "model.context_degree")))


@functools.lru_cache(maxsize=4)
def _state_shapes(config: str) -> TrainState:
    asked, key = ConfigDict(json.loads(config)), jax.random.key(0)
    task = planned_task(asked)
    optimizer = make_optimizer(build(OptimizerConfig, asked.optimizer, where="optimizer"))
    return jax.eval_shape(lambda: init_state(task.init(key), optimizer, init_critic_state(task, key)))


def state_bytes(shapes: TrainState, mesh: Mapping[str, int]) -> StateBytes:
    """Of a state of these shapes, on a mesh of these sizes."""

    def of(params: Any) -> float:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        axes = [param_axes(path_of(path), leaf.shape, mesh) for path, leaf in leaves]
        parts = [math.prod(mesh[axis] for axis in of_leaf if axis) for of_leaf in axes]
        return sum(leaf.size * leaf.dtype.itemsize / count for (_, leaf), count in zip(leaves, parts, strict=True))

    def whole(tree: Any) -> float:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    params, critic = of(shapes.params), of(shapes.critic.params) if shapes.critic else 0.0
    # What an optimizer keeps of a parameter lies like the parameter.
    kept = params * whole(shapes.opt_state) / whole(shapes.params)
    if shapes.critic:
        kept += critic * whole(shapes.critic.opt_state) / whole(shapes.critic.params)
    return StateBytes(params + critic, kept, params, whole(shapes))


# --- The DiT -------------------------------------------------------------------------------------------------------------------


def pairs_seen(config: DiTConfig, tokens: int, num_txt: int, mesh: Mapping[str, int], *, blocks: bool) -> int:
    """Pairs of a query and a key in one sample's attention, over all devices that share it; in `blocks`, those that fill them up included.

    Text is everywhere: in a ring, every part of it computes the text's attention to itself. Raises `UserError` as `config.degree_on` does.
    """
    seen = filled_up if blocks else lambda count: count
    devices, degree = mesh[SEQUENCE], config.degree_on(mesh)
    if devices == 1:
        return seen(tokens + num_txt) ** 2
    parts = devices // degree
    image, txt = parts * seen(degree * -(-tokens // devices)), seen(num_txt)
    return image**2 + 2 * image * txt + parts * txt**2


def dit_flops(config: DiTConfig, bucket: Bucket, mesh: Mapping[str, int], num_txt: int, *, blocks: bool) -> tuple[int, StepFlops]:
    """Image tokens of a sample, and the FLOPs of a batch."""
    temporal, spatial = config.patch_size[0], config.patch_size[1]
    tokens = token_count(*bucket.shape, temporal=4 * temporal, spatial=8 * spatial)
    filled = pairs_seen(config, tokens, num_txt, mesh, blocks=blocks) / (tokens + num_txt) ** 2
    one = dit_step_flops(config, tokens, num_txt, filled=filled)
    return tokens, StepFlops(*(bucket.batch * value for value in dataclasses.astuple(one)))


def _dit_work(config: ConfigDict, bucket: Bucket, mesh: Mapping[str, int], state: StateBytes, *, blocks: bool) -> _Work:
    model, num_txt = build(DiTConfig, config.model, where="model"), config.data.text_length
    tokens, flops = dit_flops(model, bucket, mesh, num_txt, blocks=blocks)
    # Bytes of a device's tokens in bfloat16.
    vectors = _samples(bucket, mesh) * (tokens / mesh[SEQUENCE] + num_txt) * model.width * 2.0 / mesh["tensor"]
    num_blocks = model.num_double_blocks + model.num_single_blocks
    return _Work(
        tokens=tokens,
        flops=flops,
        activations=num_blocks * KEPT_WIDTHS[model.remat] * vectors,
        temporaries=WORKING_WIDTHS * vectors + state.parameters,  # of which gradients are as large as parameters
        host=num_blocks * vectors if model.remat == "attention_host" else 0.0,
        exchanges=_dit_exchanges(model, vectors, state.parameters * mesh["fsdp"] * mesh["tensor"], mesh),
    )


def _dit_exchanges(config: DiTConfig, vectors: float, whole_parameters: float, mesh: Mapping[str, int]) -> list[Exchange]:
    """Parameters and gradients, keys and values around the ring or tokens for heads, sums over heads."""
    blocks = config.num_double_blocks + config.num_single_blocks
    found = [_of_weights(whole_parameters / 2 / mesh["tensor"], mesh)]
    size, degree = mesh[SEQUENCE], config.degree_on(mesh)
    if hops := size // degree - 1:
        found.append(Exchange("collective-permute", (SEQUENCE,), 6 * vectors * hops, blocks, True))
    if degree > 1:
        found.append(Exchange("all-to-all", (SEQUENCE,), 8 * vectors * (degree - 1) / degree, blocks, True))
    if (tensor := mesh["tensor"]) > 1:
        found.append(Exchange("all-reduce", ("tensor",), 8 * vectors * (tensor - 1), blocks, False))
    return found


def _of_weights(whole: float, mesh: Mapping[str, int]) -> Exchange:
    """Parameters of `whole` bytes, gathered forward and backward, and gradients summed, over the axes of a batch."""
    parts = math.prod(mesh[axis] for axis in BATCH_AXES)
    return Exchange("all-gather", BATCH_AXES, 4 * whole * (parts - 1) / parts, 1, True)


# --- The VAE -------------------------------------------------------------------------------------------------------------------


def batch_shapes(task: Task, bucket: Bucket, mesh: Mesh) -> VideoBatch:
    """A batch of the bucket, without memory, split as on the mesh."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), task.batch_shapes(bucket))


def _vae_work(config: ConfigDict, bucket: Bucket, mesh: Mapping[str, int], state: StateBytes, *, blocks: bool) -> _Work:
    del blocks  # which are the DiT's
    model, tokens = build(VAEConfig, config.model, where="model"), math.prod(bucket.shape)
    check_rows(bucket.height // model.spatial_compression, mesh[SEQUENCE])
    flops, kept = _vae_numbers(_apart_from(config, ("mesh",)), bucket)
    share = _samples(bucket, mesh) / mesh[SEQUENCE]
    whole = state.parameters * mesh["fsdp"]  # parameters are, in the step
    return _Work(
        tokens=tokens,
        flops=flops,
        activations=share * kept,
        temporaries=share * WORKING_CLIPS * 2.0 * model.block_out_channels[0] * tokens + whole + state.parameters,
        host=0.0,
        exchanges=[_of_weights(whole, mesh)],
    )


@functools.lru_cache(maxsize=16)
def _vae_numbers(config: str, bucket: Bucket) -> tuple[StepFlops, float]:
    """FLOPs of a step of the batch, and bytes that the VAE keeps of one sample for the backward pass, both as traced.

    Of the FLOPs the model takes what `Task.work` says: the critic's and LPIPS's are not the model's.
    """
    asked = ConfigDict(json.loads(config))
    task = planned_task(asked)
    assert isinstance(task, VAETask)
    optimizer = make_optimizer(build(OptimizerConfig, asked.optimizer, where="optimizer"))
    mesh = make_mesh(MeshConfig(data=1), jax.devices("cpu")[:1])
    step = make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(0))
    state, sample = abstract_state(task, optimizer, mesh), batch_shapes(task, dataclasses.replace(bucket, batch=1), mesh)
    computed = bucket.batch * product_flops(step, state, sample)
    needed = bucket.batch * task.work(sample)["model_flops"]

    def back(params: Any, sample: VideoBatch) -> Any:
        return jax.vjp(lambda params: task.drawn(params, sample, key=jax.random.key(0)), params)[1]

    kept = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(back, state.params, sample)))
    kept.subtract((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.params))
    kept_bytes = sum(max(0, count) * math.prod(shape) * dtype.itemsize for (shape, dtype), count in kept.items())
    return StepFlops(needed, computed, 0.0), kept_bytes
