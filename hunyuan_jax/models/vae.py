"""The causal 3D VAE of HunyuanVideo: frames to a Gaussian over latents, 4x in time and 8x8 in space, and back.

    frames  B T H W 3  in [-1, 1], T = 1 + 4n      encode ->  Posterior, B Y.. : mean and logvar  B 1+n H/8 W/8 C
    latents B T Y X C  unscaled                    decode ->  frames B 1+4(T-1) 8Y 8X 3

Convolutions replicate the edge and look only backwards in time; the first frame is an image of its own and is never upsampled
in time. Group normalisation, as released, takes its statistics over all frames, so the network is causal but for those
statistics. Attention in the middle is one head, causal by frame. Names of modules and parameters are those of the released
checkpoint, with `.` as `_` before a number. Paper section 4.1 ("3D VAE"); constants from the released configuration.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.shared_rows import Edges, among_all_rows, convolve_with_edges

CAUSAL = "causal"  # how the name begins under which attention meets blocks of keys, see `causal_scope`
ATTENTION_BLOCK = 1024  # positions whose scores are held at a time, as queries and as keys; a frame of 256 x 256 pixels has as many


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are the released model of 246,478,803 parameters.

    `convolution` says how a 3D convolution is computed, with equal results: "volume" as one, "planes" as a sum of 2D
    convolutions over the kernel's frames, which XLA runs 2 to 4 times faster on CPUs and estimates as 1.1 to 1.6 times faster
    on v5p and v6e. `remat` says what a gradient keeps: "none" recomputes nothing, "full" keeps the inputs of residual blocks and
    changes of resolution and computes the rest again.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression: int = 8
    temporal_compression: int = 4
    convolution: Literal["volume", "planes"] = "volume"
    remat: Literal["none", "full"] = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(f"VAE: every width must be a multiple of norm_num_groups={self.norm_num_groups}, but {channels} is not.")
        if self.convolution not in ("volume", "planes"):
            raise UserError(f"VAE: convolution must be 'volume' or 'planes', not {self.convolution!r}.")
        if self.remat not in ("none", "full"):
            raise UserError(f"VAE: remat must be 'none' or 'full', not {self.remat!r}.")
        levels = len(self.block_out_channels)
        for name, factor in (("spatial_compression", self.spatial_compression), ("temporal_compression", self.temporal_compression)):
            if factor & (factor - 1) or not 1 <= factor <= 2 ** (levels - 1):
                raise UserError(f"VAE: {name}={factor} must be a power of two of at most {2 ** (levels - 1)} for {levels} levels.")

    @property
    def strides(self) -> tuple[tuple[int, int, int] | None, ...]:
        """The (time, height, width) stride that ends each level of the encoder, or None; time is compressed last."""
        levels = len(self.block_out_channels)
        in_space = self.spatial_compression.bit_length() - 1
        in_time = self.temporal_compression.bit_length() - 1
        strides: list[tuple[int, int, int] | None] = []
        for level in range(levels):
            space = 2 if level < in_space else 1
            time = 2 if levels - 1 - in_time <= level < levels - 1 else 1
            strides.append((time, space, space) if max(time, space) > 1 else None)
        return tuple(strides)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, Y, X, C) of a clip's latents. Raises `UserError` for a clip the VAE cannot represent exactly."""
        if (frames - 1) % self.temporal_compression or frames < 1:
            raise UserError(f"VAE: the number of frames must be {self.temporal_compression}n + 1, not {frames}.")
        if height % self.spatial_compression or width % self.spatial_compression:
            raise UserError(f"VAE: height and width must be multiples of {self.spatial_compression}, not {height} x {width}.")
        return (
            1 + (frames - 1) // self.temporal_compression,
            height // self.spatial_compression,
            width // self.spatial_compression,
            self.latent_channels,
        )


@flax.struct.dataclass
class Posterior:
    """A diagonal Gaussian over latents, unscaled; `logvar` is clipped to [-30, 20]."""

    mean: Float[Array, "B T Y X C"]
    logvar: Float[Array, "B T Y X C"]

    @classmethod
    def from_moments(cls, moments: Float[Array, "B T Y X C2"]) -> "Posterior":
        """Of the mean and the log-variance as the encoder gives them, one after the other along the channels."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return cls(mean=mean, logvar=jnp.clip(logvar, -30.0, 20.0))

    def sample(self, noise: Float[Array, "B T Y X C"]) -> Float[Array, "B T Y X C"]:
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, "B"]:
        """KL divergence to the standard normal, summed over a sample's latents, in nats."""
        terms = 0.5 * (jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar)
        return jnp.sum(terms, axis=(1, 2, 3, 4))


def delta_orthogonal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "t h w C D"]:
    """A kernel that mixes the channels of the current position orthogonally and ignores its neighbours.

    With residual branches that begin at zero the untrained network passes its input on as an isometry, which a network this
    deep between a clip and its latents needs to learn quickly.
    """
    centre = (shape[0] - 1, shape[1] // 2, shape[2] // 2)
    return jnp.zeros(shape, dtype).at[centre].set(nn.initializers.orthogonal()(key, shape[3:], dtype))


class Conv3D(nn.Module):
    """A 3D convolution with bias; `convolution` as in `VAEConfig`, `edges` as often as frames, rows and columns are repeated at each."""

    features: int
    kernel: int
    strides: tuple[int, int, int]
    convolution: str
    dtype: str
    kernel_init: nn.initializers.Initializer = delta_orthogonal
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    edges: Edges = ((0, 0), (0, 0), (0, 0))

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T2 H2 W2 D"]:
        shape = (self.kernel,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, (self.features,))
        # The kernel stays as it is until it is used: so its gradient is summed over devices.
        x, bias = x.astype(self.dtype), bias.astype(self.dtype)
        if self.kernel == 1 and self.strides == (1, 1, 1):
            return x @ kernel[0, 0, 0].astype(self.dtype) + bias
        how = _convolve_planes if self.convolution == "planes" else _convolve_volume
        convolve = functools.partial(how, strides=self.strides)
        return convolve_with_edges(convolve, x, kernel, edges=self.edges, stride=self.strides[1]) + bias


def _convolve_volume(x: Array, kernel: Array, *, strides: tuple[int, int, int]) -> Array:
    dims = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, "VALID", dimension_numbers=dims)


def _convolve_planes(x: Array, kernel: Array, *, strides: tuple[int, int, int]) -> Array:
    """The 3D convolution as a sum in float32, over the kernel's frames, of 2D convolutions of the frames it meets."""
    batch, frames, *plane = x.shape
    out_frames = (frames - kernel.shape[0]) // strides[0] + 1
    kernel, total = kernel.astype(x.dtype), jnp.zeros((), jnp.float32)
    how: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "preferred_element_type": jnp.float32}
    for tap in range(kernel.shape[0]):
        met = jax.lax.slice_in_dim(x, tap, tap + (out_frames - 1) * strides[0] + 1, strides[0], axis=1)
        met = met.reshape(batch * out_frames, *plane)
        total += jax.lax.conv_general_dilated(met, kernel[tap], strides[1:], "VALID", **how)
    return total.astype(x.dtype).reshape(batch, out_frames, *total.shape[1:])


class CausalConv(nn.Module):
    """A 3D convolution that replicates the edges in space and the first frame before the beginning, and never looks ahead."""

    config: VAEConfig
    features: int
    kernel: int = 3
    strides: tuple[int, int, int] = (1, 1, 1)
    kernel_init: nn.initializers.Initializer = delta_orthogonal

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T2 H2 W2 D"]:
        c, side = self.config, self.kernel // 2
        edges = ((self.kernel - 1, 0), (side, side), (side, side))
        return Conv3D(self.features, self.kernel, self.strides, c.convolution, c.dtype, self.kernel_init, edges=edges, name="conv")(x)


def _recomputed(config: VAEConfig, module: Any) -> Any:
    """The module's class, or a function of a module and its input, so that a gradient keeps what `config.remat` says."""
    return nn.remat(module) if config.remat == "full" else module


def _group_norm(config: VAEConfig, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, epsilon=1e-6, dtype=config.dtype, name=name)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip that is projected where the width changes; the branch begins at zero."""

    config: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        in_branch = nn.initializers.lecun_normal()
        h = CausalConv(self.config, self.features, kernel_init=in_branch, name="conv1")(nn.silu(_group_norm(self.config, "norm1")(x)))
        h = CausalConv(self.config, self.features, kernel_init=nn.initializers.zeros, name="conv2")(
            nn.silu(_group_norm(self.config, "norm2")(h))
        )
        if x.shape[-1] != self.features:
            x = CausalConv(self.config, self.features, kernel=1, name="conv_shortcut")(x)
        return x + h


def causal_scope(asked: int, length: int, *, frame_size: int, block: int) -> str:
    """The name under which attention meets blocks of keys: which share of all pairs of a query and a key is seen, and which is met.

    All pairs are those of whole blocks. A trace says no more of a branch than that it may be taken; flops.py reads it here.
    """
    of_queries, frames = frame_size * asked // length, length // frame_size
    last_query = np.arange(block - 1, asked + block - 1, block) // of_queries  # frames of each block's
    first_key = np.arange(0, length, block) // frame_size
    met = first_key <= last_query[:, None]
    seen = of_queries * frame_size * frames * (frames + 1) / 2
    return f"{CAUSAL}_{seen / (met.size * block**2):.6f}_{met.mean():.6f}"


def frame_causal_attention(
    q: Float[Array, "B M C"], k: Float[Array, "B N C"], v: Float[Array, "B N C"], *, frame_size: int, block: int = ATTENTION_BLOCK
) -> Float[Array, "B M C"]:
    """softmax(q k^T / sqrt(C)) v, where a position sees its own frame of `frame_size` positions and the earlier ones.

    Queries are of all positions, or of the same share of each frame's. They meet keys in blocks of at most `block` positions, under an
    online softmax and recomputed in the backward pass, so memory is linear in N. Blocks of keys that lie wholly ahead of a block of queries
    are passed over.
    """
    batch, length, channels = k.shape
    asked = q.shape[1]
    of_queries = frame_size * asked // length
    block = min(block, asked)
    scope = causal_scope(asked, length, frame_size=frame_size, block=block)

    def blocks(x: Float[Array, "B L C"]) -> Float[Array, "N B l C"]:
        count = -(-x.shape[1] // block)
        filled = jnp.pad(x, ((0, 0), (0, count * block - x.shape[1]), (0, 0)))
        return jnp.moveaxis(filled.reshape(batch, count, block, channels), 1, 0)

    q, k, v = blocks(q), blocks(k), blocks(v)
    within = jnp.arange(block)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(args: tuple[Array, Float[Array, "B Q C"]]) -> Float[Array, "B Q C"]:
        number, queries = args
        frame_of_query = (number * block + within) // of_queries

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def meet(state: Any, keys: Float[Array, "B K C"], values: Float[Array, "B K C"], start: Array) -> Any:
            total, weight, peak = state
            position = start + within
            seen = (position // frame_size <= frame_of_query[:, None]) & (position < length)
            scores = jnp.einsum("bqc,bkc->bqk", queries, keys, preferred_element_type=jnp.float32) * channels**-0.5
            scores = jnp.where(seen, scores, -jnp.inf)
            # The first block holds the first frame, which all see: the peak is finite from there on. The result does not depend on it.
            higher = jax.lax.stop_gradient(jnp.maximum(peak, scores.max(axis=-1)))
            share = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(peak - higher)
            met = jnp.einsum("bqk,bkc->bqc", share.astype(values.dtype), values, preferred_element_type=jnp.float32)
            return total * shrink[..., None] + met, weight * shrink + share.sum(axis=-1), higher

        def step(state: Any, xs: tuple[Array, Array, Array]) -> tuple[Any, None]:
            keys, values, start = xs
            ahead = start // frame_size > frame_of_query[-1]
            with jax.named_scope(scope):
                return jax.lax.cond(ahead, lambda state, *_: state, meet, state, keys, values, start), None

        state = functools.partial(jnp.full, dtype=jnp.float32)
        nothing = state((batch, block, channels), 0.0), state((batch, block), 0.0), state((batch, block), -jnp.inf)
        (total, weight, _), _ = jax.lax.scan(step, nothing, (k, v, block * jnp.arange(len(k))))
        return (total / weight[..., None]).astype(v.dtype)

    out = jax.lax.map(attend, (jnp.arange(len(q)), q))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, channels)[:, :asked]


class FrameCausalAttention(nn.Module):
    """One head over all positions; a position sees its own frame and the earlier ones. No (T Y X)^2 matrix is ever held."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T Y X C"]) -> Float[Array, "B T Y X C"]:
        _, _, height, width, channels = x.shape
        h = _group_norm(self.config, "group_norm")(x)
        q, k, v = (nn.Dense(channels, dtype=self.config.dtype, name=name)(h) for name in ("to_q", "to_k", "to_v"))

        def attend(q: Float[Array, "b T y X C"], *keys_and_values: Float[Array, "b T Y X C"]) -> Float[Array, "b T y X C"]:
            q_positions, k, v = (each.reshape(len(each), -1, channels) for each in (q, *keys_and_values))
            return frame_causal_attention(q_positions, k, v, frame_size=height * width).reshape(q.shape)

        to_out = nn.Dense(channels, dtype=self.config.dtype, kernel_init=nn.initializers.zeros, name="to_out_0")
        return x + to_out(among_all_rows(attend, q, k, v))


class MidBlock(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T Y X C"]) -> Float[Array, "B T Y X C"]:
        block, attention = (_recomputed(self.config, module) for module in (ResBlock, FrameCausalAttention))
        x = block(self.config, x.shape[-1], name="resnets_0")(x)
        x = attention(self.config, name="attentions_0")(x)
        return block(self.config, x.shape[-1], name="resnets_1")(x)


class Downsample(nn.Module):
    config: VAEConfig
    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T2 H2 W2 C"]:
        return CausalConv(self.config, x.shape[-1], strides=self.strides, name="conv")(x)


def upsample_nearest(x: Float[Array, "B T H W C"], factors: tuple[int, int, int]) -> Float[Array, "B T2 H2 W2 C"]:
    """Repeats positions; the first frame is repeated in space only, so T becomes 1 + factor (T - 1)."""
    time, height, width = factors
    if time > 1:
        x = jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], time, axis=1)], axis=1)
    batch, frames, rows, columns, channels = x.shape
    x = jnp.broadcast_to(x[:, :, :, None, :, None], (batch, frames, rows, height, columns, width, channels))
    return x.reshape(batch, frames, rows * height, columns * width, channels)


class Upsample(nn.Module):
    config: VAEConfig
    factors: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T2 H2 W2 C"]:
        return CausalConv(self.config, x.shape[-1], name="conv")(upsample_nearest(x, self.factors))


class Level(nn.Module):
    """One resolution: residual blocks, then a change of resolution where `strides` is given."""

    config: VAEConfig
    features: int
    layers: int
    strides: tuple[int, int, int] | None
    up: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T2 H2 W2 D"]:
        for layer in range(self.layers):
            x = _recomputed(self.config, ResBlock)(self.config, self.features, name=f"resnets_{layer}")(x)
        if self.strides is None:
            return x
        change, name = (Upsample, "upsamplers_0") if self.up else (Downsample, "downsamplers_0")
        return _recomputed(self.config, change)(self.config, self.strides, name=name)(x)


def _end(coder: nn.Module, x: Float[Array, "B T H W C"], *, config: VAEConfig, features: int) -> Float[Array, "B T H W D"]:
    """The layers that end `coder`, the encoder or the decoder."""
    return CausalConv(config, features, name="conv_out")(nn.silu(_group_norm(config, "conv_norm_out")(x)))


class Encoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W 3"]) -> Float[Array, "B T2 Y X C2"]:
        c = self.config
        x = CausalConv(c, c.block_out_channels[0], name="conv_in")(x)
        for i, (features, strides) in enumerate(zip(c.block_out_channels, c.strides, strict=True)):
            x = Level(c, features, c.layers_per_block, strides, up=False, name=f"down_blocks_{i}")(x)
        x = MidBlock(c, name="mid_block")(x)
        return _recomputed(c, functools.partial(_end, config=c, features=2 * c.latent_channels))(self, x)


class Decoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T Y X C"]) -> Float[Array, "B T2 H W 3"]:
        c = self.config
        x = CausalConv(c, c.block_out_channels[-1], name="conv_in")(x)
        x = MidBlock(c, name="mid_block")(x)
        # Going up repeats the encoder's strides in the encoder's order: time is expanded last.
        for i, (features, factors) in enumerate(zip(reversed(c.block_out_channels), c.strides, strict=True)):
            x = Level(c, features, c.layers_per_block + 1, factors, up=True, name=f"up_blocks_{i}")(x)
        return _recomputed(c, functools.partial(_end, config=c, features=c.out_channels))(self, x)


def _narrow_posterior(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "C2"]:
    """Mean 0 and log-variance -6: at first the latents' noise must not drown what the encoder says."""
    return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, 0.0, -6.0).astype(dtype)


class VAE(nn.Module):
    """`encode` and `decode`; `__call__` is both, through the mean, and exists to initialise all parameters at once."""

    config: VAEConfig

    def setup(self) -> None:
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = Conv3D(2 * c.latent_channels, 1, (1, 1, 1), c.convolution, c.dtype, bias_init=_narrow_posterior)
        self.post_quant_conv = Conv3D(c.latent_channels, 1, (1, 1, 1), c.convolution, c.dtype)

    def encode(self, frames: Float[Array, "B T H W 3"]) -> Posterior:
        """The posterior of frames in [-1, 1]; the frame count must be 4n + 1, height and width multiples of 8."""
        return Posterior.from_moments(self.moments(frames))

    def moments(self, frames: Float[Array, "B T H W 3"]) -> Float[Array, "B T2 Y X C2"]:
        """What `encode` makes its posterior from."""
        self.config.latent_shape(*frames.shape[1:4])
        return self.quant_conv(self.encoder(frames)).astype(jnp.float32)

    def decode(self, latents: Float[Array, "B T Y X C"]) -> Float[Array, "B T2 H W 3"]:
        """Frames of unscaled latents, not clipped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, frames: Float[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
        return self.decode(self.encode(frames).mean)


@dataclasses.dataclass(frozen=True)
class LatentMoments:
    """What a VAE's unscaled latents are like over some clips: their mean, their covariance across channels, and the mean variance
    of their posteriors. Everything in float64."""

    mean: Float[np.ndarray, "C"]
    covariance: Float[np.ndarray, "C C"]
    posterior_variance: Float[np.ndarray, "C"]


def whitened(params: Any, moments: LatentMoments, *, ridge: float) -> Any:
    """The same VAE with other latents: of mean 0 and mean variance 1, and nearly as varied in every direction as in any other.

    The map (S + e I)^(-1/2) (z - mean), where S is their covariance and e is `ridge` times its mean eigenvalue, is put into the
    1 x 1 x 1 convolutions that end the encoder and begin the decoder, so clips are reconstructed as before. The ridge keeps small
    what varies far less than the rest, and is mostly noise. A posterior's variances are replaced by their mean over the clips,
    since a linear layer cannot turn log-variances. Raises `UserError` where the latents do not vary.
    """
    values, vectors = np.linalg.eigh(moments.covariance)
    if not np.all(np.isfinite(values)) or values.max() <= 0 or ridge <= 0:
        raise UserError("VAE: the latents of these clips do not vary, or ridge is not above 0; the weights are broken or untrained.")
    values = np.maximum(values, 0.0)
    gains = (values + ridge * values.mean()) ** -0.5
    gains /= np.sqrt(np.mean(gains**2 * values))
    forth, back = ((vectors * g) @ vectors.T for g in (gains, 1 / gains))  # both symmetric, inverse to each other
    encode, decode = ({k: np.asarray(v, np.float64) for k, v in params[name].items()} for name in ("quant_conv", "post_quant_conv"))
    channels = len(moments.mean)
    kernel, bias = encode["kernel"].copy(), encode["bias"].copy()
    kernel[..., :channels] = kernel[..., :channels] @ forth
    kernel[..., channels:] = 0.0
    bias[:channels] = (bias[:channels] - moments.mean) @ forth
    bias[channels:] = np.log(np.square(forth) @ moments.posterior_variance)
    after = {"kernel": back @ decode["kernel"], "bias": decode["bias"] + moments.mean @ decode["kernel"][0, 0, 0]}
    changed = {"quant_conv": {"kernel": kernel, "bias": bias}, "post_quant_conv": after}
    return {**params, **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), changed)}


def abstract_params(config: VAEConfig) -> Any:
    """Shapes and dtypes of the parameters, without memory."""
    side = 2 * config.spatial_compression
    frames = jax.ShapeDtypeStruct((1, 1 + config.temporal_compression, side, side, config.in_channels), jnp.float32)
    return jax.eval_shape(lambda frames: VAE(config).init(jax.random.key(0), frames)["params"], frames)
