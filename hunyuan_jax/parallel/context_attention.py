"""Attention whose image tokens are split over the mesh's axis `sequence`, exactly that of one device.

    joint sequence   [image tokens, text tokens]; image tokens are split, text tokens are everywhere, and each key counts once
    ring             keys and values of the image travel around; a device meets one block at a time, merged by log-sum-exp
    heads            all-to-all: a device has all tokens of its share of the heads, then gives tokens back for heads
    both             all-to-all within groups of neighbours, a ring between the groups: more devices than there are heads for

The ring has its own backward pass, since a derivative of the forward one would keep every block: scores are made again from the saved
log-sum-exp, gradients of keys and values travel with these and are home when the ring closes. Batches stay split over `data` and
`fsdp`, heads over `tensor`. Liu et al. 2023 (ring attention), Jacobs et al. 2023 (Ulysses). Results and log-sum-exps bear the name
`SAVED`, for recomputation that keeps them.

Axis letters: B samples, L image tokens (padded to a multiple of the devices), S text tokens, H heads, d head width; M keys of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from hunyuan_jax.attention_kernels import SAVED, Backend, Kernel, Valid, kernel_for, merge
from hunyuan_jax.errors import UserError

AXIS = "sequence"
IMAGE, TEXT = P(("data", "fsdp"), AXIS, "tensor"), P(("data", "fsdp"), None, "tensor")
ROWS = P(("data", "fsdp"))

Method = Literal["ring", "heads"]


# --- On one device of the mesh -------------------------------------------------------------------------------------------------


class _Place:
    """Where a device stands: `degree` neighbours share heads, and as many groups as there are stand in a ring."""

    def __init__(self, degree: int) -> None:
        self.size: int = jax.lax.axis_size(AXIS)
        self.degree, self.hops = degree, self.size // degree
        rank = jax.lax.axis_index(AXIS)
        self.group, self.share = rank // degree, rank % degree
        self._groups = [list(range(start, start + degree)) for start in range(0, self.size, degree)]
        self._next = [(rank, (rank + degree) % self.size) for rank in range(self.size)]

    def tokens_for_heads(self, x: Float[Array, "B l H d"]) -> Float[Array, "B l2 h d"]:
        """All tokens of the group, of this device's share of the heads."""
        if self.degree == 1:
            return x
        return jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, axis_index_groups=self._groups, tiled=True)

    def heads_for_tokens(self, x: Float[Array, "B l2 h d"]) -> Float[Array, "B l H d"]:
        """The way back."""
        if self.degree == 1:
            return x
        return jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, axis_index_groups=self._groups, tiled=True)

    def pass_on(self, tree: Any) -> Any:
        """To the next group of the ring, and from the one before."""
        return jax.lax.ppermute(tree, AXIS, self._next)

    def valid(self, length: int, block: int, hop: Array | int) -> Valid:
        """Which keys are tokens and not padding, of the block that has come over `hop` groups; None for all."""
        if length == self.hops * block:
            return None
        owner = (self.group - hop) % self.hops
        return (owner * block + jnp.arange(block) < length)[None]

    def my_heads(self, x: Float[Array, "B S H ..."]) -> Float[Array, "B S h ..."]:
        heads = x.shape[2] // self.degree
        return jax.lax.dynamic_slice_in_dim(x, self.share * heads, heads, axis=2)

    def among_all(self, x: Float[Array, "B S h ..."], *, fill: float) -> Float[Array, "B S H ..."]:
        """This device's heads in their place, `fill` in that of the others'."""
        whole = jnp.full((*x.shape[:2], x.shape[2] * self.degree, *x.shape[3:]), fill, x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, x, self.share * x.shape[2], axis=2)


def _forward(q: Array, k: Array, v: Array, tq: Array, tk: Array, tv: Array, txt_lengths: Array, *, how: "How") -> Any:
    """Results of this device's image tokens, and of all text tokens; and what the way back needs."""
    place, attend = _Place(how.degree), how.kernel(v).attend
    q, k, v = (place.tokens_for_heads(x) for x in (q, k, v))
    my_tq, my_tk, my_tv = (place.my_heads(x) for x in (tq, tk, tv))
    block, txt_valid = k.shape[1], jnp.arange(tk.shape[1]) < txt_lengths[:, None]
    every = functools.partial(place.valid, how.length, block)

    def hop(carry: Any, number: Array) -> tuple[Any, None]:
        (k, v), state = carry
        coming = place.pass_on((k, v))  # while this block is met
        return (coming, merge(state, attend(q, k, v, every(number)))), None

    with_text, with_text_lse = attend(q, my_tk, my_tv, txt_valid)
    (last, state), _ = jax.lax.scan(hop, ((k, v), (with_text.astype(jnp.float32), with_text_lse)), jnp.arange(place.hops - 1))
    out, lse = merge(state, attend(q, last[0], last[1], every(place.hops - 1)))

    of_image = attend(my_tq, k, v, every(0))
    of_text = attend(my_tq, my_tk, my_tv, txt_valid & (place.group == 0))
    part, part_lse = merge(of_image, of_text)
    part_lse = place.among_all(part_lse, fill=-jnp.inf)
    peak = jnp.maximum(jax.lax.pmax(part_lse, AXIS), -1e30)
    share = jnp.exp(part_lse - peak)
    total = jax.lax.psum(share, AXIS)
    txt_out = jax.lax.psum(place.among_all(part, fill=0.0) * share[..., None], AXIS) / jnp.maximum(total, 1e-30)[..., None]
    txt_lse = peak + jnp.log(total)

    img_out = place.heads_for_tokens(out.astype(v.dtype))
    return (img_out, txt_out.astype(v.dtype)), (q, k, v, lse, txt_lse)


def _backward(q: Array, k: Array, v: Array, lse: Array, txt_lse: Array, *rest: Array, how: "How") -> tuple[Array, ...]:
    """Gradients of all six inputs; those of text are summed over the devices, each of which has met other keys or queries."""
    tq, tk, tv, txt_lengths, out, txt_out, slope, txt_slope = rest
    place, attend_backward = _Place(how.degree), how.kernel(v).attend_backward
    out, slope = (place.tokens_for_heads(x) for x in (out, slope))
    my_tq, my_tk, my_tv, my_txt_out, my_slope, my_lse = (place.my_heads(x) for x in (tq, tk, tv, txt_out, txt_slope, txt_lse))
    block, txt_valid = k.shape[1], jnp.arange(tk.shape[1]) < txt_lengths[:, None]
    every = functools.partial(place.valid, how.length, block)

    def hop(carry: Any, number: Array) -> tuple[Any, None]:
        (k, v), (dk, dv), dq = carry
        # Keys go ahead, and what others have found of their gradients follows one hop behind, as exact as keys are: both while this
        # block is met.
        coming, (dk, dv) = place.pass_on((k, v)), place.pass_on((dk, dv))
        more_dq, more_dk, more_dv = attend_backward(q, k, v, every(number), out, lse, slope)
        return (coming, like_keys(dk + more_dk, dv + more_dv), dq + more_dq), None

    like_keys = lambda *grads: tuple(x.astype(v.dtype) for x in grads)  # noqa: E731
    coming = place.pass_on((k, v)) if place.hops > 1 else (k, v)
    dq, *of_keys = attend_backward(q, k, v, every(0), out, lse, slope)
    (_, (dk, dv), dq), _ = jax.lax.scan(hop, (coming, like_keys(*of_keys), dq), jnp.arange(1, place.hops))
    if place.hops > 1:
        dk, dv = place.pass_on((dk, dv))  # home, while text is met

    of_image = attend_backward(my_tq, k, v, every(0), my_txt_out, my_lse, my_slope)
    with_text = attend_backward(q, my_tk, my_tv, txt_valid, out, lse, slope)
    of_text = attend_backward(my_tq, my_tk, my_tv, txt_valid & (place.group == 0), my_txt_out, my_lse, my_slope)
    dq, dk, dv = dq + with_text[0], dk + of_image[1], dv + of_image[2]
    dtq, dtk, dtv = of_image[0] + of_text[0], with_text[1] + of_text[1], with_text[2] + of_text[2]

    image = (place.heads_for_tokens(x.astype(v.dtype)) for x in (dq, dk, dv))
    text = (jax.lax.psum(place.among_all(x, fill=0.0), AXIS).astype(v.dtype) for x in (dtq, dtk, dtv))
    return (*image, *text)


# --- On the mesh ---------------------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """What is known of an attention before it runs: the number of image tokens, how many devices share heads, the kernel."""

    length: int
    degree: int = 1
    backend: Backend = "auto"

    def kernel(self, values: Array) -> Kernel:
        return kernel_for(self.backend, values.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: How, *arrays: Array) -> tuple[Array, Array]:
    return _attention_forward(how, *arrays)[0]


def _attention_forward(how: How, *arrays: Array) -> Any:
    # Where heads are shared, what is kept has all tokens of a group: laid along the axis all the same, in the order of devices.
    run = jax.shard_map(
        functools.partial(_forward, how=how),
        in_specs=(IMAGE,) * 3 + (TEXT,) * 3 + (ROWS,),
        out_specs=((IMAGE, TEXT), (IMAGE,) * 4 + (TEXT,)),
        check_vma=False,
    )
    results, (q, k, v, *sums) = run(*arrays)
    results, sums = checkpoint_name((results, sums), SAVED)
    return results, (q, k, v, *sums, *arrays[3:], *results)


def _attention_backward(how: How, kept: tuple[Array, ...], slopes: tuple[Array, Array]) -> tuple[Any, ...]:
    run = jax.shard_map(
        functools.partial(_backward, how=how),
        in_specs=(IMAGE,) * 4 + (TEXT,) * 4 + (ROWS, IMAGE, TEXT, IMAGE, TEXT),
        out_specs=(IMAGE,) * 3 + (TEXT,) * 3,
        check_vma=False,
    )
    return (*run(*kept, *slopes), None)


_attention.defvjp(_attention_forward, _attention_backward)


def context_attention(
    image: tuple[Array, Array, Array], text: tuple[Array, Array, Array], *, txt_lengths: Int[Array, " B"], how: How
) -> tuple[Float[Array, "B L H d"], Float[Array, "B S H d"]]:
    """Attention of image and text tokens over both, where the mesh splits image tokens; the results of each.

    `image` and `text` are queries, keys and values [B, L, H, d] and [B, S, H, d], where `sequence` divides L. As keys count the first
    `how.length` image tokens and the first `txt_lengths` text tokens of each sample. `how.degree` devices share heads by all-to-all, the
    rest is a ring: 1 is ring attention, the whole axis all-to-all alone. To be called under `jax.set_mesh`.
    """
    batch = image[0].shape[0]
    img, txt = _attention(how, *_filled(*image, *text, txt_lengths))
    return img[:batch], txt[:batch]


def on_every_device(attend: Callable[..., Array], q: Array, k: Array, v: Array, valid: Valid) -> Float[Array, "B L H d"]:
    """`attend(q, k, v, valid)` of [B, L, H, d] on each device's own samples and heads, as kernels need it that no compiler can split."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, valid)
    valid = jnp.ones((k.shape[0], k.shape[1]), bool) if valid is None else valid
    run = jax.shard_map(attend, in_specs=(TEXT, TEXT, TEXT, ROWS), out_specs=TEXT, check_vma=False)
    return run(*_filled(q, k, v, valid))[: q.shape[0]]


def _filled(*arrays: Array) -> list[Array]:
    """Samples filled up to a number that the axes of a batch divide."""
    mesh = jax.sharding.get_abstract_mesh()
    fill = -arrays[0].shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"])
    return [jnp.pad(x, ((0, fill), *((0, 0) for _ in x.shape[1:]))) for x in arrays]


def degree_of(method: Method, heads: int) -> int:
    """How many devices of the mesh share heads: one for "ring", and for "heads" as many as can.

    Raises `UserError` where `tensor` does not divide the heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size, tensor = mesh.shape[AXIS], mesh.shape["tensor"]
    if heads % tensor:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(f"mesh.tensor={tensor} does not divide the {heads} heads; set it to one of {', '.join(map(str, fitting))}.")
    return max(n for n in range(1, size + 1) if size % n == 0 and heads // tensor % n == 0) if method == "heads" else 1
