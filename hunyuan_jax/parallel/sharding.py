"""Where arrays live, in two tables: parameters by their path, and what is computed of them by what its axes mean.

Each row of `PARAM_RULES` gives, for parameters whose path matches, the mesh axis of each of the last dimensions; a leading axis of scanned
layers is never sharded. A matrix is sharded over `tensor` along the side that is split between heads or hidden units and over `fsdp` along
the other. An axis that does not divide its dimension leaves it whole.

`ACTIVATION_RULES` gives, for each axis of an activation, by name, the mesh axes that split it: samples, tokens, heads, rows.

Neither has a row that catches all: a parameter or an axis without a rule is an error.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.mesh import SEQUENCE

# (pattern of the path, axes of the last dimensions)
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # The DiT: matrices that widen or project into heads, matrices that come back, and the two ends, whose patches are small.
    (r"(attn_qkv|fc1|linear1|in_layer|input_embedder|adaLN_modulation|(_mod|modulation)/linear)/kernel$", ("fsdp", "tensor")),
    (r"(attn_proj|fc2|linear2|out_layer)/kernel$", ("tensor", "fsdp")),
    (r"img_in/proj/kernel$", (None, "fsdp")),
    (r"final_layer/linear/kernel$", ("fsdp", None)),
    (r"(attn_qkv|attn_proj|fc1|fc2|linear1|linear2|in_layer|out_layer|input_embedder|adaLN_modulation|linear|img_in/proj)/bias$", (None,)),
    # The VAE: convolutions over their output channels, attention over either side.
    (r"(conv|quant_conv)/kernel$", (None, None, None, None, "fsdp")),
    (r"to_(q|k|v|out_0)/kernel$", ("fsdp", "tensor")),
    (r"(conv|quant_conv|to_q|to_k|to_v|to_out_0)/bias$", (None,)),
    # The VAE's critic: convolutions over their output channels.
    (r"(level_\d|logits)/patch/kernel$", (None, None, None, None, "fsdp")),
    (r"(level_\d|logits)/patch/bias$", (None,)),
    # Norms of the DiT, the VAE and CLIP.
    (r"(norm\d?|conv_norm_out)/(scale|bias)$", (None,)),
    # The text encoders, whose fc1 and fc2 are named as the DiT's: embeddings with their words as what is split.
    (r"(q|k|v|gate|up)_proj/kernel$", ("fsdp", "tensor")),
    (r"(o|out|down)_proj/kernel$", ("tensor", "fsdp")),
    (r"(q|k|v|out)_proj/bias$", (None,)),
    (r"(embed_tokens|token_embedding)$", ("tensor", "fsdp")),
    (r"position_embedding$", (None, None)),
    (r"layernorm/weight$", (None,)),
)

BATCH_AXES = ("data", "fsdp")

# Axes of activations by name. Products take a stream's tokens whole over `tensor`, which splits their heads and hidden units. Norms and
# sums between them have no such side, so there tokens are split over `tensor` too: Korthikanti et al. 2022 (sequence parallelism).
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "samples": BATCH_AXES,
    "image tokens": (SEQUENCE,),
    "image tokens between products": (SEQUENCE, "tensor"),
    "text tokens": (),
    "text tokens between products": ("tensor",),
    "heads": ("tensor",),
    "hidden units": ("tensor",),
    "embedding": ("fsdp",),  # features of a table of words, on the devices that hold them
    "frames": (),
    "whole frames": (SEQUENCE,),  # that are judged one by one
    "rows": (SEQUENCE,),  # of frames and their latents
}

HOST_MEMORY = "pinned_host"  # the kind of memory in which a device leaves to its host what it will want again


def path_of(path: Any) -> str:
    """A pytree path as names joined by `/`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def rule_for(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of the parameter at `path`; KeyError where no rule matches."""
    for pattern, axes in PARAM_RULES:
        if re.search(pattern, path):
            return (None,) * (len(shape) - len(axes)) + axes[max(0, len(axes) - len(shape)) :]
    raise KeyError(f"No sharding rule for {path} of shape {shape}; add one to PARAM_RULES.")


def param_axes(path: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> list[str | None]:
    """The axis that splits each dimension of the parameter at `path`, on a mesh of these sizes."""
    axes = zip(rule_for(path, shape), shape, strict=True)
    return [axis if axis and size % mesh[axis] == 0 else None for axis, size in axes]


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a tree of parameters or of anything shaped like them."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*param_axes(path_of(path), leaf.shape, mesh.shape)))

    return jax.tree_util.tree_map_with_path(place, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Clips are split over `data` and `fsdp`."""
    return NamedSharding(mesh, spec("samples"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec(*names: str | None) -> PartitionSpec:
    """How the first axes of an activation, named as in `ACTIVATION_RULES`, are split; None and all further axes are whole.

    KeyError where there is no such axis.
    """
    return PartitionSpec(*map(_axes, names))


def placed(x: Float[Array, "..."], *names: str | None) -> Float[Array, "..."]:
    """Within a program: the same, its first axes split as `spec` says; over `tensor` only where that divides them.

    Said of what blocks take and give, lest a compiler split features like the weights, and sum whole batches over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def fitting(name: str | None, size: int) -> tuple[str, ...]:
        axes = _axes(name)
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        return axes if divides else tuple(axis for axis in axes if axis != "tensor")

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(fitting, names, x.shape)))


def _axes(name: str | None) -> tuple[str, ...]:
    return () if name is None else ACTIVATION_RULES[name]


def check_rows(rows: int, parts: int) -> None:
    """Raises `UserError` where so many devices cannot split so many rows."""
    if rows % parts:
        fitting = max(n for n in range(1, parts) if rows % n == 0)
        raise UserError(
            f"mesh.sequence={parts} splits the rows of frames and latents, but {rows} rows do not divide by it; the nearest that they do "
            f"is {fitting}."
        )


def split_rows(x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
    """Within a program: the same, with the rows of frames split over `sequence`. Raises `UserError` as `check_rows` does."""
    check_rows(x.shape[2], sequence_size())
    return placed(x, "samples", "frames", "rows")


def looked_up(table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Within a program: the rows of an embedding that the tokens name, with samples split over the axes of a batch.

    Every device looks up its own features of all tokens and changes them for all features of its own: the table stays where it is.
    """
    return placed(placed(table[placed(tokens)], None, "text tokens", "embedding"), "samples")


def sequence_size() -> int:
    """Within a program: how many devices share the tokens of a sample; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[SEQUENCE]


def as_multiplied(kernel: Float[Array, "K N"], path: str) -> Float[Array, "K N"]:
    """Within a program: the kernel of the layer at `path`, gathered over `fsdp` and split over `tensor` as the table says.

    Said of every kernel, since a compiler that may choose moves activations to weights, and XLA's has chosen wrong sums.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*_split_sides(kernel, path)))


def as_product(out: Float[Array, "B L N"], kernel: Float[Array, "K N"], path: str) -> Float[Array, "B L N"]:
    """Within a program: what tokens times that kernel are, its features split over `tensor` where the kernel's are.

    Said for the way back: the gradient of it comes from tokens that are split over `tensor`, and must change sides before the product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1 or _split_sides(kernel, path)[-1] is None:
        return out
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(out, PartitionSpec(*[free] * (out.ndim - 1), *spec("hidden units")))


def _split_sides(kernel: Array, path: str) -> list[str | None]:
    """The axis `tensor` on the side of a layer's kernel that it splits."""
    axes = param_axes(f"{path}/kernel", kernel.shape, jax.sharding.get_abstract_mesh().shape)
    return [axis if axis == "tensor" else None for axis in axes]


def gathered(params: Any) -> Any:
    """Within a program: the same parameters, whole on every device.

    For models whose activations outweigh them by far, such as the VAE: between rows split over `sequence` and channels split over
    `fsdp` a compiler would exchange activations instead.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), params)
