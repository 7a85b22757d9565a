"""The weights of a model as they lie in files, in whatever layout, and what model they are of.

    weights = open_weights(path)            headers alone are read: every tensor is known, none is missing, the shapes are right
    weights.config, weights.layout          told from the names and shapes of the tensors, never from a file's name
    weights.read(tensor, start, stop)       rows of a released tensor, from wherever the layout keeps them

What names and shapes do not say is in the metadata of a file of ours, or in the config.json of a folder.
"""

import dataclasses
import fnmatch
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.models import layouts
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.layouts import Config
from hunyuan_jax.models.vae import VAEConfig
from hunyuan_jax.settings import build
from hunyuan_jax.tensor_files import TensorFile, open_tensors

COMPONENTS = {"transformer": DiTConfig, "vae": VAEConfig}
PREFIXES = ("model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.", "vae.")
CONFIG = "hunyuan_jax.config"  # key of the metadata that a file of ours has
CONDITION = "image_condition_type"  # key of diffusers' config.json, and of our metadata, that no shape tells
HOW = ("remat", "dtype", "convolution", "attention", "context")  # fields that say how to compute and not what the weights are

LICENCE_KEY = "licence"  # key of the metadata of weights that were not trained here
LICENCE = (
    "Weights released by Tencent are under the Tencent Hunyuan Community License, converted or not: not for the EU, the UK and South "
    "Korea, and not to improve other models."
)

# A tensor that tells a layout, with the component it belongs to; the names are those of every model of that layout.
_MARKS = (
    ("img_in/proj/kernel", "transformer", "native"),
    ("x_embedder.proj.weight", "transformer", "diffusers"),
    ("time_in.mlp.0.weight", "transformer", "tencent"),
    ("time_in.in_layer.weight", "transformer", "comfyui"),
    ("encoder/conv_in/conv/kernel", "vae", "native"),
    ("encoder.conv_in.conv.weight", "vae", "diffusers"),
)

# Fields of diffusers' config.json and what we call them.
_VAE_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_num_groups",
    "scaling_factor": "scaling_factor",
    "spatial_compression_ratio": "spatial_compression",
    "temporal_compression_ratio": "temporal_compression",
}
_DIT_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_attention_heads": "num_heads",
    "num_layers": "num_double_blocks",
    "num_single_layers": "num_single_blocks",
    "num_refiner_layers": "num_refiner_blocks",
    "mlp_ratio": "mlp_ratio",
    "guidance_embeds": "guidance_embed",
    "text_embed_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim",
    "rope_theta": "rope_theta",
    "rope_axes_dim": "rope_axes",
}


class Readable(Protocol):
    """What tensors are read from, such as a `StoredTensor`."""

    @property
    def dtype(self) -> np.dtype: ...

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A tensor that was read before."""

    value: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.value[index]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The released tensors of a model, in whatever layout they lie; read when they are asked for."""

    config: Config
    layout: str
    stored: Mapping[str, Readable]  # by the layout's names
    metadata: Mapping[str, str]

    @functools.cached_property
    def _pieces(self) -> Mapping[str, list[tuple[int, int, str, int]]]:
        """Of each released tensor its runs of rows: first and end, the stored tensor that has them, and where in it they begin."""
        pieces: dict[str, list[tuple[int, int, str, int]]] = {}
        for name, part in layouts.table(self.layout, self.config).items():
            offset = 0
            for start, stop in part.rows:
                pieces.setdefault(part.tensor, []).append((start, stop, name, offset))
                offset += stop - start
        return {tensor: sorted(runs) for tensor, runs in pieces.items()}

    def dtype(self, tensor: str) -> np.dtype:
        """The narrowest type that holds all its pieces, which may be of several."""
        return functools.reduce(jnp.promote_types, [self.stored[name].dtype for _, _, name, _ in self._pieces[tensor]])

    def read(self, tensor: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a released tensor, as PyTorch has it."""
        place, dtype = layouts.places(self.config)[tensor], self.dtype(tensor)
        stop = place.shape[0] if stop is None else stop
        runs = []
        for first, end, name, offset in self._pieces[tensor]:
            low, high = max(first, start), min(end, stop)
            if low < high:
                runs.append(self._rows(name, place, slice(offset + low - first, offset + high - first)).astype(dtype, copy=False))
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    def _rows(self, name: str, place: layouts.Place, rows: slice) -> np.ndarray:
        if self.layout == "native":
            return place.to_torch(self.stored[name].read_slice(()))[rows]
        return self.stored[name].read_slice((rows,))


def open_weights(path: str | Path, *, component: str | None = None, ignore: Sequence[str] = (), key: str | None = None) -> Weights:
    """The weights at `path`: a file, a folder of one component, or a `.pt` file (of which `key` chooses an entry).

    Raises `UserError` where tensors are missing, of the wrong shape, or unknown and matched by no pattern in `ignore`.
    """
    path = Path(path)
    if (path / "model.json").exists():
        raise UserError(f"{path} is a training run. Write its weights with python -m hunyuan_jax.export --checkpoint {path}.")
    file = _without_prefix(open_tensors(path, key=key))
    found, layout = _detect(file, path)
    if component is not None and found != component:
        raise UserError(f"{path} holds a {found}, where a {component} was expected. Give the folder or file of the {component}.")
    given = _read_config(path)
    config = _config_of(file, found, layout, given, path)
    _check(file, layout, config, path=path, ignore=ignore)
    condition = {CONDITION: given[CONDITION]} if isinstance(given.get(CONDITION), str) else {}
    licence = {} if CONFIG in file.metadata else {LICENCE_KEY: LICENCE}
    return Weights(config, layout, file.tensors, {**condition, **licence, **file.metadata})


def weights_of(config: Config, params: Any) -> Weights:
    """Our parameters as weights in the native layout. Raises `UserError` where they are not those of `config`."""
    flat = {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()}
    expected = layouts.abstract_params(config)
    unknown, missing = sorted(flat.keys() - expected.keys()), sorted(expected.keys() - flat.keys())
    wrong = [path for path in expected.keys() & flat.keys() if flat[path].shape != expected[path].shape]
    if unknown or missing or wrong:
        raise UserError(
            "The parameters are not those of the config: "
            f"unknown are {unknown[:5]}, missing are {missing[:5]}, and of another shape {wrong[:5]}."
        )
    places = layouts.places(config).values()
    return Weights(config, "native", {p.name: InMemory(flat[p.path] if p.layer is None else flat[p.path][p.layer]) for p in places}, {})


def _without_prefix(file: TensorFile) -> TensorFile:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in file.tensors):
            file = TensorFile({name.removeprefix(prefix): tensor for name, tensor in file.tensors.items()}, file.metadata)
    return file


def _detect(file: TensorFile, path: Path) -> tuple[str, str]:
    for mark, component, layout in _MARKS:
        if mark in file.tensors:
            return component, layout
    names = ", ".join(sorted(file.tensors)[:3])
    raise UserError(
        f"{path} holds neither a HunyuanVideo transformer nor its VAE in a layout that is known; its tensors are such as {names}."
    )


def _check(file: TensorFile, layout: str, config: Config, *, path: Path, ignore: Sequence[str]) -> None:
    """Every name, shape and type."""
    table, places = layouts.table(layout, config), layouts.places(config)
    extra = [name for name in file.tensors.keys() - table.keys() if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)]
    missing = sorted(table.keys() - file.tensors.keys())
    said = [f"{name} is unknown. {nearest(name, missing or list(table))}"[:300] for name in sorted(extra)[:10]]
    said += [f"{name} is missing." for name in missing[:10]]
    for name, part in table.items():
        if name not in file.tensors:
            continue
        expected = places[part.tensor].native_shape if layout == "native" else (part.num_rows, *places[part.tensor].shape[1:])
        tensor = file.tensors[name]
        if tensor.shape != expected:
            said.append(f"{name} has shape {tensor.shape}, {expected} was expected.")
        if tensor.dtype.itemsize == 1 or not jnp.issubdtype(tensor.dtype, jnp.floating):
            # A tensor of 8 bits has its scale in another file.
            said.append(f"{name} is {tensor.dtype}; give the weights in bfloat16, float16 or float32.")
    if said:
        raise UserError(
            f"The tensors in {path} do not make up the model ({len(missing)} missing, {len(extra)} unknown): " + " ".join(said[:10])
        )


# --- What the model is ---------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> Mapping[str, Any]:
    """The config.json in a folder or beside a file; empty where there is none."""
    beside = (path if path.is_dir() else path.parent) / "config.json"
    try:
        given = json.loads(beside.read_text()) if beside.exists() else {}
        if not isinstance(given, dict):
            raise ValueError("an object was expected")
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{beside} cannot be read as the configuration of the weights beside it: {error}.") from error
    return given


def _config_of(file: TensorFile, component: str, layout: str, given: Mapping[str, Any], path: Path) -> Config:
    """From the file's own metadata, else from config.json, names and shapes. What no tensors can be of is a `UserError`."""
    try:
        if CONFIG in file.metadata:
            fields = json.loads(file.metadata[CONFIG])
        elif component == "vae":
            fields = {ours: given[theirs] for theirs, ours in _VAE_FIELDS.items() if theirs in given}
        else:
            fields = _dit_fields(file, layout, given, path)
        config: Any = build(COMPONENTS[component], fields, where=f"{path}: {component}")
        # Before tables are made of it, which would take as long as it says it is large.
        depth = config.layers_per_block * len(config.block_out_channels) if isinstance(config, VAEConfig) else _num_blocks(config)
        if depth > len(file.tensors):
            raise ValueError(f"{depth} blocks of layers cannot be made of {len(file.tensors)} tensors")
        layouts.places(config)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not of a model that can be: {str(error)[:300]}. Give the config.json that belongs to it.") from error
    return config


def _num_blocks(config: DiTConfig) -> int:
    return config.num_double_blocks + config.num_single_blocks + config.num_refiner_blocks


def _dit_fields(file: TensorFile, layout: str, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Sizes from shapes; only how heads are turned by positions cannot be seen in them."""
    shape = functools.partial(_shape_of, file, layout)
    patches, final = shape("img_in.proj.weight"), shape("final_layer.linear.weight")
    head = shape("double_blocks.0.img_attn_q_norm.weight") or shape("single_blocks.0.q_norm.weight")
    text, pooled = shape("txt_in.input_embedder.weight"), shape("vector_in.in_layer.weight")
    mlp, single = shape("double_blocks.0.img_mlp.fc1.weight"), shape("single_blocks.0.linear2.weight")
    if not (patches and final and head and text and pooled) or len(patches) != 5 or not (mlp or single):
        raise UserError(f"What model the tensors in {path} are cannot be told: embeddings, a block or the final layer are missing.")
    width = patches[0]
    hidden = mlp[0] if mlp else single[1] - width  # type: ignore[index]
    counts = {stack: _count(file, layout, released) for stack, released in layouts.STACKS.items()}
    return {
        "width": width,
        "num_heads": width // head[0],
        "num_double_blocks": counts["double_blocks"],
        "num_single_blocks": counts["single_blocks"],
        "num_refiner_blocks": counts["txt_in/individual_token_refiner"],
        "text_dim": text[1],
        "pooled_dim": pooled[1],
        "mlp_ratio": hidden / width,
        "patch_size": patches[2:],
        "in_channels": patches[1],
        "out_channels": final[0] // math.prod(patches[2:]),
        "guidance_embed": shape("guidance_in.mlp.0.weight") is not None,
        "rope_axes": given.get("rope_axes_dim") or _usual_rope_axes(head[0], path),
        "rope_theta": given.get("rope_theta", 256.0),
    }


def _usual_rope_axes(head_dim: int, path: Path) -> tuple[int, int, int]:
    """An eighth of the head for frames, the rest for rows and columns, as all released models have it."""
    axes = (head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16)
    if sum(axes) != head_dim or any(n % 2 for n in axes):
        raise UserError(
            f"How heads of {head_dim} channels are turned cannot be told from {path}; put a config.json with rope_axes_dim beside it."
        )
    return axes


def _shape_of(file: TensorFile, layout: str, released: str) -> tuple[int, ...] | None:
    name = layouts.renamed(released, layout)
    return file.tensors[name].shape if name in file.tensors else None


def _count(file: TensorFile, layout: str, released: str) -> int:
    """Blocks of a stack."""
    prefix = layouts.renamed(f"{released}.0.", layout).removesuffix("0.")
    numbers = [re.match(re.escape(prefix) + r"(\d{1,4})\.", name) for name in file.tensors]
    return len({int(found[1]) for found in numbers if found})


def diffusers_config(config: Config, metadata: Mapping[str, str]) -> dict[str, Any]:
    """config.json as diffusers writes it. Raises `UserError` for a model that diffusers does not have."""
    if isinstance(config, VAEConfig):
        fields = {theirs: getattr(config, ours) for theirs, ours in _VAE_FIELDS.items()}
        return {"_class_name": "AutoencoderKLHunyuanVideo", **fields, "mid_block_add_attention": True}
    frames, rows, columns = config.patch_size
    if rows != columns:
        raise UserError(f"diffusers has square patches alone, not {config.patch_size}; write the layout 'native' to a .safetensors file.")
    concat = "latent_concat" if config.in_channels == 2 * config.out_channels + 1 else None
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        **{theirs: getattr(config, ours) for theirs, ours in _DIT_FIELDS.items()},
        "attention_head_dim": config.head_dim,
        "patch_size": rows,
        "patch_size_t": frames,
        "qk_norm": "rms_norm",
        CONDITION: metadata.get(CONDITION, concat),
    }


def differences(one: Config, other: Config) -> str:
    """In which fields two configs want different weights, in words; empty where the same weights serve both."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    return ", ".join(f"{name} is {a[name]} there and {b[name]} here" for name in a if name not in HOW and a[name] != b[name])
