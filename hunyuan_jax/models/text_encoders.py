"""The two encoders of a prompt: a language model whose states condition the DiT token by token, and CLIP for one vector of all.

    TextTower   tokens B L -> embedding -> `layers_run` x (RMS norm, causal grouped-query attention with rope; RMS norm, SwiGLU)
                -> states B L D
    CLIPText    tokens B L -> embedding + positions -> layers x (layer norm, causal attention; layer norm, quick GELU) -> layer norm
                -> states B L D, and the state at the end-of-text token B D

The tower has the Llama layout and is stopped early. HunyuanVideo takes hidden_states[-3], the states two layers before the last
without a final norm, since these generalise better than the last ones (paper section 4.2); the layers after it are never computed
and have no parameters here. Both read texts padded on the right.

Axis letters: B texts, L tokens, D width, H heads, K heads of keys and values, d head width.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.layers import linear
from hunyuan_jax.parallel.sharding import looked_up

Dtype = Literal["float32", "bfloat16"]
# What CLIP's config says where its end-of-text token was never filled in, as in the released one.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Sizes of a tower; the defaults are those of Llama 3 8B. `skip_layers` counts the last layers that are left out.

    With n >= 1 of them the states are hidden_states[-(n + 1)] of transformers; with none they lack the norm that its last ones have.
    A `head_dim` of None is width / num_heads. `init_scale` multiplies the standard deviation, fan_in^-1/2, of random weights; towers
    with real weights ignore it. The residual stream and the products are in `dtype`; norms, rope and softmax in float32.
    """

    vocab_size: int = 128_320
    width: int = 4096
    num_layers: int = 32
    skip_layers: int = 2
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int | None = None
    mlp_width: int = 14_336
    rope_theta: float = 5e5
    norm_eps: float = 1e-5
    init_scale: float = 1.0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if (self.head_dim is None and self.width % self.num_heads) or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"Text tower: width {self.width}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} must divide in turn."
            )
        if self.head_width % 2:
            raise UserError(
                f"Text tower: rope turns pairs of channels, so that heads cannot have {self.head_width}; give an even head_dim."
            )
        if not 0 <= self.skip_layers < self.num_layers:
            raise UserError(f"Text tower: skip_layers={self.skip_layers} must be at least 0 and below num_layers={self.num_layers}.")
        _check_dtype("Text tower", self.dtype)

    @property
    def layers_run(self) -> int:
        return self.num_layers - self.skip_layers

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads if self.head_dim is None else self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Sizes of CLIP's text tower; the defaults are those of CLIP ViT-L/14 as released, `LEGACY_EOS` included. `dtype` is the tower's."""

    vocab_size: int = 49_408
    max_positions: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(f"CLIP: width {self.width} must divide by num_heads {self.num_heads}.")
        _check_dtype("CLIP", self.dtype)

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


def _check_dtype(where: str, dtype: str) -> None:
    if dtype not in get_args(Dtype):
        raise UserError(f"{where}: dtype must be one of {', '.join(get_args(Dtype))}, not {dtype!r}.")


def attend(
    q: Float[Array, "B L H d"], k: Float[Array, "B L K d"], v: Float[Array, "B L K d"], seen: Bool[Array, "#B L L"]
) -> Float[Array, "B L D"]:
    """Attention of each query to the keys that it sees, softmax in float32; every H / K heads of queries share a head of keys."""
    batch, length, num_heads, width = q.shape
    groups = num_heads // k.shape[2]
    q = q.reshape(batch, length, k.shape[2], groups, width)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32) * width**-0.5
    weights = nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(batch, length, num_heads * width)


def causal(length: int) -> Bool[Array, "L L"]:
    """Which keys each query may see: its own and those before it."""
    return jnp.tril(jnp.ones((length, length), bool))


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
    """Self-attention and SwiGLU, each behind an RMS norm and added to its input."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], seen: Bool[Array, "B L L"]) -> Float[Array, "B L D"]:
        c = self.config
        init = nn.initializers.variance_scaling(c.init_scale**2, "fan_in", "normal")
        product = functools.partial(linear, use_bias=False, dtype=c.dtype, kernel_init=init)

        def heads(x: Array, count: int, name: str) -> Array:
            return product(count * c.head_width, name=name)(x).reshape(*x.shape[:2], count, c.head_width)

        h = RMSNorm(c.norm_eps, name="input_layernorm")(x)
        q, k, v = heads(h, c.num_heads, "q_proj"), heads(h, c.num_kv_heads, "k_proj"), heads(h, c.num_kv_heads, "v_proj")
        q, k = rotate(q, theta=c.rope_theta), rotate(k, theta=c.rope_theta)
        x = x + product(c.width, name="o_proj")(attend(q, k, v, seen))

        h = RMSNorm(c.norm_eps, name="post_attention_layernorm")(x)
        gated = nn.silu(product(c.mlp_width, name="gate_proj")(h)) * product(c.mlp_width, name="up_proj")(h)
        return x + product(c.width, name="down_proj")(gated)


class TextTower(nn.Module):
    """States of every token after `layers_run` layers; padding on the right changes nothing before it."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        c = self.config
        embedding = self.param("embed_tokens", nn.initializers.normal(1.0), (c.vocab_size, c.width))
        x = looked_up(embedding, tokens).astype(c.dtype)
        length = tokens.shape[1]
        # A query in the padding still sees itself, so that no row of the softmax is empty.
        seen = causal(length) & (mask[:, None, :] | jnp.eye(length, dtype=bool))
        for layer in range(c.layers_run):
            x = DecoderLayer(c, name=f"layers_{layer}")(x, seen)
        return x


class CLIPLayer(nn.Module):
    """Causal self-attention and an MLP with quick GELU, x * sigmoid(1.702 x), each behind a layer norm and added to its input."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        product = functools.partial(linear, dtype=c.dtype)

        h = clip_norm(c, "layer_norm1")(x)
        heads = (*x.shape[:2], c.num_heads, c.head_width)
        q, k, v = (product(c.width, name=name)(h).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + product(c.width, name="out_proj")(attend(q, k, v, causal(x.shape[1])[None]))

        h = product(c.mlp_width, name="fc1")(clip_norm(c, "layer_norm2")(x))
        return x + product(c.width, name="fc2")(h * nn.sigmoid(1.702 * h))


def clip_norm(config: CLIPTextConfig, name: str) -> nn.LayerNorm:
    """A layer norm with scale and bias, computed in float32."""
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.dtype, use_fast_variance=False, name=name)


class CLIPText(nn.Module):
    """States of every token after the final norm, and the one at the end-of-text token; what stands behind it changes neither.

    That token is the first `eos_token_id`, or the first of the highest id where the config has `LEGACY_EOS`. Raises `UserError` for
    texts with more tokens than positions.
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
        c = self.config
        length = tokens.shape[1]
        if length > c.max_positions:
            raise UserError(f"CLIP reads at most {c.max_positions} tokens, and a text has {length}; cut it.")
        init = nn.initializers.normal(0.02)
        embedding = self.param("token_embedding", init, (c.vocab_size, c.width))
        positions = self.param("position_embedding", init, (c.max_positions, c.width))
        x = looked_up(embedding, tokens).astype(c.dtype) + positions[:length].astype(c.dtype)
        for layer in range(c.num_layers):
            x = CLIPLayer(c, name=f"layers_{layer}")(x)
        states = clip_norm(c, "final_layer_norm")(x)
        ends = jnp.argmax(tokens if c.eos_token_id == LEGACY_EOS else tokens == c.eos_token_id, axis=1)
        return states, jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0]


def abstract_params(config: TextTowerConfig | CLIPTextConfig) -> Any:
    """Shapes and dtypes of the parameters, without memory."""
    tokens, mask = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    if isinstance(config, CLIPTextConfig):
        return jax.eval_shape(lambda tokens: CLIPText(config).init(jax.random.key(0), tokens)["params"], tokens)
    return jax.eval_shape(lambda *inputs: TextTower(config).init(jax.random.key(0), *inputs)["params"], tokens, mask)
