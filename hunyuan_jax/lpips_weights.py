"""The weights of LPIPS from files, in the layouts they are published in:

    torchvision's vgg16       features.0.weight ... features.28.bias   together with
    the lpips package's head  lin0.model.1.weight ... lin4.model.1.weight
    the whole lpips network   net.slice1.0.weight ... net.slice5.28.bias, lin0.model.1.weight ..., scaling_layer.shift and .scale

each as safetensors or `.pt`. Every tensor must be known and every weight given, or nothing is read.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.critics import LPIPS_SCALE, LPIPS_SHIFT, lpips_shapes
from hunyuan_jax.settings import nearest
from hunyuan_jax.tensor_files import StoredTensor, open_tensors

# What these files hold besides: VGG's own classifier, and the lpips package's second name for its heads.
IGNORED = ("classifier.*", "lins.*")
CONSTANTS = {"scaling_layer.shift": LPIPS_SHIFT, "scaling_layer.scale": LPIPS_SCALE}
# In VGG's sequence of layers the places of its convolutions, by the stages of `VGG_STAGES`.
_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def _name_of(path: str, *, whole: bool) -> str:
    """What a parameter is called in files: of the whole network, or of torchvision's VGG and a head."""
    if path.startswith("lin"):
        return f"{path}.model.1.weight"
    _, convolution, kind = path.split("/")
    stage, number = (int(part) - 1 for part in convolution.removeprefix("conv").split("_"))
    stem = f"net.slice{stage + 1}" if whole else "features"
    return f"{stem}.{_LAYERS[stage][number]}.{'weight' if kind == 'kernel' else 'bias'}"


def load_lpips(files: Sequence[str | Path]) -> Any:
    """Float32 parameters of `LPIPS`, from one file or from several that make it up together.

    Raises `UserError` that names what is missing, unknown or of another shape.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = open_tensors(file).tensors
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{' and '.join(map(str, files))} have {twice[0]} twice; give each part of LPIPS once.")
        tensors |= found
    tensors = {name: t for name, t in tensors.items() if not any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED)}
    whole = any(name.startswith("net.") for name in tensors)
    flat = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(lpips_shapes(), sep="/").items()}
    names = {_name_of(path, whole=whole): path for path in flat}
    expected = {name: _torch_shape(path, flat[path]) for name, path in names.items()}
    _check(tensors, expected, where=" and ".join(map(str, files)))
    return traverse_util.unflatten_dict({path: _ours(tensors[name], flat[path]) for name, path in names.items()}, sep="/")


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As PyTorch has a parameter: a kernel with output channels first, a head as a 1 x 1 convolution."""
    if len(shape) == 4:
        return (shape[3], shape[2], *shape[:2])
    return (1, *shape, 1, 1) if path.startswith("lin") else shape


def _check(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys() - CONSTANTS.keys())
    said = [f"{name} is missing. {nearest(name, unknown) if unknown else ''}".strip()[:300] for name in missing[:5]]
    said += [f"{name} is unknown. {nearest(name, list(missing or expected))}"[:300] for name in unknown[:5]]
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "f" and tensor.dtype != jnp.bfloat16:
            said.append(f"{name} is {tensor.dtype}, where numbers with a fraction were expected.")
        elif name in expected and tensor.shape != expected[name]:
            said.append(f"{name} has shape {tensor.shape}, {expected[name]} was expected.")
        elif name in CONSTANTS and not (tensor.nbytes < 1000 and np.allclose(tensor.read().ravel(), CONSTANTS[name], atol=1e-6)):
            said.append(f"{name} is not {CONSTANTS[name]}, as in LPIPS 0.1.")
    if said:
        raise UserError(
            f"The tensors in {where} do not make up LPIPS with VGG-16 ({len(missing)} missing, {len(unknown)} unknown): "
            f"{' '.join(said[:10])} Give the whole lpips network, or torchvision's vgg16 and the lpips package's vgg head."
        )


def _ours(tensor: StoredTensor, shape: tuple[int, ...]) -> np.ndarray:
    value = tensor.read().astype(np.float32)
    return value.transpose(2, 3, 1, 0) if len(shape) == 4 else value.reshape(shape)
