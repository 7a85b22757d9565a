"""The weights of the text encoders from folders as Hugging Face has them: config.json, and safetensors (also in shards) or a `.pt`.

    config, params = load_text_tower("llava-llama-3-8b", dtype="bfloat16")    a Llama, or the language half of a Llava
    config, params = load_clip_text("clip-vit-large-patch14")                 CLIP, or its text tower alone

Headers are read first: every tensor must be there and of the right shape before any is read. Then tensors are read one at a time.
What the files hold besides, such as a vision tower, a head or layers that are never run, is left where it is.
"""

import fnmatch
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.models.text_encoders import CLIPTextConfig, Dtype, TextTowerConfig, abstract_params
from hunyuan_jax.tensor_files import StoredTensor, open_tensors

Config = TextTowerConfig | CLIPTextConfig

# Where a tower begins among the names of a file, by who wrote it: Llava of transformers 4 and 5, a language model, a bare tower.
LLAMA_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")
CLIP_PREFIXES = ("text_model.", "")
# What older files hold within a layer that is no weight.
IGNORED = ("*.self_attn.rotary_emb.inv_freq",)

# What config.json calls a field, what we call it, and what transformers takes where it is left out.
_LLAMA_FIELDS: Mapping[str, tuple[str, int | float]] = {
    "vocab_size": ("vocab_size", 32_000),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "intermediate_size": ("mlp_width", 11_008),
    "rms_norm_eps": ("norm_eps", 1e-6),
}
_CLIP_FIELDS: Mapping[str, tuple[str, int | float]] = {
    "vocab_size": ("vocab_size", 49_408),
    "max_position_embeddings": ("max_positions", 77),
    "hidden_size": ("width", 512),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 8),
    "intermediate_size": ("mlp_width", 2048),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "eos_token_id": ("eos_token_id", 49_407),
}
_ROPE_THETA = 10_000.0

_LAYER = re.compile(r"(encoder\.)?layers\.\d+\.")


def load_text_tower(
    path: str | Path, *, skip_layers: int = 2, dtype: Dtype = "float32", shardings: Mapping[str, NamedSharding] | None = None
) -> tuple[TextTowerConfig, Any]:
    """Config and parameters of the language model in a folder, or in a file with config.json beside it, without its last layers.

    The parameters are of `dtype`, in which the tower then computes. With `shardings`, by parameter path, they come to lie so on the
    mesh, and each process reads its share of every tensor. Raises `UserError` for a model that `TextTower` is not, and where
    tensors are missing or of the wrong shape.
    """
    config = text_tower_config(path, skip_layers=skip_layers, dtype=dtype)
    return config, _load(Path(path), config, LLAMA_PREFIXES, shardings)


def load_clip_text(
    path: str | Path, *, dtype: Dtype = "float32", shardings: Mapping[str, NamedSharding] | None = None
) -> tuple[CLIPTextConfig, Any]:
    """Config and parameters of CLIP's text tower, as `load_text_tower` loads a language model."""
    config = clip_text_config(path, dtype=dtype)
    return config, _load(Path(path), config, CLIP_PREFIXES, shardings)


def text_tower_config(path: str | Path, *, skip_layers: int = 2, dtype: Dtype = "float32") -> TextTowerConfig:
    """What `load_text_tower` gives, but its parameters: config.json alone is read."""
    return _llama_config(_read_config(Path(path), kinds=("llama",)), skip_layers, dtype, where=f"{path}: config.json")


def clip_text_config(path: str | Path, *, dtype: Dtype = "float32") -> CLIPTextConfig:
    """What `load_clip_text` gives, but its parameters."""
    return _clip_config(_read_config(Path(path), kinds=("clip_text_model", "clip")), dtype, where=f"{path}: config.json")


# --- What the model is ---------------------------------------------------------------------------------------------------------


def _read_config(path: Path, *, kinds: Sequence[str]) -> Mapping[str, Any]:
    """What config.json, in a folder or beside a file, says of the text model; the first of `kinds` is meant where it names none."""
    if not path.exists():
        raise UserError(f"{path} is missing. Give a folder as save_pretrained of transformers writes it.")
    beside = (path if path.is_dir() else path.parent) / "config.json"
    try:
        given = json.loads(beside.read_text())
        given = given.get("text_config", given) if isinstance(given, dict) else None
        if not isinstance(given, dict):
            raise ValueError("an object was expected, of which text_config is one too where it is there")
    except OSError as error:
        raise UserError(
            f"{beside} cannot be read ({error.strerror}). Give a folder as save_pretrained of transformers writes it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{beside} cannot be read as the configuration of a text model: {error}.") from error
    if given.get("model_type", kinds[0]) not in kinds:
        raise UserError(f"{beside} has the model_type {str(given['model_type'])[:100]!r}; {' or '.join(kinds)} was expected.")
    return given


def _llama_config(given: Mapping[str, Any], skip_layers: int, dtype: Dtype, *, where: str) -> TextTowerConfig:
    _expect(given, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, where=where)
    fields = {ours: _number(given, theirs, default, where=where) for theirs, (ours, default) in _LLAMA_FIELDS.items()}
    fields["num_kv_heads"] = _number(given, "num_key_value_heads", fields["num_heads"], where=where)
    if given.get("head_dim") is not None:
        fields["head_dim"] = _number(given, "head_dim", 1, where=where)
    return TextTowerConfig(**fields, rope_theta=_rope_theta(given, where=where), skip_layers=skip_layers, dtype=dtype)


def _clip_config(given: Mapping[str, Any], dtype: Dtype, *, where: str) -> CLIPTextConfig:
    _expect(given, {"hidden_act": "quick_gelu"}, where=where)
    fields = {ours: _number(given, theirs, default, where=where) for theirs, (ours, default) in _CLIP_FIELDS.items()}
    return CLIPTextConfig(**fields, dtype=dtype)


def _expect(given: Mapping[str, Any], expected: Mapping[str, Any], *, where: str) -> None:
    for name, value in expected.items():
        if given.get(name, value) != value:
            raise UserError(f"{where}: {name} is {str(given[name])[:100]}, which is not supported; it must be {value}.")


def _number(given: Mapping[str, Any], name: str, default: int | float, *, where: str) -> Any:
    """A positive number of the type of its default, which null stands for too."""
    value = default if given.get(name) is None else given[name]
    allowed = (int,) if isinstance(default, int) else (int, float)
    if type(value) not in allowed or not 0 < value < math.inf:
        kind = "a positive whole number" if isinstance(default, int) else "a positive number"
        raise UserError(f"{where}: {name} is {str(value)[:100]}, where {kind} was expected.")
    return value


def _rope_theta(given: Mapping[str, Any], *, where: str) -> float:
    """From `rope_parameters` of transformers 5 or `rope_theta` of 4; positions that are scaled in any way are a `UserError`."""
    merged: dict[str, Any] = {"rope_theta": given.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        rope = given.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            raise UserError(f"{where}: {name} is of the type {str(kind)[:100]!r}, which is not supported; only 'default' is.")
        merged |= {key: value for key, value in rope.items() if value is not None}
    return float(_number(merged, "rope_theta", _ROPE_THETA, where=where))


# --- Its tensors ---------------------------------------------------------------------------------------------------------------


def _load(path: Path, config: Config, prefixes: Sequence[str], shardings: Mapping[str, NamedSharding] | None) -> Any:
    """Parameters of `config` from the tensors at `path`."""
    stored = _open(path)
    if config.num_layers > len(stored):
        # Before names are made of it, which would take as long as it says it is deep.
        raise UserError(f"{path}: the {config.num_layers} layers of config.json cannot be made of {len(stored)} tensors.")
    shapes = traverse_util.flatten_dict(abstract_params(config), sep="/")
    names = {parameter: released_name(parameter, config) for parameter in shapes}
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in stored for name in names.values()))
    found = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    expected = {name: _torch_shape(parameter, shapes[parameter].shape) for parameter, name in names.items()}
    _check(found, expected, where=f"{path} (prefix {prefix!r}; tried were {', '.join(map(repr, prefixes))})")
    params = {}
    for parameter, name in names.items():
        kernel = parameter.endswith("/kernel")
        if shardings is None:
            value = found[name].read().astype(jnp.dtype(config.dtype))
            params[parameter] = jnp.asarray(value.T if kernel else value)
        else:
            params[parameter] = _placed(found[name], shardings[parameter], jnp.dtype(config.dtype), kernel=kernel)
    return traverse_util.unflatten_dict(params, sep="/")


def _open(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors at `path`; of a folder without safetensors, those of its one PyTorch file."""
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickled = sorted((*path.glob("*.bin"), *path.glob("*.pt")))
        path = pickled[0] if len(pickled) == 1 else path
    return open_tensors(path).tensors


def released_name(parameter: str, config: Config) -> str:
    """What files call one of our parameters, without a prefix: layers_3/q_proj/kernel is layers.3.self_attn.q_proj.weight."""
    clip = isinstance(config, CLIPTextConfig)
    name = re.sub(r"^layers_(\d+)/", r"encoder.layers.\1." if clip else r"layers.\1.", parameter)
    name = re.sub(r"(?<=\.)(?=(q|k|v|o|out)_proj/)", "self_attn.", name)
    name = re.sub(r"(?<=\.)(?=(gate|up|down)_proj/|fc\d/)", "mlp.", name)
    name = re.sub(r"^(?=(token|position)_embedding$)", "embeddings.", name)
    return re.sub(r"/(kernel|scale|weight)$|(?<=embedding)$|(?<=embed_tokens)$", ".weight", name).replace("/", ".")


def _torch_shape(parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As PyTorch has a parameter: a kernel with output channels first."""
    return shape[::-1] if parameter.endswith("/kernel") else shape


def _check(found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Every name, shape and type; and no layer that is run has more than we compute."""
    layers = {match[0] for name in expected if (match := _LAYER.match(name))}
    within = {name for name in found if (match := _LAYER.match(name)) and match[0] in layers}
    extra = sorted(n for n in within - expected.keys() if not any(fnmatch.fnmatchcase(n, pattern) for pattern in IGNORED))
    missing = sorted(expected.keys() - found.keys())
    unused = sorted(found.keys() - expected.keys())
    said = [f"{name} is missing. {nearest(name, unused) if unused else ''}".strip()[:300] for name in missing[:5]]
    said += [f"{name} is unknown. {nearest(name, missing or list(expected))}"[:300] for name in extra[:5]]
    for name, shape in expected.items():
        if name not in found:
            continue
        tensor = found[name]
        if tensor.shape != shape:
            said.append(f"{name} has shape {tensor.shape}, {shape} was expected.")
        if tensor.dtype.itemsize == 1 or not jnp.issubdtype(tensor.dtype, jnp.floating):
            # A tensor of 8 bits has its scale in another file.
            said.append(f"{name} is {tensor.dtype}; give the weights in bfloat16, float16 or float32.")
    if said:
        counts = f"{len(missing)} missing, {len(extra)} unknown"
        raise UserError(f"The tensors in {where} do not make up the model of config.json ({counts}): {' '.join(said[:10])}")


def _placed(tensor: StoredTensor, sharding: NamedSharding, dtype: np.dtype, *, kernel: bool) -> jax.Array:
    """A parameter on its devices, of which each has first read a run of the file's rows, where these divide."""
    mesh, size, row_axis = sharding.mesh, tensor.shape[0], 1 if kernel else 0
    place = lambda axes: NamedSharding(mesh, PartitionSpec(*(None,) * row_axis, axes))  # noqa: E731
    spec = (*sharding.spec, None, None)
    near = jax.tree.leaves((spec[row_axis], spec[1 - row_axis]))
    axes: tuple[str, ...] = ()
    for axis in (*near, *(axis for axis in mesh.axis_names if axis not in near)):
        if size % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0:
            axes = (*axes, axis)
    read = functools.cache(lambda start, stop: tensor.read_slice((slice(start, stop),)).astype(dtype))

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[row_axis].indices(size)
        return read(start, stop).T if kernel else read(start, stop)

    shape = tensor.shape[::-1] if kernel else tensor.shape
    apart = jax.make_array_from_callback(shape, place(axes), rows)
    return _moved(place(tuple(axis for axis in axes if axis in near)), sharding)(apart)


@functools.cache
def _moved(between: NamedSharding, sharding: NamedSharding) -> Any:
    """A program that puts an array where `sharding` says, one for all parameters of a shape.

    First it gathers over the axes that `sharding` leaves out, then it exchanges over the others. In one step XLA would copy the whole
    array to every device.
    """
    return jax.jit(lambda value: jax.lax.with_sharding_constraint(value, between), out_shardings=sharding)
