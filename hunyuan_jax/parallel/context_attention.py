"""Attention whose image tokens are split over the mesh's axis `sequence`, exactly that of one device.

    joint sequence   [image tokens, text tokens]; image tokens are split, text tokens are everywhere, and each key counts once
    ring             keys and values of the image travel around; a device meets one block at a time, merged by log-sum-exp
    heads            all-to-all: a device has all tokens of its share of the heads, then gives tokens back for heads; in turns, so that
                     the heads of one are exchanged while those of the other are met
    both             all-to-all within groups of neighbours, a ring between the groups: more devices than there are heads for

The ring has its own backward pass, since a derivative of the forward one would keep every block: scores are made again from the saved
log-sum-exp, gradients of keys and values travel with these and are home when the ring closes. Each exchange is made beside an attention
that does not need it, of other keys, other heads or the text, as a `_Stage`; but for the first of tokens for heads, which all wait for.
Batches stay split over `data` and `fsdp`, heads over `tensor`. Liu et al. 2023 (ring attention), Jacobs et al. 2023 (Ulysses). Results and
log-sum-exps bear the name `SAVED`, for recomputation that keeps them.

Axis letters: B samples, L image tokens (padded to a multiple of the devices), S text tokens, H heads, d head width; M keys of a block.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hunyuan_jax.attention_kernels import SAVED, Backend, Kernel, Run, Valid, alone, kernel_for, merge
from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.compiler_options import generation_of
from hunyuan_jax.parallel.mesh import SEQUENCE
from hunyuan_jax.parallel.sharding import spec

IMAGE, TEXT, SAMPLES = spec("samples", "image tokens", "heads"), spec("samples", "text tokens", "heads"), spec("samples")

Method = Literal["ring", "heads"]

MOST_TURNS = 2  # in which heads are exchanged, each while those of the other are met


# --- On one device of the mesh -------------------------------------------------------------------------------------------------


class _Exchange:
    """What is sent, how, and what is made of what comes: `brought`, once a stage has run."""

    def __init__(self, sent: Any, carry: Callable[[Any], Any], arrive: Callable[[Any], list[Array]]) -> None:
        self.sent, self.carry, self.arrive = sent, carry, arrive
        self.brought: list[Array] = []


class _Stage:
    """Exchanges, and attention that runs beside them.

    A compiler that finds other things to do beside an exchange does them, and attention later. So nothing here begins before the operands
    of all are there, and of what any of it brings nothing is made before all are done; where `close` these lines are drawn around the
    kernel instead of all that attention does. `idle` are lists of what is of use later: kept back likewise, in its place, lest something be
    made of it meanwhile.
    """

    def __init__(self, *exchanges: _Exchange, idle: Sequence[list[Any]] = (), close: bool = True, fenced: bool = True) -> None:
        self.exchanges, self.idle, self.close = exchanges, idle, close
        self._fence = jax.lax.optimization_barrier if fenced and jax.tree.leaves([x.sent for x in exchanges]) else lambda tree: tree

    def attend(self, function: Callable[..., Any], *operands: Any) -> Any:
        return function(*operands, run=self._run) if self.close else self._run(function, *operands)

    def _run(self, kernel: Callable[..., Any], *operands: Any) -> Any:
        sent, operands, idle = self._fence(([exchange.sent for exchange in self.exchanges], operands, tuple(self.idle)))
        come = [exchange.carry(x) for exchange, x in zip(self.exchanges, sent, strict=True)]
        come, results, idle = self._fence((come, kernel(*operands), idle))
        for exchange, x in zip(self.exchanges, come, strict=True):
            exchange.brought = exchange.arrive(x)
        for of_use, same in zip(self.idle, idle, strict=True):
            of_use[:] = same
        return results


def _nothing(arrays: Sequence[Array]) -> _Exchange:
    """Arrays that stay where they are."""
    return _Exchange((), lambda nothing: nothing, lambda _: list(arrays))


class _Place:
    """Where a device stands: `degree` neighbours share heads, and as many groups as there are stand in a ring.

    `length` is the number of image tokens over all, without padding.
    """

    def __init__(self, length: int, degree: int) -> None:
        self.size: int = jax.lax.axis_size(SEQUENCE)
        self.length, self.degree, self.hops = length, degree, self.size // degree
        rank = jax.lax.axis_index(SEQUENCE)
        self.group, self.share = rank // degree, rank % degree
        self._groups = [list(range(start, start + degree)) for start in range(0, self.size, degree)]
        self._next = [(rank, (rank + degree) % self.size) for rank in range(self.size)]

    def pass_on(self, *arrays: Array) -> _Exchange:
        """To the next group of the ring, and from the one before; where there is but one group they stay."""
        if self.hops == 1:
            return _nothing(arrays)
        return _Exchange(arrays, lambda arrays: jax.lax.ppermute(arrays, SEQUENCE, self._next), list)

    def tokens_for_heads(self, *arrays: Float[Array, "B l H d"]) -> _Exchange:
        """All tokens of the group, of this device's share of the heads."""
        return self._exchange(arrays, split_axis=2, concat_axis=1)

    def heads_for_tokens(self, *arrays: Float[Array, "B l2 h d"]) -> _Exchange:
        """The way back."""
        return self._exchange(arrays, split_axis=1, concat_axis=2)

    def _exchange(self, arrays: Sequence[Array], *, split_axis: int, concat_axis: int) -> _Exchange:
        """Of several arrays in one, as if they were samples: each exchange of its own would wait for the one before."""
        if self.degree == 1 or not arrays:
            return _nothing(arrays)
        parts = jnp.stack(jnp.split(jnp.concatenate(arrays), self.degree, split_axis))
        sent, carry, arrive = self._all_to_all(parts) if has_asynchronous_all_to_all() else self._permutes(parts)
        return _Exchange(sent, carry, lambda come: jnp.split(jnp.concatenate(list(arrive(come)), concat_axis), len(arrays)))

    def _all_to_all(self, parts: Array) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Array]]:
        carry = lambda parts: jax.lax.all_to_all(parts, SEQUENCE, 0, 0, axis_index_groups=self._groups, tiled=True)  # noqa: E731
        return parts, carry, lambda come: come

    def _permutes(self, parts: Array) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Array]]:
        """Each to the neighbour that stands so many further."""
        others = range(1, self.degree)
        pairs = [[(group[n], group[(n + away) % self.degree]) for group in self._groups for n in range(self.degree)] for away in others]
        sent = [jax.lax.dynamic_index_in_dim(parts, (self.share + away) % self.degree, keepdims=False) for away in others]

        def carry(sent: list[Array]) -> list[Array]:
            return [jax.lax.ppermute(x, SEQUENCE, to) for x, to in zip(sent, pairs, strict=True)]

        def arrive(come: list[Array]) -> Array:
            whole = parts
            for away, x in zip(others, come, strict=True):
                whole = jax.lax.dynamic_update_index_in_dim(whole, x, (self.share - away) % self.degree, 0)
            return whole

        return sent, carry, arrive

    def turns(self, *arrays: Float[Array, "B L H ..."]) -> list[list[Array]]:
        """The heads in parts as equal as can be that all who share them divide: one part is exchanged while another one is met."""
        heads = arrays[0].shape[2] // self.degree
        count = min(MOST_TURNS, heads) if self.degree > 1 else 1
        ends = [self.degree * (heads * n // count) for n in range(1, count)]
        return [list(parts) for parts in zip(*(jnp.split(x, ends, axis=2) for x in arrays), strict=True)]

    def valid(self, block: Float[Array, "B M H d"], hop: Array | int) -> Valid:
        """Which of the keys that have come over `hop` groups are tokens and not padding; None for all."""
        keys = block.shape[1]
        if self.length == self.hops * keys:
            return None
        owner = (self.group - hop) % self.hops
        return (owner * keys + jnp.arange(keys) < self.length)[None]

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
    place, attend, dtype = _Place(how.length, how.degree), how.kernel(v).attend, v.dtype
    txt_valid = jnp.arange(tk.shape[1]) < txt_lengths[:, None]
    texts = [[place.my_heads(x) for x in turn] for turn in place.turns(tq, tk, tv)]
    turns = place.turns(q, k, v)
    coming, leaving = place.tokens_for_heads(*turns.pop(0)), place.heads_for_tokens()
    _Stage(coming).attend(lambda run: run(lambda: None))  # the prologue, which no kernel can run beside
    kept: list[Any] = []
    lses: list[Array] = []
    images: list[Array] = []
    for number in range(len(texts)):
        (q, *keys), (_, tk, tv) = coming.brought, texts[number]
        with_text, with_text_lse = attend(q, tk, tv, txt_valid)
        kept.append((q, *keys))
        keys, state = _ring(place, attend, q, keys, [with_text.astype(jnp.float32), with_text_lse])
        coming = place.tokens_for_heads(*(turns.pop(0) if turns else ()))
        stage = _Stage(coming, leaving, idle=(texts, turns, kept, lses, images, state))
        out, lse = merge(state, stage.attend(attend, q, *keys, place.valid(keys[0], place.hops - 1)))
        images += leaving.brought
        lses.append(lse)
        leaving = place.heads_for_tokens(out.astype(dtype))
    parts: list[Any] = []
    for number in range(len(texts)):
        (_, k, v), (tq, tk, tv) = kept[number], texts[number]
        stage = _Stage(*(() if number else (leaving,)), idle=(texts, kept, lses, images))
        of_image = stage.attend(attend, tq, k, v, place.valid(k, 0))
        parts.append(merge(of_image, attend(tq, tk, tv, txt_valid & (place.group == 0))))
    images += leaving.brought
    txt_out, txt_lse = _merged(place, parts)
    return (_heads(images), txt_out.astype(dtype)), (kept, (lses, txt_lse))


def _ring(place: _Place, attend: Callable[..., Any], q: Array, keys: list[Array], state: list[Array]) -> tuple[list[Array], list[Array]]:
    """Queries meet the keys and values of all groups, merged into `state`, but for the last to come: these, and what is merged."""

    def hop(carry: Any, number: Array) -> tuple[Any, None]:
        (k, v), state = carry
        keys = place.pass_on(k, v)
        met = _Stage(keys, fenced=place.hops == 2).attend(attend, q, k, v, place.valid(k, number))
        return (keys.brought, list(merge(state, met))), None

    return jax.lax.scan(hop, (keys, state), jnp.arange(place.hops - 1))[0]


def _merged(place: _Place, parts: Sequence[tuple[Array, Array]]) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H"]]:
    """Results and log-sum-exps of text, of which each device has those by the keys it has met, of its heads in turns."""
    part_lse = _heads([place.among_all(lse, fill=-jnp.inf) for _, lse in parts])
    peak = jnp.maximum(jax.lax.pmax(part_lse, SEQUENCE), -1e30)
    share = jnp.exp(part_lse - peak)
    total = jax.lax.psum(share, SEQUENCE)
    part = _heads([place.among_all(part, fill=0.0) for part, _ in parts])
    return jax.lax.psum(part * share[..., None], SEQUENCE) / jnp.maximum(total, 1e-30)[..., None], peak + jnp.log(total)


def _backward(kept: Any, sums: Any, text: Any, txt_lengths: Array, results: Any, slopes: Any, *, how: "How") -> tuple[Array, ...]:
    """Gradients of all six inputs; those of text are summed over the devices, each of which has met other keys or queries."""
    (lses, txt_lse), dtype = sums, kept[0][2].dtype
    place, attend_backward = _Place(how.length, how.degree), how.kernel(kept[0][2]).attend_backward
    here = functools.partial(_backward_here, attend_backward)
    txt_valid = jnp.arange(text[1].shape[1]) < txt_lengths[:, None]
    texts = [[place.my_heads(x) for x in turn] for turn in place.turns(*text, results[1], txt_lse, slopes[1])]
    sides = place.turns(results[0], slopes[0])
    coming, leaving = place.tokens_for_heads(*sides.pop(0)), place.heads_for_tokens()
    by_text: list[Any] = []
    for number in range(len(texts)):
        (_, k, v), (tq, _, _, *side) = kept[number], texts[number]
        stage = _Stage(*(() if number else (coming,)), idle=(texts, sides, kept, lses, by_text))
        by_text.append(stage.attend(here, tq, k, v, place.valid(k, 0), *side))
    images: list[Any] = []
    of_text: list[Any] = []
    for number in range(len(texts)):
        (q, k, v), lse, (_, tk, tv, *_), (out, slope) = kept[number], lses[number], texts[number], coming.brought
        coming = place.tokens_for_heads(*(sides.pop(0) if sides else ()))
        idle = texts, sides, kept, lses, by_text, images, of_text
        turn = q, k, v, out, lse, slope
        dq, of_keys, of_text_keys = _ring_backward(place, attend_backward, turn, (tk, tv, txt_valid), (coming, leaving), idle)
        images.append(leaving.brought)
        dtq, more = by_text[number]
        leaving = place.heads_for_tokens(*_like(v, dq), *_plus(of_keys, more))
        of_text.append((dtq, *of_text_keys))
    for number in range(len(texts)):
        tq, tk, tv, *side = texts[number]
        stage = _Stage(*(() if number else (leaving,)), idle=(texts, images, of_text))
        among_text = stage.attend(attend_backward, tq, tk, tv, txt_valid & (place.group == 0), *side)
        of_text[number] = tuple(place.among_all(x, fill=0.0) for x in _plus(of_text[number], among_text))
    images.append(leaving.brought)
    whole = (jax.lax.psum(_heads(x), SEQUENCE).astype(dtype) for x in zip(*of_text, strict=True))
    return (*(_heads(x) for x in zip(*images[1:], strict=True)), *whole)


def _ring_backward(
    place: _Place,
    attend_backward: Callable[..., Any],
    turn: tuple[Array, ...],
    text: tuple[Array, Array, Valid],
    exchanges: Sequence[_Exchange],
    idle: Sequence[list[Any]],
) -> tuple[Array, Sequence[Array], Sequence[Array]]:
    """Gradients of a turn's queries through all keys, of the image's keys and values that stand here, and of the text's.

    `turn` is queries, keys, values, results, log-sum-exps and slopes, `text` keys, values and which are valid. `exchanges` are made beside
    the first kernel, `idle` is held back meanwhile.
    """
    q, k, v, *side = turn
    here = functools.partial(_backward_here, attend_backward)
    # With heads shared, lines are drawn closely, and the last hop, which sends no keys on, is no part of the loop. Without, arrays of all
    # heads are held, for which that takes too much memory, and there is less to do meanwhile.
    close = place.degree > 1
    looped = place.hops - 2 if close else place.hops - 1

    def hop(carry: Any, number: Array) -> tuple[Any, None]:
        # Keys go ahead, and what others have found of their gradients follows one hop behind.
        (k, v), of_keys, dq = carry
        keys, grads = place.pass_on(k, v), place.pass_on(*of_keys)
        stage = _Stage(keys, grads, fenced=looped == 1)
        more_dq, *more = stage.attend(attend_backward, q, k, v, place.valid(k, number), *side)
        return (keys.brought, _like(v, *_plus(grads.brought, more)), dq + more_dq), None

    keys = place.pass_on(k, v)
    dq, of_keys = _Stage(*exchanges, keys, idle=idle, close=close).attend(here, q, k, v, place.valid(k, 0), *side)
    so_far: list[Array] = []
    idle = *(exchange.brought for exchange in exchanges), *idle, so_far
    if place.hops > 1:
        (last, of_keys, dq), _ = jax.lax.scan(hop, (keys.brought, of_keys, dq), jnp.arange(1, looped + 1))
    if place.hops > 1 and close:
        grads, so_far[:] = place.pass_on(*of_keys), [dq]
        more_dq, more = _Stage(grads, idle=idle).attend(here, q, *last, place.valid(last[0], place.hops - 1), *side)
        dq, of_keys = so_far[0] + more_dq, _plus(grads.brought, more)
    grads, so_far[:] = place.pass_on(*of_keys), [dq]  # home
    more_dq, *of_text_keys = _Stage(grads, idle=idle, close=close).attend(attend_backward, q, *text, *side)
    return so_far[0] + more_dq, grads.brought, of_text_keys


def _backward_here(attend_backward: Callable[..., Any], q: Array, k: Array, v: Array, *more: Any, run: Run = alone) -> Any:
    """The gradient of queries, and those of the keys and values as exact as these are."""
    dq, *of_keys = attend_backward(q, k, v, *more, run=run)
    return dq, _like(v, *of_keys)


def _like(one: Array, *arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(one.dtype) for x in arrays)


def _plus(some: Sequence[Array], more: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(one + other for one, other in zip(some, more, strict=True))


# --- On the mesh ---------------------------------------------------------------------------------------------------------------


def has_asynchronous_all_to_all() -> bool:
    """Whether the compiler that is at work can run kernels beside an all-to-all. Ironwood's cannot, but beside permutes."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or generation_of(device.device_kind) != "tpu7x"


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
