"""Attention over tokens of which a prefix is valid, no token apart from others: one function, behind which kernels may differ.

The joint sequence of the model is [image tokens, text tokens] with the valid text first, so one number per sample, the count
of valid keys, says all there is to say about masking; no dense mask ever exists outside the reference backend.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from hunyuan_jax.attention_kernels import SAVED, Backend, backend_for, splash_attention
from hunyuan_jax.parallel.context_attention import on_every_device

# Finite, so that a sample without any valid key gives finite values (which nobody reads) instead of NaN; its exponential is 0.
MASKED_SCORE = -1e30
# Queries are taken in blocks, of at least so many, whose scores are about so many numbers: what a cache holds, and no more memory.
LEAST_BLOCK, BLOCK_SCORES = 256, 2**21


def attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B M H d"],
    v: Float[Array, "B M H d"],
    *,
    kv_lengths: Int[Array, " B"] | None = None,
    backend: Backend = "reference",
) -> Float[Array, "B L H d"]:
    """Softmax attention with scale 1/sqrt(d) over the first `kv_lengths` keys of each sample (all of them where None).

    Keys past the length contribute exactly nothing. Scores and softmax are float32; the result has the dtype of `v`, and the name
    `SAVED` for recomputation that keeps it, but for cuDNN's, known by its primitive `CUDNN_FORWARD`. On a mesh, samples and heads may be
    split, and tokens are not.
    """
    backend = backend_for(backend, v.dtype)
    if backend == "splash":
        return on_every_device(splash_attention, q, k, v, None if kv_lengths is None else jnp.arange(k.shape[1]) < kv_lengths[:, None])
    if backend == "cudnn":
        return _cudnn(q, k, v, kv_lengths)
    return checkpoint_name(_reference(q, k, v, kv_lengths), SAVED)


def _cudnn(q: Float[Array, "B L H d"], k: Array, v: Array, kv_lengths: Int[Array, " B"] | None) -> Float[Array, "B L H d"]:
    """Its gradients take even numbers of queries and keys: JAX refuses odd ones, so that one more of each is there and does not count."""
    length, keys = q.shape[1], k.shape[1]
    if keys % 2 and kv_lengths is None:
        kv_lengths = jnp.full(len(k), keys, jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=kv_lengths, implementation="cudnn")[:, :length]


def _reference(q: Array, k: Array, v: Array, kv_lengths: Int[Array, " B"] | None) -> Float[Array, "B L H d"]:
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    valid = None if kv_lengths is None else jnp.arange(k.shape[2]) < kv_lengths[:, None]
    num_blocks = -(-q.shape[2] // max(LEAST_BLOCK, BLOCK_SCORES // math.prod(k.shape[:3])))
    if num_blocks == 1:
        out = attend(q, k, v, valid)
    else:
        # The scan keeps one block of scores at a time, and the checkpoint none for the backward pass.
        length = q.shape[2]
        q = jnp.pad(q, ((0, 0), (0, 0), (0, -length % num_blocks), (0, 0)))
        blocks = rearrange(q, "b h (n l) d -> n b h l d", n=num_blocks)
        out = jax.lax.map(jax.checkpoint(lambda block: attend(block, k, v, valid), prevent_cse=False), blocks)
        out = rearrange(out, "n b h l d -> b h (n l) d")[:, :, :length]
    return rearrange(out, "b h l d -> b l h d")


def attend(q: Float[Array, "B H L d"], k: Array, v: Array, valid: Bool[Array, "B M"] | None) -> Float[Array, "B H L d"]:
    """Attention of some queries over all keys, heads before tokens."""
    scores = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if valid is not None:
        scores = scores + jnp.where(valid, 0.0, MASKED_SCORE)[:, None, None, :]
    # The sum of the weights divides the d outputs of a query rather than its M weights, which are many more.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bhlm,bhmd->bhld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype)
