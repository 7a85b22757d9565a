"""Attention whose image tokens are split over the mesh's axis `sequence`, exactly that of one device.

    joint sequence   [image tokens, text tokens]; image tokens are split, text tokens are everywhere, and each key counts once
    ring             keys and values of the image travel around; a device meets one block at a time, merged by log-sum-exp
    heads            all-to-all: a device has all tokens of its share of the heads, then gives tokens back for heads
    both             all-to-all within groups of neighbours, a ring between the groups: more devices than there are heads for

The ring has its own backward pass, since a derivative of the forward one would keep every block: scores are made again from the saved
log-sum-exp, gradients of keys and values travel with these and are home when the ring closes. Batches stay split over `data` and
`fsdp`, heads over `tensor`. Liu et al. 2023 (ring attention), Jacobs et al. 2023 (Ulysses).

Axis letters: B samples, L image tokens (padded to a multiple of the devices), S text tokens, H heads, d head width; M keys of a block.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from hunyuan_jax.errors import UserError

AXIS = "sequence"
IMAGE, TEXT = P(("data", "fsdp"), AXIS, "tensor"), P(("data", "fsdp"), None, "tensor")
ROWS = P(("data", "fsdp"))
BLOCK_SCORES = 2**21  # scores that are held at a time

Method = Literal["ring", "heads"]


# --- One block of queries and keys ---------------------------------------------------------------------------------------------


def _blocks(x: Array, count: int) -> Array:
    """Queries [B, L, ...] in `count` blocks [count, B, l, ...], the last one filled up with zeros."""
    batch, length, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % count), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x.reshape(batch, count, -1, *rest), 1, 0)


def _joined(x: Array, length: int) -> Array:
    count, batch, block, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * block, *rest)[:, :length]


def _num_blocks(q: Array, k: Array) -> int:
    batch, length, heads, _ = q.shape
    return min(length, -(-batch * length * heads * k.shape[1] // BLOCK_SCORES))


def _scores(q: Array, k: Array, valid: Bool[Array, "B M"]) -> Float[Array, "B H L M"]:
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(valid[:, None, None, :], scores, -jnp.inf)


def attend(q: Float[Array, "B L H d"], k: Array, v: Array, valid: Bool[Array, "B M"]) -> tuple[Array, Float[Array, "B L H"]]:
    """The mean of values by softmax over the valid keys, in float32, and the log of its denominator, -inf where no key is valid."""

    def some(q: Array) -> tuple[Array, Array]:
        scores = _scores(q, k, valid)
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e30)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("bhlm,bmhd->blhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = jnp.moveaxis(total, 1, 2)
        return out / jnp.maximum(total, 1e-30)[..., None], jnp.moveaxis(peak[..., 0], 1, 2) + jnp.log(total)

    count = _num_blocks(q, k)
    if count <= 1:
        return some(q)
    out, lse = jax.lax.map(some, _blocks(q, count))
    return _joined(out, q.shape[1]), _joined(lse, q.shape[1])


def attend_backward(
    q: Array, k: Array, v: Array, valid: Bool[Array, "B M"], lse: Float[Array, "B L H"], slope: Array, delta: Float[Array, "B L H"]
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, in float32, through these keys alone, of queries whose softmax over all keys has the given `lse`.

    `slope` is the gradient of the queries' results, `delta` its product with them, summed over d.
    """

    def some(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        dk, dv = carry
        q, lse, slope, delta = xs
        weights = jnp.exp(_scores(q, k, valid) - jnp.moveaxis(jnp.maximum(lse, -1e30), 1, 2)[..., None])
        dv += jnp.einsum("bhlm,blhd->bmhd", weights.astype(slope.dtype), slope, preferred_element_type=jnp.float32)
        inner = jnp.einsum("blhd,bmhd->bhlm", slope, v, preferred_element_type=jnp.float32)
        dscores = weights * (inner - jnp.moveaxis(delta, 1, 2)[..., None]) * q.shape[-1] ** -0.5
        dk += jnp.einsum("bhlm,blhd->bmhd", dscores.astype(q.dtype), q, preferred_element_type=jnp.float32)
        return (dk, dv), jnp.einsum("bhlm,bmhd->blhd", dscores.astype(k.dtype), k, preferred_element_type=jnp.float32)

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    count = max(1, _num_blocks(q, k))
    (dk, dv), dq = jax.lax.scan(some, nothing, tuple(_blocks(x, count) for x in (q, lse, slope, delta)))
    return _joined(dq, q.shape[1]), dk, dv


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """What attention over both sets of keys gives, of the results and log-sum-exps over each."""
    (out, lse), (out2, lse2) = one, other
    joint = jnp.logaddexp(lse, lse2)
    share = [jnp.where(jnp.isfinite(joint), jnp.exp(part - joint), 0.0)[..., None] for part in (lse, lse2)]
    return out * share[0] + out2 * share[1], joint


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

    def valid(self, length: int, block: int, hop: Array | int) -> Bool[Array, "1 M"]:
        """Which keys are tokens and not padding, of the block that has come over `hop` groups."""
        owner = (self.group - hop) % self.hops
        return (owner * block + jnp.arange(block) < length)[None]

    def my_heads(self, x: Float[Array, "B S H ..."]) -> Float[Array, "B S h ..."]:
        heads = x.shape[2] // self.degree
        return jax.lax.dynamic_slice_in_dim(x, self.share * heads, heads, axis=2)

    def among_all(self, x: Float[Array, "B S h ..."], *, fill: float) -> Float[Array, "B S H ..."]:
        """This device's heads in their place, `fill` in that of the others'."""
        whole = jnp.full((*x.shape[:2], x.shape[2] * self.degree, *x.shape[3:]), fill, x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, x, self.share * x.shape[2], axis=2)


def _forward(q: Array, k: Array, v: Array, tq: Array, tk: Array, tv: Array, txt_lengths: Array, *, length: int, degree: int) -> Any:
    """Results and log-sum-exps of this device's image tokens, and of all text tokens; and what the way back needs."""
    place = _Place(degree)
    q, k, v = (place.tokens_for_heads(x) for x in (q, k, v))
    my_tq, my_tk, my_tv = (place.my_heads(x) for x in (tq, tk, tv))
    block, txt_valid = k.shape[1], jnp.arange(tk.shape[1]) < txt_lengths[:, None]
    every = functools.partial(place.valid, length, block)

    def hop(carry: Any, number: Array) -> tuple[Any, None]:
        (k, v), state = carry
        coming = place.pass_on((k, v))  # while this block is met
        return (coming, merge(state, attend(q, k, v, every(number)))), None

    text = attend(q, my_tk, my_tv, txt_valid)
    (last, state), _ = jax.lax.scan(hop, ((k, v), text), jnp.arange(place.hops - 1))
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
    return (img_out, txt_out.astype(v.dtype)), (q, k, v, out.astype(v.dtype), lse, txt_lse)


def _backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, txt_lse: Array, *rest: Array, length: int, degree: int
) -> tuple[Array, ...]:
    """Gradients of all six inputs; those of text are summed over the devices, each of which has met other keys or queries."""
    tq, tk, tv, txt_out, txt_lengths, slope, txt_slope = rest
    place = _Place(degree)
    slope = place.tokens_for_heads(slope)
    my_tq, my_tk, my_tv, my_slope = (place.my_heads(x) for x in (tq, tk, tv, txt_slope))
    block, txt_valid = k.shape[1], jnp.arange(tk.shape[1]) < txt_lengths[:, None]
    every = functools.partial(place.valid, length, block)
    delta = _delta(slope, out)
    my_delta, my_lse = place.my_heads(_delta(txt_slope, txt_out)), place.my_heads(txt_lse)

    dq, dtk, dtv = attend_backward(q, my_tk, my_tv, txt_valid, lse, slope, delta)
    dtq, dk, dv = attend_backward(my_tq, k, v, every(0), my_lse, my_slope, my_delta)
    first = txt_valid & (place.group == 0)
    more = attend_backward(my_tq, my_tk, my_tv, first, my_lse, my_slope, my_delta)
    dtq, dtk, dtv = (a + b for a, b in zip((dtq, dtk, dtv), more, strict=True))

    def hop(carry: Any, number: Array) -> tuple[Any, None]:
        (k, v), (dk, dv), dq = carry
        coming = place.pass_on((k, v))
        more_dq, more_dk, more_dv = attend_backward(q, k, v, every(number), lse, slope, delta)
        return (coming, place.pass_on((dk + more_dk, dv + more_dv)), dq + more_dq), None

    # After as many hops as there are groups, keys and their gradients are home.
    (_, (dk, dv), dq), _ = jax.lax.scan(hop, ((k, v), (dk, dv), dq), jnp.arange(place.hops))
    image = (place.heads_for_tokens(x.astype(v.dtype)) for x in (dq, dk, dv))
    text = (jax.lax.psum(place.among_all(x, fill=0.0), AXIS).astype(v.dtype) for x in (dtq, dtk, dtv))
    return (*image, *text)


def _delta(slope: Array, out: Array) -> Float[Array, "B L H"]:
    return jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


# --- On the mesh ---------------------------------------------------------------------------------------------------------------

_LSE_IMAGE, _LSE_TEXT = P(("data", "fsdp"), AXIS, "tensor"), P(("data", "fsdp"), None, "tensor")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(length: int, degree: int, *arrays: Array) -> tuple[Array, Array]:
    return _attention_forward(length, degree, *arrays)[0]


def _attention_forward(length: int, degree: int, *arrays: Array) -> Any:
    # Where heads are shared, what is kept has all tokens of a group: laid along the axis all the same, in the order of devices.
    kept = (IMAGE,) * 4 + (_LSE_IMAGE, _LSE_TEXT)
    run = jax.shard_map(
        functools.partial(_forward, length=length, degree=degree),
        in_specs=(IMAGE,) * 3 + (TEXT,) * 3 + (ROWS,),
        out_specs=((IMAGE, TEXT), kept),
        check_vma=False,
    )
    (img, txt), kept_arrays = run(*arrays)
    return (img, txt), (*kept_arrays, *arrays[3:6], txt, arrays[6])


def _attention_backward(length: int, degree: int, kept: tuple[Array, ...], slopes: tuple[Array, Array]) -> tuple[Any, ...]:
    run = jax.shard_map(
        functools.partial(_backward, length=length, degree=degree),
        in_specs=(IMAGE,) * 4 + (_LSE_IMAGE, _LSE_TEXT) + (TEXT,) * 4 + (ROWS, IMAGE, TEXT),
        out_specs=(IMAGE,) * 3 + (TEXT,) * 3,
        check_vma=False,
    )
    return (*run(*kept, *slopes), None)


_attention.defvjp(_attention_forward, _attention_backward)


def context_attention(
    image: tuple[Array, Array, Array], text: tuple[Array, Array, Array], *, txt_lengths: Int[Array, " B"], length: int, degree: int
) -> tuple[Float[Array, "B L H d"], Float[Array, "B S H d"]]:
    """Attention of image and text tokens over both, where the mesh splits image tokens; the results of each.

    `image` and `text` are queries, keys and values [B, L, H, d] and [B, S, H, d], where `sequence` divides L. As keys count the first
    `length` image tokens and the first `txt_lengths` text tokens of each sample. `degree` devices share heads by all-to-all, the rest
    is a ring: 1 is ring attention, the whole axis all-to-all alone. To be called under `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch = image[0].shape[0]
    # Samples that the axes of a batch do not divide are filled up.
    fill = -batch % (mesh.shape["data"] * mesh.shape["fsdp"])
    arrays = [jnp.pad(x, ((0, fill), *((0, 0) for _ in x.shape[1:]))) for x in (*image, *text, txt_lengths)]
    img, txt = _attention(length, degree, *arrays)
    return img[:batch], txt[:batch]


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
