"""Attention whose image tokens are split over the mesh's axis `sequence`, exactly that of one device.

    joint sequence   [image tokens, text tokens]; image tokens are split, text tokens are everywhere, and each key counts once
    ring             keys and values of the image travel around; a device meets one block at a time, merged by log-sum-exp
    heads            all-to-all: a device has all tokens of its share of the heads, then gives tokens back for heads; in turns, so that
                     the heads of one are exchanged while those of the other are met
    both             all-to-all within groups of neighbours, a ring between the groups: more devices than there are heads for

The ring has its own backward pass, since a derivative of the forward one would keep every block: scores are made again from the saved
log-sum-exp, gradients of keys and values travel with these and are home when the ring closes. Batches stay split over `data` and
`fsdp`, heads over `tensor`. Liu et al. 2023 (ring attention), Jacobs et al. 2023 (Ulysses). Results and log-sum-exps bear the name
`SAVED`, for recomputation that keeps them.

Axis letters: B samples, L image tokens (padded to a multiple of the devices), S text tokens, H heads, d head width; M keys of a block.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hunyuan_jax.attention_kernels import SAVED, Backend, Kernel, Valid, kernel_for, merge
from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.mesh import SEQUENCE
from hunyuan_jax.parallel.sharding import spec

IMAGE, TEXT, SAMPLES = spec("samples", "image tokens", "heads"), spec("samples", "text tokens", "heads"), spec("samples")

Method = Literal["ring", "heads"]

MOST_TURNS = 2  # in which heads are exchanged, while those of the other are met: more would wait for each other


# --- On one device of the mesh -------------------------------------------------------------------------------------------------


class _Place:
    """Where a device stands: `degree` neighbours share heads, and as many groups as there are stand in a ring."""

    def __init__(self, degree: int) -> None:
        self.size: int = jax.lax.axis_size(SEQUENCE)
        self.degree, self.hops = degree, self.size // degree
        rank = jax.lax.axis_index(SEQUENCE)
        self.group, self.share = rank // degree, rank % degree
        self._groups = [list(range(start, start + degree)) for start in range(0, self.size, degree)]
        self._next = [(rank, (rank + degree) % self.size) for rank in range(self.size)]

    def tokens_for_heads(self, *arrays: Float[Array, "B l H d"]) -> tuple[Float[Array, "B l2 h d"], ...]:
        """All tokens of the group, of this device's share of the heads."""
        return self._exchange(arrays, split_axis=2, concat_axis=1)

    def heads_for_tokens(self, *arrays: Float[Array, "B l2 h d"]) -> tuple[Float[Array, "B l H d"], ...]:
        """The way back."""
        return self._exchange(arrays, split_axis=1, concat_axis=2)

    def _exchange(self, arrays: tuple[Array, ...], **axes: int) -> tuple[Array, ...]:
        """Of several arrays in one, as if they were samples: each exchange of its own would wait for the one before."""
        if self.degree == 1:
            return arrays
        whole = jnp.concatenate(arrays)
        whole = jax.lax.all_to_all(whole, SEQUENCE, axis_index_groups=self._groups, tiled=True, **axes)
        return tuple(jnp.split(whole, len(arrays)))

    def turns(self, *arrays: Float[Array, "B L H ..."]) -> list[list[Array]]:
        """The heads in parts as equal as can be that all who share them divide: one part is exchanged while another one is met."""
        heads = arrays[0].shape[2] // self.degree
        count = min(MOST_TURNS, heads) if self.degree > 1 else 1
        ends = [self.degree * (heads * n // count) for n in range(1, count)]
        return [list(parts) for parts in zip(*(jnp.split(x, ends, axis=2) for x in arrays), strict=True)]

    def pass_on(self, tree: Any) -> Any:
        """To the next group of the ring, and from the one before."""
        return jax.lax.ppermute(tree, SEQUENCE, self._next)

    def after(self, tree: Any, before: Any) -> Any:
        """Both as they are; in a ring nothing is made of `tree` until `before` is there, lest two turns' rings get in each other's way."""
        return jax.lax.optimization_barrier((tree, before)) if self.hops > 1 else (tree, before)

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


def _heads(parts: Sequence[Array]) -> Array:
    return jnp.concatenate(parts, axis=2)


def _forward(q: Array, k: Array, v: Array, tq: Array, tk: Array, tv: Array, txt_lengths: Array, *, how: "How") -> Any:
    """Results of this device's image tokens, and of all text tokens; and what the way back needs."""
    place, attend = _Place(how.degree), how.kernel(v).attend
    text = [[place.my_heads(x) for x in turn] for turn in place.turns(tq, tk, tv)]
    txt_valid = jnp.arange(tk.shape[1]) < txt_lengths[:, None]
    images: list[Any] = []
    kept: list[Any] = []
    lses: list[Any] = []
    parts: list[Any] = []
    for image, (_, tk, tv) in zip(place.turns(q, k, v), text, strict=True):
        q, k, v = place.tokens_for_heads(*image)
        if kept:
            (q, k, v), lses[-1] = place.after((q, k, v), lses[-1])
        every = functools.partial(place.valid, how.length, k.shape[1])

        def hop(carry: Any, number: Array) -> tuple[Any, None]:
            (k, v), state = carry
            coming = place.pass_on((k, v))  # while this block is met
            return (coming, merge(state, attend(q, k, v, every(number)))), None  # noqa: B023

        with_text, with_text_lse = attend(q, tk, tv, txt_valid)
        (last, state), _ = jax.lax.scan(hop, ((k, v), (with_text.astype(jnp.float32), with_text_lse)), jnp.arange(place.hops - 1))
        out, lse = merge(state, attend(q, last[0], last[1], every(place.hops - 1)))
        images += place.heads_for_tokens(out.astype(v.dtype))
        kept.append((q, k, v))
        lses.append(lse)
    for (_, k, v), (tq, tk, tv) in zip(kept, text, strict=True):
        every = functools.partial(place.valid, how.length, k.shape[1])
        of_image = attend(tq, k, v, every(0))
        of_text = attend(tq, tk, tv, txt_valid & (place.group == 0))
        parts.append(merge(of_image, of_text))

    part_lse = _heads([place.among_all(lse, fill=-jnp.inf) for _, lse in parts])
    peak = jnp.maximum(jax.lax.pmax(part_lse, SEQUENCE), -1e30)
    share = jnp.exp(part_lse - peak)
    total = jax.lax.psum(share, SEQUENCE)
    part = _heads([place.among_all(part, fill=0.0) for part, _ in parts])
    txt_out = jax.lax.psum(part * share[..., None], SEQUENCE) / jnp.maximum(total, 1e-30)[..., None]
    txt_lse = peak + jnp.log(total)
    return (_heads(images), txt_out.astype(v.dtype)), (kept, (lses, txt_lse))


def _backward(kept: Any, sums: Any, text: Any, txt_lengths: Array, results: Any, slopes: Any, *, how: "How") -> tuple[Array, ...]:
    """Gradients of all six inputs; those of text are summed over the devices, each of which has met other keys or queries."""
    (lses, txt_lse), dtype = sums, kept[0][2].dtype
    place, attend_backward = _Place(how.degree), how.kernel(kept[0][2]).attend_backward
    of_text_queries = [[place.my_heads(x) for x in turn] for turn in place.turns(*text, txt_lse, results[1], slopes[1])]
    txt_valid = jnp.arange(text[1].shape[1]) < txt_lengths[:, None]
    image: list[Any] = []
    of_text: list[Any] = []
    like_keys = lambda *grads: tuple(x.astype(dtype) for x in grads)  # noqa: E731
    turns = zip(kept, lses, of_text_queries, place.turns(results[0], slopes[0]), strict=True)
    for (q, k, v), lse, (tq, tk, tv, txt_lse, txt_out, txt_slope), sides in turns:
        out, slope = place.tokens_for_heads(*sides)
        if of_text:
            (out, slope), of_text[-1] = place.after((out, slope), of_text[-1])
        every = functools.partial(place.valid, how.length, k.shape[1])

        def hop(carry: Any, number: Array) -> tuple[Any, None]:
            (k, v), (dk, dv), dq = carry
            # Keys go ahead, and what others have found of their gradients follows one hop behind, as exact as keys are: both while
            # this block is met.
            coming, (dk, dv) = place.pass_on((k, v)), place.pass_on((dk, dv))
            more_dq, more_dk, more_dv = attend_backward(q, k, v, every(number), out, lse, slope)  # noqa: B023
            return (coming, like_keys(dk + more_dk, dv + more_dv), dq + more_dq), None

        with_text = attend_backward(q, tk, tv, txt_valid, out, lse, slope)
        coming = place.pass_on((k, v)) if place.hops > 1 else (k, v)
        dq, *of_keys = attend_backward(q, k, v, every(0), out, lse, slope)
        (_, (dk, dv), dq), _ = jax.lax.scan(hop, (coming, like_keys(*of_keys), dq), jnp.arange(1, place.hops))
        if place.hops > 1:
            dk, dv = place.pass_on((dk, dv))  # home, while text is met
        of_image = attend_backward(tq, k, v, every(0), txt_out, txt_lse, txt_slope)
        image.append(place.heads_for_tokens(*like_keys(dq + with_text[0], dk + of_image[1], dv + of_image[2])))
        of_text.append((of_image[0], with_text[1], with_text[2]))
    for n, (tq, tk, tv, txt_lse, txt_out, txt_slope) in enumerate(of_text_queries):
        among_text = attend_backward(tq, tk, tv, txt_valid & (place.group == 0), txt_out, txt_lse, txt_slope)
        of_text[n] = tuple(place.among_all(one + other, fill=0.0) for one, other in zip(of_text[n], among_text, strict=True))
    whole = (jax.lax.psum(_heads(x), SEQUENCE).astype(dtype) for x in zip(*of_text, strict=True))
    return (*(_heads(x) for x in zip(*image, strict=True)), *whole)


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
        in_specs=(IMAGE,) * 3 + (TEXT,) * 3 + (SAMPLES,),
        out_specs=((IMAGE, TEXT), (IMAGE, (IMAGE, TEXT))),
        check_vma=False,
    )
    results, (kept, sums) = run(*arrays)
    results, sums = checkpoint_name((results, sums), SAVED)
    return results, (kept, sums, arrays[3:6], arrays[6], results)


def _attention_backward(how: How, kept: Any, slopes: tuple[Array, Array]) -> tuple[Any, ...]:
    run: Callable[..., Any] = jax.shard_map(
        functools.partial(_backward, how=how),
        in_specs=(IMAGE, (IMAGE, TEXT), TEXT, SAMPLES, (IMAGE, TEXT), (IMAGE, TEXT)),
        out_specs=(IMAGE,) * 3 + (TEXT,) * 3,
        check_vma=False,
    )
    return (*run(*kept, slopes), None)


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
    run = jax.shard_map(attend, in_specs=(TEXT, TEXT, TEXT, SAMPLES), out_specs=TEXT, check_vma=False)
    return run(*_filled(q, k, v, valid))[: q.shape[0]]


def _filled(*arrays: Array) -> list[Array]:
    """Samples filled up to a number that the axes of a batch divide."""
    mesh = jax.sharding.get_abstract_mesh()
    fill = -arrays[0].shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"])
    return [jnp.pad(x, ((0, fill), *((0, 0) for _ in x.shape[1:]))) for x in arrays]


def degree_of(method: Method, heads: int, mesh: Mapping[str, int], *, wanted: int = 0) -> int:
    """How many devices share heads on a mesh of these sizes: one for "ring", and for "heads" those `wanted`, or with 0 as many as can.

    Raises `UserError` where `tensor` does not divide the heads, and where no devices can share them, or not as many as wanted.
    """
    size, tensor = mesh[SEQUENCE], mesh["tensor"]
    if heads % tensor:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(f"mesh.tensor={tensor} does not divide the {heads} heads; set it to one of {', '.join(map(str, fitting))}.")
    fitting = [n for n in range(1, size + 1) if size % n == 0 and heads // tensor % n == 0]
    if method == "ring" or size == 1:
        return 1
    if fitting == [1]:
        raise UserError(
            f"model.context='heads': no two of the mesh.sequence={size} devices can share {heads // tensor} heads, since no number "
            f"divides both; set model.context to 'ring', or mesh.sequence to a multiple of a divisor of {heads // tensor}."
        )
    if wanted and wanted not in fitting:
        raise UserError(
            f"model.context_degree={wanted} must divide mesh.sequence={size} and {heads // tensor} heads ({heads} over mesh.tensor="
            f"{tensor}); the nearest that does is {min(fitting, key=lambda n: abs(n - wanted))}, and a ring joins what is left."
        )
    return wanted or fitting[-1]
