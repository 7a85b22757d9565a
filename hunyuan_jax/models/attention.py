"""Attention over tokens of which a prefix is valid: one function, behind which kernels may differ.

The joint sequence of the model is [image tokens, text tokens] with the valid text first, so one number per sample, the count
of valid keys, says all there is to say about masking; no dense mask ever exists outside the reference backend.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

# Finite, so that a sample without any valid key gives finite values (which nobody reads) instead of NaN; its exponential is 0.
MASKED_SCORE = -1e30


def attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B M H d"],
    v: Float[Array, "B M H d"],
    *,
    kv_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B L H d"]:
    """Softmax attention with scale 1/sqrt(d) over the first `kv_lengths` keys of each sample (all of them where None).

    Keys past the length contribute exactly nothing. Scores and softmax are float32; the result has the dtype of `v`.
    """
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    scores = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if kv_lengths is not None:
        valid = jnp.arange(k.shape[2]) < kv_lengths[:, None]
        scores = scores + jnp.where(valid, 0.0, MASKED_SCORE)[:, None, None, :]
    # The sum of the weights divides the d outputs of a query rather than its M weights, which are many more.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bhlm,bhmd->bhld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return rearrange(out.astype(v.dtype), "b h l d -> b l h d")
