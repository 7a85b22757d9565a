"""The text tower: a decoder-only language model of the Llama layout, stopped at the layer whose states condition the DiT.

    tokens B L -> embedding -> `layers_run` x (RMS norm, causal grouped-query attention with rope; RMS norm, SwiGLU) -> states B L D

HunyuanVideo takes hidden_states[-3], the states two layers before the last without a final norm, since these generalise
better than the last ones (paper section 4.2); the layers after it are never computed and have no parameters here.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hunyuan_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Sizes of a tower; the defaults are those of Llama 3 8B. `skip_layers` counts the last layers that are left out.

    `init_scale` multiplies the standard deviation, fan_in^-1/2, of random weights; towers with real weights ignore it.
    """

    vocab_size: int = 128_320
    width: int = 4096
    num_layers: int = 32
    skip_layers: int = 2
    num_heads: int = 32
    num_kv_heads: int = 8
    mlp_width: int = 14_336
    rope_theta: float = 5e5
    norm_eps: float = 1e-5
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"Text tower: width {self.width}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} must divide in turn."
            )
        if not 0 <= self.skip_layers < self.num_layers:
            raise UserError(f"Text tower: skip_layers={self.skip_layers} must be at least 0 and below num_layers={self.num_layers}.")

    @property
    def layers_run(self) -> int:
        return self.num_layers - self.skip_layers

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class RMSNorm(nn.Module):
    """Scales to unit root mean square in float32, then by a weight in the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps))
        return normed.astype(x.dtype) * weight.astype(x.dtype)


def rotate(x: Float[Array, "B L H D"], *, theta: float) -> Float[Array, "B L H D"]:
    """Rotary positions 0, 1, ... over the halves of a head: dimension i turns with i + D/2."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class DecoderLayer(nn.Module):
    """Causal self-attention and SwiGLU, each behind an RMS norm and added to its input."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        c = self.config
        batch, length, _ = x.shape
        init = nn.initializers.variance_scaling(c.init_scale**2, "fan_in", "normal")

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

        h = RMSNorm(c.norm_eps, name="input_layernorm")(x)
        q = linear(c.width, "q_proj")(h).reshape(batch, length, c.num_heads, c.head_dim)
        k = linear(c.num_kv_heads * c.head_dim, "k_proj")(h).reshape(batch, length, c.num_kv_heads, c.head_dim)
        v = linear(c.num_kv_heads * c.head_dim, "v_proj")(h).reshape(batch, length, c.num_kv_heads, c.head_dim)
        q, k = rotate(q, theta=c.rope_theta), rotate(k, theta=c.rope_theta)
        groups = c.num_heads // c.num_kv_heads
        q = q.reshape(batch, length, c.num_kv_heads, groups, c.head_dim)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k).astype(jnp.float32) * c.head_dim**-0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        # A query in the padding still sees itself, so that no row of the softmax is empty.
        seen = causal & (mask[:, None, :] | jnp.eye(length, dtype=bool))
        weights = nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
        attended = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(batch, length, c.width)
        x = x + linear(c.width, "o_proj")(attended)

        h = RMSNorm(c.norm_eps, name="post_attention_layernorm")(x)
        gated = nn.silu(linear(c.mlp_width, "gate_proj")(h)) * linear(c.mlp_width, "up_proj")(h)
        return x + linear(c.width, "down_proj")(gated)


class TextTower(nn.Module):
    """States of every token after `layers_run` layers; padding on the right changes nothing before it."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        c = self.config
        embedding = self.param("embed_tokens", nn.initializers.normal(1.0), (c.vocab_size, c.width))
        x = embedding[tokens]
        for layer in range(c.layers_run):
            x = DecoderLayer(c, name=f"layers_{layer}")(x, mask)
        return x
