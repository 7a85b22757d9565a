"""Frames whose rows are split over the mesh's axis `sequence`: what a device does with its own rows, and what of others' it is sent.

    convolutions   neighbours send each other the rows at their borders, forward and, with gradients, backward
    attention      queries stay, keys and values are gathered from all rows

A compiler that is left to split these exchanges whole frames instead: the gradient of a repeated edge, a frame that is empty but for one
row, travels as it is; after upsampling all rows are gathered on every device; scores are summed block by block.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from hunyuan_jax.parallel.mesh import SEQUENCE
from hunyuan_jax.parallel.sharding import BATCH_AXES, spec

OWN_ROWS = spec("samples", "frames", "rows")
Edges = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def convolve_with_edges(
    convolve: Callable[[Array, Array], Array], x: Float[Array, "B T H W C"], kernel: Float[Array, "t h w C D"], *, edges: Edges, stride: int
) -> Float[Array, "B T2 H2 W2 D"]:
    """`convolve(x, kernel)`, without padding of its own, of x with its edges repeated.

    `edges` says how often the first and the last frame, row and column are, `stride` how many rows a step of the convolution is. On a mesh
    every device convolves its own rows of its own samples, where these divide and are whole steps and enough for its neighbours; else the
    compiler splits what it can.
    """
    of_frames, of_rows, of_columns = edges
    own = _own_rows(x)
    if own is None or own % stride or own < max(of_rows):
        return convolve(_repeat(x, of_frames, of_rows, of_columns), kernel)

    def on_one(x: Float[Array, "b T h W C"], kernel: Float[Array, "t h w C D"]) -> Float[Array, "b T2 h2 W2 D"]:
        return convolve(_repeat(_with_neighbours(x, of_rows), of_frames, (0, 0), of_columns), kernel)

    return jax.shard_map(on_one, in_specs=(OWN_ROWS, P()), out_specs=OWN_ROWS)(x, kernel)


def among_all_rows(
    attend: Callable[..., Array], q: Float[Array, "B T H W C"], k: Float[Array, "B T H W C"], v: Float[Array, "B T H W C"]
) -> Float[Array, "B T H W C"]:
    """`attend(q, k, v)`, on a mesh with a device's own rows of q, and all rows of k and v."""
    if _own_rows(q) is None:
        return attend(q, k, v)

    def on_one(q: Float[Array, "b T h W C"], *kv: Float[Array, "b T h W C"]) -> Float[Array, "b T h W C"]:
        return attend(q, *(jax.lax.all_gather(x, SEQUENCE, axis=2, tiled=True) for x in kv))

    return jax.shard_map(on_one, in_specs=(OWN_ROWS,) * 3, out_specs=OWN_ROWS, check_vma=False)(q, k, v)


def _own_rows(x: Float[Array, "B T H W C"]) -> int | None:
    """How many rows each device has; None without a mesh, and where samples or rows do not divide by it."""
    mesh = jax.sharding.get_abstract_mesh()
    samples, parts = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES), mesh.shape.get(SEQUENCE, 1)
    return None if samples * parts == 1 or len(x) % samples or x.shape[2] % parts else x.shape[2] // parts


def _repeat(x: Array, *edges: tuple[int, int]) -> Array:
    return jnp.pad(x, ((0, 0), *edges, (0, 0)), mode="edge")


def _with_neighbours(x: Float[Array, "b T h W C"], edges: tuple[int, int]) -> Float[Array, "b T h2 W C"]:
    """A device's rows, after the last ones of the device before and before the first ones of the next; at the ends, repeated ones."""
    if jax.lax.axis_size(SEQUENCE) == 1:
        return _repeat(x, (0, 0), edges, (0, 0))
    before, after = edges
    size, here = jax.lax.axis_size(SEQUENCE), jax.lax.axis_index(SEQUENCE)
    down = [(rank, rank + 1) for rank in range(size - 1)]
    up = [(to, rank) for rank, to in down]
    parts = [x]
    if before:
        theirs = jax.lax.ppermute(x[:, :, -before:], SEQUENCE, down)
        parts.insert(0, jnp.where(here == 0, jnp.repeat(x[:, :, :1], before, axis=2), theirs))
    if after:
        theirs = jax.lax.ppermute(x[:, :, :after], SEQUENCE, up)
        parts.append(jnp.where(here == size - 1, jnp.repeat(x[:, :, -1:], after, axis=2), theirs))
    return jnp.concatenate(parts, axis=2)
