"""Attention of some queries over some keys, and its gradients: the piece that devices and memory policies put together.

`attend` gives results with their log-sum-exp, so that parts over different keys can be merged; `attend_backward` gives gradients through
these keys alone, of queries whose log-sum-exp over all keys is known. Both have two kernels:

    reference    plain products, some queries at a time; any platform
    splash       JAX's Pallas kernels for TPUs, which never write scores to memory; elsewhere they are interpreted, for tests

Axis letters: B samples, L queries, M keys, H heads, d head width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

SAVED = "attention"  # the name of results and log-sum-exps, for recomputation that keeps them
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # the primitive of JAX's that has cuDNN's, which bear no name
BLOCK_SCORES = 2**21  # scores that the reference holds at a time

Backend = Literal["auto", "reference", "splash", "cudnn"]
Valid = Bool[Array, "B M"] | None  # which keys count; None for all
Run = Callable[..., Any]  # calls its first argument, a kernel, with the others, and perhaps does something meanwhile


class Kernel(NamedTuple):
    """`attend` and `attend_backward` of one kind; with `run=` they call nothing but their kernel by it."""

    attend: Callable[..., tuple[Array, Array]]
    attend_backward: Callable[..., tuple[Array, Array, Array]]


def alone(kernel: Callable[..., Any], *operands: Any) -> Any:
    """A `Run` that does nothing meanwhile."""
    return kernel(*operands)


def target_platform() -> str:
    """The platform that is compiled for, such as "tpu": that of the mesh, which need not be attached."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def backend_for(backend: Backend, dtype: Any) -> Backend:
    """What "auto" stands for: splash on TPUs, cuDNN on GPUs for 16-bit values, else the reference."""
    if backend != "auto":
        return backend
    platform = target_platform()
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 else "reference"


def kernel_for(backend: Backend, dtype: Any) -> Kernel:
    """The kernel whose parts can be merged. cuDNN's cannot: its place is taken by the reference."""
    return SPLASH if backend_for(backend, dtype) == "splash" else REFERENCE


def merge(one: Sequence[Array], other: Sequence[Array]) -> tuple[Array, Array]:
    """What attention over both sets of keys gives, of the results and log-sum-exps over each; results become float32."""
    (out, lse), (out2, lse2) = one, other
    joint = jnp.logaddexp(lse, lse2)
    share = [jnp.where(jnp.isfinite(joint), jnp.exp(part - joint), 0.0)[..., None] for part in (lse, lse2)]
    return out * share[0] + out2 * share[1], joint


# --- Reference -----------------------------------------------------------------------------------------------------------------


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
    return max(1, min(length, -(-batch * length * heads * k.shape[1] // BLOCK_SCORES)))


def _scores(q: Array, k: Array, valid: Valid) -> Float[Array, "B H L M"]:
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return scores if valid is None else jnp.where(valid[:, None, None, :], scores, -jnp.inf)


def attend(q: Float[Array, "B L H d"], k: Array, v: Array, valid: Valid, *, run: Run = alone) -> tuple[Array, Float[Array, "B L H"]]:
    """The mean of values by softmax over the valid keys, in float32, and the log of its denominator, -inf where no key is valid."""
    return run(_attend, q, k, v, valid)


def _attend(q: Array, k: Array, v: Array, valid: Valid) -> tuple[Array, Array]:
    def some(q: Array) -> tuple[Array, Array]:
        scores = _scores(q, k, valid)
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e30)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("bhlm,bmhd->blhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = jnp.moveaxis(total, 1, 2)
        return out / jnp.maximum(total, 1e-30)[..., None], jnp.moveaxis(peak[..., 0], 1, 2) + jnp.log(total)

    count = _num_blocks(q, k)
    if count == 1:
        return some(q)
    out, lse = jax.lax.map(some, _blocks(q, count))
    return _joined(out, q.shape[1]), _joined(lse, q.shape[1])


def attend_backward(
    q: Array, k: Array, v: Array, valid: Valid, out: Array, lse: Float[Array, "B L H"], slope: Array, *, run: Run = alone
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, in float32, through these keys alone.

    `out` and `lse` are the queries' results and log-sum-exps over all keys, `slope` the gradient of the results.
    """
    return run(_attend_backward, q, k, v, valid, out, lse, slope)


def _attend_backward(q: Array, k: Array, v: Array, valid: Valid, out: Array, lse: Array, slope: Array) -> tuple[Array, Array, Array]:
    delta = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

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
    (dk, dv), dq = jax.lax.scan(some, nothing, tuple(_blocks(x, _num_blocks(q, k)) for x in (q, lse, slope, delta)))
    return _joined(dq, q.shape[1]), dk, dv


# --- Splash --------------------------------------------------------------------------------------------------------------------

LANES = 128
# Tokens of a block, in queries and in keys; fewer tokens than the least are one block. Of these sizes the one that pads least is taken,
# the larger one of equals: a block of scores, in float32 and some more, must fit the 16 MiB of vector memory that a TPU's compiler gives
# a kernel unasked, and keys must come in equal parts of two to four lanes' widths.
BLOCKS = (1280, 1152, 1024, 768)
MOST_KEYS_AT_ONCE = 512
# The kernel of gradients leaves one for the queries by each block of keys; so many bytes of them are held at a time.
MOST_COPIES = 3 * 2**27
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def block_length(tokens: int) -> int:
    """Tokens of a block, a multiple of 128: what is padded is up to a multiple of it."""
    if tokens <= min(BLOCKS):
        return -(-tokens // LANES) * LANES
    return min(BLOCKS, key=lambda size: (-(-tokens // size) * size, -size))


def filled_up(tokens: int) -> int:
    """How many tokens the kernels see: whole blocks."""
    return tokens + -tokens % block_length(tokens)


def block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    """The blocks of both kernels, of padded numbers of queries and keys; one kernel makes all gradients, with two products fewer."""
    q, kv = block_length(queries), block_length(keys)
    at_once = max(size for size in range(LANES, MOST_KEYS_AT_ONCE + 1, LANES) if kv % size == 0)
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=at_once, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=True,
    )  # fmt: skip


class _Padded(NamedTuple):
    """Queries and keys as the kernels take them: heads before tokens, tokens in whole blocks; and which keys count, as segments."""

    q: Array
    k: Array
    v: Array
    segments: splash.SegmentIds | None

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, valid: Valid) -> "_Padded":
        keys = k.shape[1]
        scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        q, k, v = (_heads_first(x) for x in (scaled, k, v))
        if valid is None and k.shape[2] == keys:
            return cls(q, k, v, None)
        valid = jnp.ones((q.shape[0], keys), bool) if valid is None else jnp.broadcast_to(valid, (q.shape[0], keys))
        valid = jnp.pad(valid, ((0, 0), (0, k.shape[2] - keys)))
        return cls(q, k, v, splash.SegmentIds(q=jnp.ones((q.shape[0], q.shape[2]), jnp.int32), kv=valid.astype(jnp.int32)))

    @property
    def sizes(self) -> splash.BlockSizes:
        return block_sizes(self.q.shape[2], self.k.shape[2])

    def kernel(self) -> tuple[splash.SplashAttentionKernel, dict[str, Any]]:
        """The masks, which mask nothing, and the settings that both of splash's functions take."""
        heads, queries, keys = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        mask = splash_mask.MultiHeadMask([splash_mask.FullMask((queries, keys))] * heads)
        kernel = splash.make_splash_mha(
            mask, block_sizes=self.sizes, head_shards=1, q_seq_shards=1, mask_value=MASKED, interpret=target_platform() != "tpu"
        )
        return kernel, {name: value for name, value in kernel.kwargs.items() if name != "save_residuals"}

    def num_parts(self) -> int:
        """Into how many equal parts the keys are cut, whole blocks each, for the gradient of queries by each block to fit `MOST_COPIES`."""
        blocks = self.k.shape[2] // self.sizes.block_kv
        needed = min(blocks, -(-self.q.size * self.q.dtype.itemsize * blocks // MOST_COPIES))
        return next(parts for parts in range(needed, blocks + 1) if blocks % parts == 0)


def _heads_first(x: Float[Array, "B L H d"]) -> Float[Array, "B H L d"]:
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, filled_up(x.shape[1]) - x.shape[1]), (0, 0)))


def _tokens_first(x: Array, tokens: int) -> Array:
    return jnp.swapaxes(x, 1, 2)[:, :tokens]


def splash_attend(q: Array, k: Array, v: Array, valid: Valid, *, run: Run = alone) -> tuple[Array, Float[Array, "B L H"]]:
    """`attend` on a TPU; results have the dtype of q, and the log-sum-exp is about -1e38 where no key is valid."""
    padded, tokens = _Padded.of(q, k, v, valid), q.shape[1]
    kernel, settings = padded.kernel()

    def one(q: Array, k: Array, v: Array, segments: splash.SegmentIds | None) -> tuple[Array, Array]:
        mask = kernel.fwd_mask_info
        out, (lse,) = splash._splash_attention_forward(mask, q, k, v, segments, None, save_residuals=True, **settings)
        return out, lse

    out, lse = run(jax.vmap(one), *padded)
    return _tokens_first(out, tokens), jnp.swapaxes(lse, 1, 2)[:, :tokens]


def splash_attend_backward(
    q: Array, k: Array, v: Array, valid: Valid, out: Array, lse: Float[Array, "B L H"], slope: Array, *, run: Run = alone
) -> tuple[Array, Array, Array]:
    """`attend_backward` on a TPU."""
    padded, (queries, keys) = _Padded.of(q, k, v, valid), (q.shape[1], k.shape[1])
    # Queries that were added have weights of nothing: exp of scores below any log-sum-exp.
    more = padded.q.shape[2] - queries
    lse = jnp.pad(jnp.swapaxes(lse, 1, 2), ((0, 0), (0, 0), (0, more)), constant_values=math.inf)
    out, slope = _heads_first(out), _heads_first(slope)

    parts = padded.num_parts()

    def cut(x: Array, axis: int) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 0)

    def kernels(keys: Any, q: Array, segments: Array | None, *sides: Array) -> tuple[Array, tuple[Array, Array]]:
        def some(dq: Array, part: tuple[Array, Array, Array | None]) -> tuple[Array, tuple[Array, Array]]:
            k, v, ids = part
            segment_ids = None if ids is None else splash.SegmentIds(q=segments, kv=ids)  # type: ignore[arg-type]
            more_dq, *of_keys = _splash_gradients(_Padded(q, k, v, segment_ids), *sides)
            return dq + more_dq, (of_keys[0], of_keys[1])

        return jax.lax.scan(some, jnp.zeros(q.shape, jnp.float32), keys)

    of_queries, of_keys = (None, None) if padded.segments is None else (padded.segments.q, cut(padded.segments.kv, 1))
    dq, grads = run(kernels, (cut(padded.k, 2), cut(padded.v, 2), of_keys), padded.q, of_queries, out, lse, slope)
    dk, dv = (_tokens_first(jnp.moveaxis(x, 0, 2).reshape(padded.k.shape), keys).astype(jnp.float32) for x in grads)
    return _tokens_first(dq, queries) * q.shape[-1] ** -0.5, dk, dv


def _splash_gradients(padded: _Padded, out: Array, lse: Array, slope: Array) -> tuple[Array, ...]:
    kernel, settings = padded.kernel()

    def one(q: Array, k: Array, v: Array, segments: splash.SegmentIds | None, out: Array, lse: Array, slope: Array) -> tuple[Array, ...]:
        kept: Any = (q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(save_residuals=False, res=kept, do=slope, **settings)[3:6]

    return jax.vmap(one)(*padded, out, lse, slope)


@jax.custom_vjp
def splash_attention(q: Array, k: Array, v: Array, valid: Valid) -> Float[Array, "B L H d"]:
    """Attention over all valid keys, of the dtype of `v`; differentiable, where `SPLASH` is in parts."""
    return _splash_attention_forward(q, k, v, valid)[0]


def _splash_attention_forward(q: Array, k: Array, v: Array, valid: Valid) -> Any:
    out, lse = checkpoint_name(splash_attend(q, k, v, valid), SAVED)
    return out, (q, k, v, valid, out, lse)


def _splash_attention_backward(kept: Any, slope: Array) -> Any:
    q, k, v, valid, out, lse = kept
    return *(grad.astype(slope.dtype) for grad in splash_attend_backward(q, k, v, valid, out, lse, slope)), None


splash_attention.defvjp(_splash_attention_forward, _splash_attention_backward)

REFERENCE = Kernel(attend, attend_backward)
SPLASH = Kernel(splash_attend, splash_attend_backward)
