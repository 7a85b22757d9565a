"""Released checkpoint layouts to parameters and back, as rules of names.

The VAE's tensors have the same names in Tencent's and in diffusers' layout, and ours are made from them: `.` before a number
is `_`, other `.` are levels of the tree, `weight` is `kernel` or `scale`. PyTorch keeps Linear weights as [out, in] and Conv3d
weights as [out, in, t, h, w]; Flax as [in, out] and [t, h, w, in, out].
"""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.flax
from flax import traverse_util
from safetensors import SafetensorError

from hunyuan_jax.data.dataset import replacing, write_json
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import VAEConfig, abstract_params

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"

# Fields of the released config.json and what we call them.
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


def vae_name(path: str) -> str:
    """The released name of a parameter of ours: `decoder/up_blocks_0/resnets_1/norm1/scale` and so on."""
    name = re.sub(r"_(\d+)(?=/)", r".\1", path).replace("/", ".")
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def to_released(path: str, value: Any) -> np.ndarray:
    """A parameter in PyTorch's order of dimensions."""
    if not path.endswith("kernel"):
        return value
    return value.transpose(4, 3, 0, 1, 2) if value.ndim == 5 else value.T


def from_released(path: str, value: Any) -> Any:
    """The inverse of `to_released`."""
    if not path.endswith("kernel"):
        return value
    return value.transpose(2, 3, 4, 1, 0) if value.ndim == 5 else value.T


def save_vae(folder: Path, config: VAEConfig, params: Any, *, dtype: str = "float32", metadata: dict[str, str] | None = None) -> None:
    """Writes a VAE as diffusers does: config.json and one safetensors file, in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {vae_name(path): jnp.asarray(to_released(path, np.asarray(value)), dtype) for path, value in flat.items()}
    with replacing(folder / VAE_WEIGHTS) as temporary:
        safetensors.flax.save_file(tensors, str(temporary), metadata={"format": "pt", **(metadata or {})})
    fields = {theirs: getattr(config, ours) for theirs, ours in _VAE_FIELDS.items()}
    ours_alone = {"convolution": config.convolution}
    write_json(
        folder / "config.json", {"_class_name": "AutoencoderKLHunyuanVideo", **fields, "mid_block_add_attention": True, **ours_alone}
    )


def load(path: str | Path, component: str = "vae") -> tuple[VAEConfig, Any]:
    """Config and float32 parameters of a released component in the diffusers layout.

    Every tensor must be consumed and every parameter set; otherwise a `UserError` lists the names.
    """
    if component != "vae":
        raise UserError(f"Component {component!r} cannot be loaded; 'vae' can.")
    folder = Path(path)
    try:
        given = json.loads((folder / "config.json").read_text())
        tensors = safetensors.flax.load_file(str(folder / VAE_WEIGHTS))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no VAE: {error.filename or VAE_WEIGHTS} is missing; config.json and {VAE_WEIGHTS} are read."
        ) from error
    except (ValueError, SafetensorError) as error:
        raise UserError(f"The VAE in {folder} cannot be read: {error}.") from error
    fields = {ours: given[theirs] for theirs, ours in _VAE_FIELDS.items() if theirs in given}
    config = VAEConfig(**fields, convolution=given.get("convolution", "volume"))
    return config, _assemble(config, tensors, folder=folder)


def _assemble(config: VAEConfig, tensors: dict[str, Any], *, folder: Path) -> Any:
    flat = traverse_util.flatten_dict(abstract_params(config), sep="/")
    names = {vae_name(p): p for p in flat}
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unknown:
        raise UserError(f"The VAE in {folder} does not match its config.json: missing {missing[:5]}, unknown {unknown[:5]}.")
    params = {}
    for name, path in names.items():
        value = from_released(path, tensors[name].astype(jnp.float32))
        if value.shape != flat[path].shape:
            raise UserError(f"The VAE in {folder}: {name} has shape {tensors[name].shape}, which does not fit {flat[path].shape}.")
        params[path] = value
    return traverse_util.unflatten_dict(params, sep="/")
