"""The layouts that weights are kept in: which name holds which rows of which tensor.

    tencent     the released names; all other layouts are told in its terms
    comfyui     the same tensors under other names
    diffusers   fused projections split by rows; the final modulation's halves swapped
    native      ours: `/` between names, kernels [in, out], one entry per layer of a stack

PyTorch keeps a linear layer as [out, in] and the patch embedding as a convolution [out, c, pt, py, px]; ours are [in, out] and
[(c pt py px), out]. A layout is a table from its names to `Part`s. A table holds every row of every tensor exactly once, so a
tensor of one layout can be put together from another's.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hunyuan_jax.models import vae
from hunyuan_jax.models.dit import DiT, DiTConfig
from hunyuan_jax.models.vae import VAEConfig

Config = DiTConfig | VAEConfig

LAYOUTS = ("native", "diffusers", "tencent", "comfyui")

STACKS = {
    "double_blocks": "double_blocks",
    "single_blocks": "single_blocks",
    "txt_in/individual_token_refiner": "txt_in.individual_token_refiner.blocks",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows (of the first axis) of a tensor, one run after another."""

    tensor: str
    rows: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a released tensor is among our parameters: a path, and the layer in it where layers are stacked."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # as PyTorch has it
    native_shape: tuple[int, ...]  # as we have it, of one layer

    @property
    def name(self) -> str:
        """The entry of a native file."""
        if self.layer is None:
            return self.path
        stack = next(stack for stack in STACKS if self.path.startswith(f"{stack}/"))
        return f"{stack}/{self.layer}{self.path[len(stack) :]}"

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Our array of one layer as PyTorch has it: output channels first, then input channels."""
        if not self.path.endswith("kernel"):
            return value
        return np.moveaxis(value, (-1, -2), (0, 1)).reshape(self.shape)

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_torch`."""
        if not self.path.endswith("kernel"):
            return value
        flat = len(self.native_shape) == 2
        return np.moveaxis(value.reshape(len(value), -1) if flat else value, (0, 1), (-1, -2))


def abstract_params(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters by path, without memory."""
    if isinstance(config, VAEConfig):
        tree = vae.abstract_params(config)
    else:
        shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
        latents, text = shape(1, *config.patch_size, config.in_channels), shape(1, 1, config.text_dim)
        pooled, guidance = shape(1, config.pooled_dim), shape(1) if config.guidance_embed else None
        inputs = (latents, shape(1), text, shape(1, 1, dtype=jnp.bool_), pooled, guidance)
        tree = jax.eval_shape(lambda *x: DiT(config).init(jax.random.key(0), *x)["params"], *inputs)
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def places(config: Config) -> Mapping[str, Place]:
    """Every tensor of the released layout and where it is among our parameters."""
    found = {}
    for path, leaf in abstract_params(config).items():
        stack = next((stack for stack in STACKS if path.startswith(f"{stack}/")), None)
        native = leaf.shape[1:] if stack else leaf.shape
        size = (native[-1], native[-2], *native[:-2]) if path.endswith("kernel") else native
        if path == "img_in/proj/kernel" and isinstance(config, DiTConfig):
            size = (config.width, config.in_channels, *config.patch_size)
        for layer in range(leaf.shape[0]) if stack else (None,):
            name = _released_dit_name(path, stack, layer) if isinstance(config, DiTConfig) else _released_vae_name(path)
            found[name] = Place(path, layer, size, native)
    return found


def _released_vae_name(path: str) -> str:
    """The name of `decoder/up_blocks_0/resnets_1/norm1/scale` and the like."""
    return _weight(re.sub(r"_(\d+)(?=/)", r".\1", path).replace("/", "."))


def _released_dit_name(path: str, stack: str | None, layer: int | None) -> str:
    name = f"{STACKS[stack]}.{layer}{path[len(stack) :]}" if stack else path
    name = name.replace("/", ".").replace("adaLN_modulation", "adaLN_modulation.1")
    name = _weight(name)
    for embedder, first, last in (("time_in", "mlp.0", "mlp.2"), ("guidance_in", "mlp.0", "mlp.2"), ("t_embedder", "mlp.0", "mlp.2")):
        name = name.replace(f"{embedder}.in_layer", f"{embedder}.{first}").replace(f"{embedder}.out_layer", f"{embedder}.{last}")
    return name.replace("c_embedder.in_layer", "c_embedder.linear_1").replace("c_embedder.out_layer", "c_embedder.linear_2")


def _weight(name: str) -> str:
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


@functools.cache
def table(layout: str, config: Config) -> Mapping[str, Part]:
    """The names of a layout and what each holds. A VAE has the same names everywhere but in ours."""
    parts = _PARTS[layout if isinstance(config, DiTConfig) or layout == "native" else "tencent"]
    return {name: part for tensor, place in places(config).items() for name, part in parts(tensor, place, config)}


def _whole(place: Place) -> tuple[tuple[int, int], ...]:
    return ((0, place.shape[0]),)


_COMFYUI = (
    (r"_attn_qkv\.", "_attn.qkv."),
    (r"_attn_proj\.", "_attn.proj."),
    (r"(_attn|)[_.]q_norm\.weight$", r"\1.norm.query_norm.scale"),
    (r"(_attn|)[_.]k_norm\.weight$", r"\1.norm.key_norm.scale"),
    (r"(_mod|modulation)\.linear\.", r"\1.lin."),
    (r"mlp\.fc1\.", "mlp.0."),
    (r"mlp\.fc2\.", "mlp.2."),
    (r"(time_in|guidance_in|t_embedder)\.mlp\.0\.", r"\1.in_layer."),
    (r"(time_in|guidance_in|t_embedder)\.mlp\.2\.", r"\1.out_layer."),
    (r"c_embedder\.linear_1\.", "c_embedder.in_layer."),
    (r"c_embedder\.linear_2\.", "c_embedder.out_layer."),
)

_DIFFUSERS = (
    (r"^img_in\.", "x_embedder."),
    (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (r"^txt_in\.t_embedder\.mlp\.0\.", "context_embedder.time_text_embed.timestep_embedder.linear_1."),
    (r"^txt_in\.t_embedder\.mlp\.2\.", "context_embedder.time_text_embed.timestep_embedder.linear_2."),
    (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
    (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
    (r"^time_in\.mlp\.0\.", "time_text_embed.timestep_embedder.linear_1."),
    (r"^time_in\.mlp\.2\.", "time_text_embed.timestep_embedder.linear_2."),
    (r"^guidance_in\.mlp\.0\.", "time_text_embed.guidance_embedder.linear_1."),
    (r"^guidance_in\.mlp\.2\.", "time_text_embed.guidance_embedder.linear_2."),
    (r"^vector_in\.in_layer\.", "time_text_embed.text_embedder.linear_1."),
    (r"^vector_in\.out_layer\.", "time_text_embed.text_embedder.linear_2."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"adaLN_modulation\.1\.", "norm_out.linear."),
    (r"self_attn_proj\.", "attn.to_out.0."),
    (r"^double_blocks\.", "transformer_blocks."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"img_mod\.linear\.", "norm1.linear."),
    (r"txt_mod\.linear\.", "norm1_context.linear."),
    (r"img_attn_([qk])_norm\.", r"attn.norm_\1."),
    (r"txt_attn_([qk])_norm\.", r"attn.norm_added_\1."),
    (r"img_attn_proj\.", "attn.to_out.0."),
    (r"txt_attn_proj\.", "attn.to_add_out."),
    (r"(?:img_|)mlp\.fc1\.", "ff.net.0.proj."),
    (r"(?:img_|)mlp\.fc2\.", "ff.net.2."),
    (r"txt_ff\.net\.", "ff_context.net."),
    (r"modulation\.linear\.", "norm.linear."),
    (r"linear2\.", "proj_out."),
    (r"\.([qk])_norm\.", r".attn.norm_\1."),
)

# Fused projections, and what diffusers calls their parts: queries, keys, values, then what is left.
_SPLIT = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def renamed(tensor: str, layout: str) -> str:
    """What a released tensor that is in one piece there is called in a layout."""
    return _renamed(tensor, {"comfyui": _COMFYUI, "diffusers": _DIFFUSERS}.get(layout, ()))


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _native_parts(tensor: str, place: Place, config: Any) -> list[tuple[str, Part]]:
    return [(place.name, Part(tensor, _whole(place)))]


def _tencent_parts(tensor: str, place: Place, config: Any) -> list[tuple[str, Part]]:
    return [(tensor, Part(tensor, _whole(place)))]


def _comfyui_parts(tensor: str, place: Place, config: Any) -> list[tuple[str, Part]]:
    return [(renamed(tensor, "comfyui"), Part(tensor, _whole(place)))]


def _diffusers_parts(tensor: str, place: Place, config: Any) -> list[tuple[str, Part]]:
    name, rows, width = renamed(tensor, "diffusers"), place.shape[0], config.width
    if tensor.startswith("final_layer.adaLN_modulation"):
        return [(name, Part(tensor, ((width, rows), (0, width))))]
    fused = next((fused for fused in _SPLIT if f".{fused}." in name), None)
    if fused is None:
        return [(name, Part(tensor, _whole(place)))]
    edges = [0, width, 2 * width, 3 * width, rows]
    return [
        (name.replace(f".{fused}.", f".{part}."), Part(tensor, ((start, stop),)))
        for part, start, stop in zip(_SPLIT[fused], edges, edges[1:], strict=False)
    ]


_PARTS: dict[str, Callable[[str, Place, Any], list[tuple[str, Part]]]] = {
    "native": _native_parts,
    "tencent": _tencent_parts,
    "comfyui": _comfyui_parts,
    "diffusers": _diffusers_parts,
}
