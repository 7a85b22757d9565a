"""The layers a diffusion transformer is made of: sinusoid, embedder, norms, rope, modulation, MLP.

Axis letters: B samples, L tokens, H heads, D width, d head width, F features, S segments of one sample. Norms, rope and
modulation are computed in float32 whatever the compute dtype; linear layers run in the module's `dtype` over float32 parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from hunyuan_jax.parallel.sharding import as_multiplied, as_product

EPSILON = 1e-6
SINUSOID_FEATURES = 256
SINUSOID_PERIOD = 10_000.0

Initializer = nn.initializers.Initializer
# Uniform with standard deviation 1/sqrt(3 fan_in): what the released code leaves its plain linear layers at. Biases start at 0.
LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
EMBEDDING_INIT = nn.initializers.normal(0.02)
ZERO_INIT = nn.initializers.zeros_init()

# Elementwise functions keep their inputs for the backward pass and nothing else: recomputing the few intermediate values is
# cheaper than storing them. Inside a scan no barrier is needed to keep the compiler from undoing this.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def linear(
    features: int, *, name: str, dtype: DTypeLike, use_bias: bool = True, kernel_init: Initializer = LINEAR_INIT, within: str = ""
) -> nn.Dense:
    """A linear layer: the product in `dtype`, of a kernel that is gathered where it is multiplied.

    `within` names the module that it is a part of, for layers whose own name has no rule in parallel/sharding.py.
    """
    path = f"{within}/{name}"

    def product(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        return as_product(jax.lax.dot_general(x, as_multiplied(kernel, path), *args, **kwargs), kernel, path)

    return nn.Dense(features, use_bias=use_bias, name=name, dtype=dtype, kernel_init=kernel_init, dot_general=product)


def sinusoid(t: Float[Array, " B"], features: int = SINUSOID_FEATURES) -> Float[Array, "B F"]:
    """Features [cos, sin] of `t` at frequencies 10000^(-i / (F/2)); the released models feed t in 0..1000."""
    half = features // 2
    # The exponent is rounded to float32 as in the released code: at t = 6000 one more exact bit turns the angle by 4e-4.
    exponents = np.float32(-np.log(SINUSOID_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, linear: from features of a condition to the model's width."""

    width: int
    dtype: DTypeLike
    kernel_init: Initializer = LINEAR_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B D"]:
        x = linear(self.width, name="in_layer", dtype=self.dtype, kernel_init=self.kernel_init)(x)
        return linear(self.width, name="out_layer", dtype=self.dtype, kernel_init=self.kernel_init)(nn.silu(x))


class MLP(nn.Module):
    """Linear, activation, linear: the position-wise network of a block."""

    hidden: int
    activation: Callable[[Array], Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        hidden = linear(self.hidden, name="fc1", dtype=self.dtype)(x)
        return linear(x.shape[-1], name="fc2", dtype=self.dtype)(self.activation(hidden))


@recomputed
def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return nn.silu(x)


@recomputed
def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form, as the released blocks use it."""
    return nn.gelu(x, approximate=True)


def layer_norm(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """LayerNorm without parameters, in and to float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, in float32, cast to `dtype`."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", ZERO_INIT, (x.shape[-1],), jnp.float32)
        return (layer_norm(x) * scale + bias).astype(self.dtype)


@recomputed
def rms_norm(x: Float[Array, "*B d"], scale: Float[Array, " d"]) -> Float[Array, "*B d"]:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in and to float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a scale, in and to float32; on queries and keys it acts per head."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale)


class Rope(NamedTuple):
    """Cosine and sine of the rotation of each channel pair: [L, d/2], one row per image token."""

    cos: Float[Array, "L half"]
    sin: Float[Array, "L half"]


def rope_table(grid: tuple[int, int, int], axes: Sequence[int], theta: float) -> Rope:
    """Rotations for the tokens of a (T, Y, X) grid, T slowest; `axes` splits the head's channels among the three axes.

    On an axis of n channels, pair j turns by position * theta^(-2j/n). The angles of one axis are a small table; the grid is
    built by broadcasting, so that a long video adds no large constant to the compiled program.
    """

    def axis_table(function: Callable[[np.ndarray], np.ndarray], axis: int) -> Array:
        frequencies = theta ** (-np.arange(0, axes[axis], 2) / axes[axis])
        table = function(np.arange(grid[axis])[:, None] * frequencies).astype(np.float32)
        shape = [1, 1, 1, axes[axis] // 2]
        shape[axis] = grid[axis]
        return jnp.broadcast_to(table.reshape(shape), (*grid, axes[axis] // 2))

    def grid_table(function: Callable[[np.ndarray], np.ndarray]) -> Array:
        return jnp.concatenate([axis_table(function, axis) for axis in range(3)], axis=-1).reshape(-1, sum(axes) // 2)

    return Rope(cos=grid_table(np.cos), sin=grid_table(np.sin))


def apply_rope(x: Float[Array, "B L H d"], rope: Rope) -> Float[Array, "B L H d"]:
    """Turns adjacent channel pairs (2i, 2i+1) of every head by the token's angles, in and to float32."""
    cos, sin = rope.cos[:, None, :], rope.sin[:, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


class ModulationOut(NamedTuple):
    """How one sub-layer is conditioned: its input is shifted and scaled, its output gated. Each [B, 1 or L, D], float32."""

    shift: Float[Array, "B L D"]
    scale: Float[Array, "B L D"]
    gate: Float[Array, "B L D"]


def per_token(values: Float[Array, "B S D"], clean: Bool[Array, "B L"] | None) -> Float[Array, "B L D"]:
    """Spreads values per segment over tokens: segment 0 everywhere (and then L = 1), or segment 1 where `clean`."""
    values = values.astype(jnp.float32)
    if clean is None:
        return values[:, :1]
    return jnp.where(clean[:, :, None], values[:, 1:2], values[:, :1])


class Modulation(nn.Module):
    """Shift, scale and gate of `num_sublayers` sub-layers from the condition vector; zero at the start, so blocks begin closed."""

    num_sublayers: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, vec: Float[Array, "B S D"], clean: Bool[Array, "B L"] | None = None) -> tuple[ModulationOut, ...]:
        features = 3 * self.num_sublayers * vec.shape[-1]
        values = linear(features, name="linear", dtype=self.dtype, kernel_init=ZERO_INIT, within="modulation")(nn.silu(vec))
        chunks = [per_token(chunk, clean) for chunk in jnp.split(values, 3 * self.num_sublayers, axis=-1)]
        return tuple(ModulationOut(*chunks[i : i + 3]) for i in range(0, len(chunks), 3))


@recomputed
def modulate(x: Float[Array, "B L D"], shift: Array, scale: Array) -> Float[Array, "B L D"]:
    """Normalises, scales by 1 + scale and shifts, in float32; the result has the dtype of `x`."""
    return (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)


def gated_add(x: Float[Array, "B L D"], gate: Array, update: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """The residual step x + gate * update, in float32; the result has the dtype of `x`."""
    return (x.astype(jnp.float32) + gate.astype(jnp.float32) * update.astype(jnp.float32)).astype(x.dtype)
