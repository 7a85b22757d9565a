"""Where arrays live: the table of parameters by path, the sharding of batches, and what a program asks of its compiler.

Each row of `PARAM_RULES` gives, for parameters whose path matches, the mesh axis of each dimension, the last dimensions
first to be read from the right: a leading axis of scanned layers is never sharded. A matrix is sharded over `tensor` along the
side that is split between heads or hidden units and over `fsdp` along the other. An axis that does not divide its dimension
leaves it whole. There is no row that catches all: a parameter without a rule is an error.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from hunyuan_jax.errors import UserError

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


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a tree of parameters or of anything shaped like them."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        axes = rule_for(path_of(path), leaf.shape)
        fitting = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, leaf.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree_util.tree_map_with_path(place, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Clips are split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_rows(x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
    """Within a program: the same, with the rows of frames split over `sequence`. Raises `UserError` where they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts, rows = mesh.shape["sequence"], x.shape[2]
    if rows % parts:
        raise UserError(f"mesh.sequence={parts} splits the rows of frames and latents, but {rows} rows do not divide by it; set it lower.")
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, None, "sequence"))


def split_samples(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Within a program: the same, with samples split over the axes of a batch and nothing else.

    Said of what blocks take and give, lest a compiler split features like the weights, and sum whole batches over the devices.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def looked_up(table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Within a program: the rows of an embedding that the tokens name, with samples split over the axes of a batch.

    Every device looks up its own features of all tokens and changes them for all features of its own: the table stays where it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return table[tokens]
    tokens = jax.lax.with_sharding_constraint(tokens, PartitionSpec())
    return split_samples(jax.lax.with_sharding_constraint(table[tokens], PartitionSpec(None, None, "fsdp")))


def sequence_size() -> int:
    """Within a program: how many devices share the tokens of a sample; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["sequence"]


def split_tokens(x: Float[Array, "B L D"], *axes: str) -> Float[Array, "B L D"]:
    """Within a program: the same, with samples split over the axes of a batch and tokens over `axes`, `tensor` only where it divides them.

    Products take a stream's tokens whole over `tensor`, which splits their heads and hidden units. Norms and sums between them have no
    such side, so there tokens are split over `tensor` too: Korthikanti et al. 2022 (sequence parallelism).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if "tensor" in axes and x.shape[1] % math.prod(mesh.shape[axis] for axis in axes):
        axes = tuple(axis for axis in axes if axis != "tensor")
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, axes))


def as_multiplied(kernel: Float[Array, "K N"], name: str) -> Float[Array, "K N"]:
    """Within a program: the kernel of the layer `name`, gathered over `fsdp` and split over `tensor` as the table says.

    Said of every kernel, since a compiler that may choose moves activations to weights, and XLA's has chosen wrong sums.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*_split_sides(kernel, name)))


def as_product(out: Float[Array, "B L N"], kernel: Float[Array, "K N"], name: str) -> Float[Array, "B L N"]:
    """Within a program: what tokens times that kernel are, its features split over `tensor` where the kernel's are.

    Said for the way back: the gradient of it comes from tokens that are split over `tensor`, and must change sides before the product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1 or _split_sides(kernel, name)[-1] is None:
        return out
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(out, PartitionSpec(*[free] * (out.ndim - 1), "tensor"))


def _split_sides(kernel: Array, name: str) -> list[str | None]:
    """The axis `tensor` on the side of a layer's kernel that it splits."""
    size_of = jax.sharding.get_abstract_mesh().shape
    try:
        axes = rule_for(f"{name}/kernel", kernel.shape)
    except KeyError:  # a name that says nothing without its place
        axes = (None,) * kernel.ndim
    return ["tensor" if axis == "tensor" and size % size_of["tensor"] == 0 else None for axis, size in zip(axes, kernel.shape, strict=True)]


def gathered(params: Any) -> Any:
    """Within a program: the same parameters, whole on every device.

    For models whose activations outweigh them by far, such as the VAE: between rows split over `sequence` and channels split over
    `fsdp` a compiler would exchange activations instead.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), params)
