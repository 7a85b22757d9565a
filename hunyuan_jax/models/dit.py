"""The HunyuanVideo diffusion transformer: noisy latents, time and text in, velocity out.

    latents --patches--> img_in ------------------.                          .-> final_layer --> velocity
    txt, t  --> txt_in (token refiner) --> txt -- double_blocks -- [img, txt] -- single_blocks
    t, pooled, guidance --> vec ----- modulates every block and the final layer

Double blocks keep separate weights for the image and the text stream and attend jointly; single blocks treat the concatenated
sequence with one set of weights. Blocks of a kind are scanned: their parameters carry a leading layer axis. Parameter names
follow the released checkpoint.

Where the mesh has an axis `sequence` of several devices, image tokens are split over it, filled up to a multiple of it, and stay a
stream beside the text in single blocks too (parallel/context_attention.py). The result is that of one device.

Axis letters: B samples, T Y X latent frames, rows and columns, C channels, L image tokens, S text tokens, M = L + S, D width,
H heads, d head width, P pooled features, E segments of a sample (see `Conditions`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct
from jax._src.interpreters import partial_eval
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hunyuan_jax.attention_kernels import CUDNN_FORWARD, SAVED, Backend, backend_for
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.attention import attention
from hunyuan_jax.models.layers import (
    EMBEDDING_INIT,
    MLP,
    ZERO_INIT,
    LayerNorm,
    MLPEmbedder,
    Modulation,
    ModulationOut,
    RMSNorm,
    Rope,
    apply_rope,
    gated_add,
    gelu_tanh,
    linear,
    modulate,
    rope_table,
    silu,
    sinusoid,
)
from hunyuan_jax.parallel.context_attention import How, Method, context_attention, degree_of
from hunyuan_jax.parallel.mesh import SEQUENCE
from hunyuan_jax.parallel.sharding import HOST_MEMORY, placed, sequence_size

IMAGE, TEXT = "image tokens", "text tokens"  # as parallel/sharding.py names them
TIME_SCALE = 1000.0  # the released models count time and guidance in thousandths
REFINER_MLP_RATIO = 4.0  # of the token refiner, whatever the blocks have

# What each block keeps for the backward pass: all; the results of its attention; the same, in host memory; nothing.
Remat = Literal["none", "attention", "attention_host", "full"]
ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """What a DiT is; the defaults that are given hold for every released model. Impossible values raise `UserError`."""

    width: int
    num_heads: int
    num_double_blocks: int
    num_single_blocks: int
    text_dim: int
    pooled_dim: int
    num_refiner_blocks: int = 2
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of latents in one token
    in_channels: int = 16
    out_channels: int = 16
    guidance_embed: bool = False  # whether the model takes the guidance scale as an input
    rope_axes: tuple[int, int, int] = (16, 56, 56)  # channels of a head turned by frame, row and column
    rope_theta: float = 256.0
    remat: Remat = "none"
    attention: Backend = "auto"  # the kernel
    context: Method = "ring"  # how devices of the mesh's axis sequence attend together
    context_degree: int = 0  # how many of them share heads by "heads", while rings join what is left; 0 for as many as can
    dtype: ComputeDtype = "float32"  # of the linear layers and the residual stream; parameters are float32

    def __post_init__(self) -> None:
        # Lists (as a configuration file gives them) become tuples, so that the config can be hashed.
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "rope_axes", tuple(self.rope_axes))
        self._check_sizes()
        if self.width % self.num_heads:
            raise UserError(f"DiTConfig: num_heads must divide width, but {self.num_heads} does not divide {self.width}; change one.")
        if sum(self.rope_axes) != self.head_dim or any(n % 2 for n in self.rope_axes):
            raise UserError(
                f"DiTConfig: rope_axes must be even and sum to the head width {self.head_dim} (width / num_heads), "
                f"but {self.rope_axes} sums to {sum(self.rope_axes)}; change rope_axes, width or num_heads."
            )
        choices = {"remat": Remat, "attention": Backend, "context": Method, "dtype": ComputeDtype}
        for name, kind in choices.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise UserError(f"DiTConfig: {name} must be one of {', '.join(allowed)}, not {value!r}.")

    def _check_sizes(self) -> None:
        for name in ("width", "num_heads", "text_dim", "pooled_dim", "in_channels", "out_channels", "mlp_ratio", "rope_theta"):
            if getattr(self, name) <= 0:
                raise UserError(f"DiTConfig: {name} must be positive, not {getattr(self, name)}.")
        for name in ("num_double_blocks", "num_single_blocks", "num_refiner_blocks", "context_degree"):
            if getattr(self, name) < 0:
                raise UserError(f"DiTConfig: {name} must not be negative, but is {getattr(self, name)}.")
        for name in ("patch_size", "rope_axes"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) <= 0:
                raise UserError(f"DiTConfig: {name} must be three positive numbers (frames, rows, columns), not {getattr(self, name)}.")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def degree_on(self, mesh: Mapping[str, int]) -> int:
        """How many devices share heads on a mesh of these sizes. Raises `UserError` where it cannot be as the config says."""
        if mesh[SEQUENCE] > 1 and self.attention == "cudnn":
            raise UserError(
                f"model.attention='cudnn' has no parts that mesh.sequence={mesh[SEQUENCE]} devices could merge; "
                "set model.attention to 'auto' or 'reference', or mesh.sequence to 1."
            )
        return degree_of(self.context, self.num_heads, mesh, wanted=self.context_degree)

    @property
    def mlp_hidden(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def compute_dtype(self) -> DTypeLike:
        return jnp.dtype(self.dtype)


# The released text-to-video model, of 12,821,012,544 parameters.
RELEASED = DiTConfig(
    width=3072, num_heads=24, num_double_blocks=20, num_single_blocks=40, text_dim=4096, pooled_dim=768, guidance_embed=True
)


@struct.dataclass
class Conditions:
    """What every block is told besides its tokens, the same for all layers.

    `vec` holds one modulation vector per segment of the tokens: segment 0 is the noisy part; segment 1, where there is one, the
    image tokens marked in `clean` (the given first frames of image-to-video), which are at time 0.
    """

    vec: Float[Array, "B E D"]
    clean: Bool[Array, "B M"] | None
    rope: Rope  # of the M joint tokens; text tokens are turned by nothing
    kv_lengths: Int[Array, " B"]  # valid joint tokens: every image token, then the valid text tokens
    backend: Backend = struct.field(pytree_node=False, default="auto")
    context: How | None = struct.field(pytree_node=False, default=None)  # where devices share image tokens

    def of_stream(self, start: int, length: int) -> tuple[Array, Array | None]:
        """The modulation vectors and the clean tokens of a part of the joint sequence."""
        return self.vec, None if self.clean is None else self.clean[:, start : start + length]


def stacked(block: type[nn.Module], *, length: int, remat: Remat) -> type[nn.Module]:
    """`length` blocks as one module that scans over its parameters' leading axis; carries tokens, broadcasts conditions."""
    if remat != "none":
        # The scan itself keeps the recomputation apart from the forward pass, so the costly barriers are not needed.
        block = nn.remat(block, prevent_cse=False, policy=_kept(remat))
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=length)


def _kept(remat: Remat) -> Callable[..., Any] | None:
    """What of a block is kept for the backward pass, as a policy of `jax.checkpoint`; None for nothing."""
    policies = jax.checkpoint_policies
    if remat == "full":
        return None
    on_host = partial_eval.Offloadable(src="device", dst=HOST_MEMORY) if remat == "attention_host" else None
    if on_host is None:
        named = policies.save_only_these_names(SAVED)
    else:
        where: dict[str, Any] = {"offload_src": on_host.src, "offload_dst": on_host.dst}
        named = policies.save_and_offload_only_these_names(names_which_can_be_saved=[], names_which_can_be_offloaded=[SAVED], **where)

    def policy(primitive: Any, *inputs: Any, **params: Any) -> Any:
        return (on_host or True) if primitive.name == CUDNN_FORWARD else named(primitive, *inputs, **params)

    return policy


def in_products(x: Float[Array, "B L D"], tokens: str) -> Float[Array, "B L D"]:
    """A stream as products take it on a mesh."""
    return placed(x, "samples", tokens)


def between_products(x: Float[Array, "B L D"], tokens: str) -> Float[Array, "B L D"]:
    """A stream as norms and sums take it on a mesh."""
    return placed(x, "samples", f"{tokens} between products")


def split_heads(qkv: Float[Array, "B L F"], num_heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values [B, L, H, d] from the output of a fused projection, in the order q, k, v."""
    q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=num_heads)
    return q, k, v


class RefinerBlock(nn.Module):
    """A pre-norm transformer block over text tokens alone; time and pooled text open its two gates. No rope, no QK norm."""

    config: DiTConfig

    @nn.compact
    def __call__(self, txt: Float[Array, "B S D"], vec: Float[Array, "B D"], lengths: Int[Array, " B"]) -> tuple[Array, None]:
        c = self.config
        dtype = c.compute_dtype
        gates = linear(2 * c.width, name="adaLN_modulation", dtype=dtype, kernel_init=ZERO_INIT)(nn.silu(vec))
        attn_gate, mlp_gate = jnp.split(gates[:, None, :], 2, axis=-1)
        qkv = linear(3 * c.width, name="self_attn_qkv", dtype=dtype)(LayerNorm(dtype, name="norm1")(txt))
        attn = attention(*split_heads(qkv, c.num_heads), kv_lengths=lengths)
        txt = gated_add(txt, attn_gate, linear(c.width, name="self_attn_proj", dtype=dtype)(rearrange(attn, "b s h d -> b s (h d)")))
        mlp = MLP(round(c.width * REFINER_MLP_RATIO), silu, dtype, name="mlp")
        return placed(gated_add(txt, mlp_gate, mlp(LayerNorm(dtype, name="norm2")(txt))), "samples"), None


class TokenRefiner(nn.Module):
    """Brings text states to the model's width and lets them see each other, as causal language towers do not.

    Its condition is its own embedding of time plus one of the mean valid text state; guidance and pooled text play no part.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, txt: Float[Array, "B S F"], time_features: Float[Array, "B K"], lengths: Int[Array, " B"]) -> Float[Array, "B S D"]:
        c = self.config
        dtype = c.compute_dtype
        # Padding is zero by now, so the plain sum is the sum over valid tokens; an empty text has mean 0.
        mean = jnp.sum(txt.astype(jnp.float32), axis=1) / jnp.maximum(lengths, 1)[:, None]
        vec = MLPEmbedder(c.width, dtype, EMBEDDING_INIT, name="t_embedder")(time_features)
        vec = placed(vec + MLPEmbedder(c.width, dtype, name="c_embedder")(mean), "samples")
        txt = placed(linear(c.width, name="input_embedder", dtype=dtype)(txt), "samples")
        if c.num_refiner_blocks:
            blocks = stacked(RefinerBlock, length=c.num_refiner_blocks, remat=c.remat)
            txt, _ = blocks(c, name="individual_token_refiner")(txt, vec, lengths)
        return txt


def joint_attention(streams: Sequence[tuple[Array, Array, Array]], conditions: Conditions) -> list[Float[Array, "B L D"]]:
    """Rope and attention over the joint sequence; the result of each stream.

    Streams are queries, keys and values, image before text or both in one. Queries and keys come normed, in float32, and are cast to
    the dtype of the values.
    """
    lengths = [stream[0].shape[1] for stream in streams]
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    dtype = streams[0][2].dtype

    def turned(x: Array, start: int) -> Array:
        return apply_rope(x, Rope(*(table[start : start + x.shape[1]] for table in conditions.rope))).astype(dtype)

    if conditions.context is not None:
        image, text = ((turned(q, start), turned(k, start), v) for (q, k, v), start in zip(streams, starts, strict=True))
        txt_lengths = conditions.kv_lengths - conditions.context.length
        results = context_attention(image, text, txt_lengths=txt_lengths, how=conditions.context)
        return [rearrange(x, "b l h d -> b l (h d)") for x in results]
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*streams, strict=True))
    out = attention(turned(q, 0), turned(k, 0), v, kv_lengths=conditions.kv_lengths, backend=conditions.backend)
    out = rearrange(out, "b m h d -> b m (h d)")
    return [out[:, start : start + length] for start, length in zip(starts, lengths, strict=True)]


class DoubleBlock(nn.Module):
    """Image and text streams with their own weights; one attention over both."""

    config: DiTConfig

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], conditions: Conditions) -> tuple[tuple[Array, Array], None]:
        img, txt = streams
        img_attn_mod, img_mlp_mod = self.modulation("img", *conditions.of_stream(0, img.shape[1]))
        txt_attn_mod, txt_mlp_mod = self.modulation("txt", conditions.vec[:, :1], None)

        img_qkv = self.normed_heads("img", in_products(modulate(img, img_attn_mod.shift, img_attn_mod.scale), IMAGE))
        txt_qkv = self.normed_heads("txt", in_products(modulate(txt, txt_attn_mod.shift, txt_attn_mod.scale), TEXT))
        img_attn, txt_attn = joint_attention((img_qkv, txt_qkv), conditions)

        img = gated_add(img, img_attn_mod.gate, between_products(self.projection("img", img_attn), IMAGE))
        txt = gated_add(txt, txt_attn_mod.gate, between_products(self.projection("txt", txt_attn), TEXT))
        img_mlp = self.mlp("img", in_products(modulate(img, img_mlp_mod.shift, img_mlp_mod.scale), IMAGE))
        txt_mlp = self.mlp("txt", in_products(modulate(txt, txt_mlp_mod.shift, txt_mlp_mod.scale), TEXT))
        img = gated_add(img, img_mlp_mod.gate, between_products(img_mlp, IMAGE))
        txt = gated_add(txt, txt_mlp_mod.gate, between_products(txt_mlp, TEXT))
        return (between_products(img, IMAGE), between_products(txt, TEXT)), None

    def modulation(self, stream: str, vec: Array, clean: Array | None) -> tuple[ModulationOut, ...]:
        return Modulation(2, self.config.compute_dtype, name=f"{stream}_mod")(vec, clean)

    def normed_heads(self, stream: str, x: Array) -> tuple[Array, Array, Array]:
        c = self.config
        q, k, v = split_heads(linear(3 * c.width, name=f"{stream}_attn_qkv", dtype=c.compute_dtype)(x), c.num_heads)
        return RMSNorm(name=f"{stream}_attn_q_norm")(q), RMSNorm(name=f"{stream}_attn_k_norm")(k), v

    def projection(self, stream: str, attn: Array) -> Array:
        return linear(self.config.width, name=f"{stream}_attn_proj", dtype=self.config.compute_dtype)(attn)

    def mlp(self, stream: str, x: Array) -> Array:
        return MLP(self.config.mlp_hidden, gelu_tanh, self.config.compute_dtype, name=f"{stream}_mlp")(x)


class SingleBlock(nn.Module):
    """The joint sequence under one set of weights; attention and MLP side by side, between two wide projections.

    It comes as one stream, or as two, image and text, where devices share image tokens.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, streams: tuple[Float[Array, "B L D"], ...], conditions: Conditions) -> tuple[tuple[Array, ...], None]:
        c = self.config
        modulation = Modulation(1, c.compute_dtype, name="modulation")
        linear1 = linear(3 * c.width + c.mlp_hidden, name="linear1", dtype=c.compute_dtype)
        linear2 = linear(c.width, name="linear2", dtype=c.compute_dtype)
        q_norm, k_norm = RMSNorm(name="q_norm"), RMSNorm(name="k_norm")
        heads, mlps, gates, start = [], [], [], 0
        kinds = (IMAGE, TEXT)[: len(streams)]  # where all are one stream, `sequence` has one device
        for x, kind in zip(streams, kinds, strict=True):
            (mod,) = modulation(*conditions.of_stream(start, x.shape[1]))
            start += x.shape[1]
            qkv, mlp = jnp.split(linear1(in_products(modulate(x, mod.shift, mod.scale), kind)), [3 * c.width], axis=-1)
            q, k, v = split_heads(qkv, c.num_heads)
            heads.append((q_norm(q), k_norm(k), v))
            mlps.append(mlp)
            gates.append(mod.gate)
        out = []
        for x, kind, attn, mlp, gate in zip(streams, kinds, joint_attention(heads, conditions), mlps, gates, strict=True):
            more = between_products(linear2(jnp.concatenate([attn, gelu_tanh(mlp)], axis=-1)), kind)
            out.append(between_products(gated_add(x, gate, more), kind))
        return tuple(out), None


class PatchEmbed(nn.Module):
    """One linear map from the latents of a patch to a token; tokens lie in the order (frame, row, column)."""

    config: DiTConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "B T Y X C"]) -> Float[Array, "B L D"]:
        pt, py, px = self.config.patch_size
        patches = rearrange(latents, "b (t pt) (y py) (x px) c -> b (t y x) (c pt py px)", pt=pt, py=py, px=px)
        init = nn.initializers.xavier_uniform()
        return linear(self.config.width, name="proj", dtype=self.config.compute_dtype, kernel_init=init, within="img_in")(patches)


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from a token to the outputs of its patch, channels slowest; zero at the start."""

    config: DiTConfig

    @nn.compact
    def __call__(self, img: Float[Array, "B L D"], vec: Float[Array, "B D"]) -> Float[Array, "B L F"]:
        c = self.config
        modulation = linear(2 * c.width, name="adaLN_modulation", dtype=c.compute_dtype, kernel_init=ZERO_INIT)(nn.silu(vec))
        shift, scale = jnp.split(modulation[:, None, :].astype(jnp.float32), 2, axis=-1)
        features = c.out_channels * math.prod(c.patch_size)
        last = linear(features, name="linear", dtype=c.compute_dtype, kernel_init=ZERO_INIT, within="final_layer")
        return last(modulate(img, shift, scale))


class DiT(nn.Module):
    """Velocity of noisy latents; see `__call__`."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B T Y X C"],
        t: Float[Array, " B"],
        txt: Float[Array, "B S F"],
        txt_mask: Bool[Array, "B S"],
        pooled: Float[Array, "B P"],
        guidance: Float[Array, " B"] | None = None,
        *,
        clean_frames: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T Y X C_out"]:
        """Velocity (noise - data) of `latents` at time `t` in [0, 1], where 1 is noise; float32.

        `txt_mask` marks the valid text states, of which there may be none; the others contribute exactly nothing. `guidance` is
        the plain scale (6.0, say), given exactly when the config has `guidance_embed`. The first `clean_frames` latent frames of
        each sample are taken as given: their tokens are modulated as at time 0 and without guidance.

        Rows and columns that are no multiple of the patch are padded at the end by repeating the last one, and the output is
        cropped; frames likewise. Raises `UserError` where inputs and config do not fit.
        """
        c = self.config
        check_inputs(c, latents, txt, pooled, guidance)
        size = latents.shape[1:4]
        latents = pad_to_patches(latents.astype(c.compute_dtype), c.patch_size)
        grid = tuple(n // p for n, p in zip(latents.shape[1:4], c.patch_size, strict=True))
        txt, txt_lengths = valid_first(txt, txt_mask)

        time_features = sinusoid(TIME_SCALE * t)
        vec = placed(self.modulation_vectors(time_features, pooled, guidance, with_clean=clean_frames is not None), "samples")
        img = PatchEmbed(c, name="img_in")(latents)
        num_img, devices = img.shape[1], sequence_size()
        img = between_products(jnp.pad(img, ((0, 0), (0, -num_img % devices), (0, 0))), IMAGE)
        txt = TokenRefiner(c, name="txt_in")(txt, time_features, txt_lengths)
        conditions = joint_conditions(c, grid, vec, txt_lengths, num_txt=txt.shape[1], clean_frames=clean_frames, devices=devices)

        if c.num_double_blocks:
            blocks = stacked(DoubleBlock, length=c.num_double_blocks, remat=c.remat)
            (img, txt), _ = blocks(c, name="double_blocks")((img, txt), conditions)
        streams = (img, txt) if devices > 1 else (jnp.concatenate([img, txt], axis=1),)
        if c.num_single_blocks:
            streams, _ = stacked(SingleBlock, length=c.num_single_blocks, remat=c.remat)(c, name="single_blocks")(streams, conditions)
        patches = FinalLayer(c, name="final_layer")(in_products(streams[0], IMAGE)[:, :num_img], vec[:, 0])
        return unpatchify(patches, grid, c.patch_size)[:, : size[0], : size[1], : size[2]].astype(jnp.float32)

    def modulation_vectors(self, time_features: Array, pooled: Array, guidance: Array | None, *, with_clean: bool) -> Float[Array, "B E D"]:
        """The vector of the noisy segment and, where asked for, that of the clean one: at time 0, without guidance."""
        c = self.config
        dtype = c.compute_dtype
        time_in = MLPEmbedder(c.width, dtype, EMBEDDING_INIT, name="time_in")
        text = MLPEmbedder(c.width, dtype, name="vector_in")(pooled)
        vec = time_in(time_features) + text
        if guidance is not None:
            guidance_in = MLPEmbedder(c.width, dtype, EMBEDDING_INIT, name="guidance_in")
            vec = vec + guidance_in(sinusoid(scaled_guidance(guidance, dtype)))
        if not with_clean:
            return vec[:, None]
        return jnp.stack([vec, time_in(sinusoid(jnp.zeros(len(text)))) + text], axis=1)


def check_inputs(config: DiTConfig, latents: Array, txt: Array, pooled: Array, guidance: Array | None) -> None:
    """Raises `UserError` where the inputs are not those of this model."""
    widths = (("latents", latents, config.in_channels), ("txt", txt, config.text_dim), ("pooled", pooled, config.pooled_dim))
    for name, array, expected in widths:
        if array.shape[-1] != expected:
            raise UserError(f"This DiT takes {name} with {expected} channels, but they came with {array.shape[-1]}; check the config.")
    if config.guidance_embed and guidance is None:
        raise UserError("This DiT has a guidance embedding and always needs a guidance scale; pass one per sample (6.0 is usual).")
    if not config.guidance_embed and guidance is not None:
        raise UserError("This DiT has no guidance embedding, so guidance must be None; use two-pass guidance, or set guidance_embed.")


def scaled_guidance(guidance: Float[Array, " B"], dtype: DTypeLike) -> Float[Array, " B"]:
    """Guidance as the embedding takes it: a thousand times the scale, rounded as the compute dtype rounds (6.0 is 6016 in bfloat16).

    The released weights were distilled with that rounding. It is asked of the compiler by name, which may otherwise drop it.
    """
    bits = jnp.finfo(dtype)

    def rounded(x: Array) -> Array:
        return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

    return rounded(TIME_SCALE * rounded(guidance.astype(jnp.float32)))


def pad_to_patches(latents: Float[Array, "B T Y X C"], patch_size: tuple[int, int, int]) -> Float[Array, "B T_ Y_ X_ C"]:
    """Repeats the last frame, row and column until each axis is a multiple of the patch."""
    ends = [(0, -n % p) for n, p in zip(latents.shape[1:4], patch_size, strict=True)]
    return jnp.pad(latents, [(0, 0), *ends, (0, 0)], mode="edge") if any(end for _, end in ends) else latents


def unpatchify(patches: Float[Array, "B L F"], grid: tuple[int, ...], patch_size: tuple[int, int, int]) -> Float[Array, "B T Y X C"]:
    """Tokens of a (T, Y, X) grid back to latents; a token's outputs lie channel-major, as (c, pt, py, px)."""
    t, y, x = grid
    pt, py, px = patch_size
    return rearrange(patches, "b (t y x) (c pt py px) -> b (t pt) (y py) (x px) c", t=t, y=y, x=x, pt=pt, py=py, px=px)


def valid_first(txt: Float[Array, "B S F"], txt_mask: Bool[Array, "B S"]) -> tuple[Float[Array, "B S F"], Int[Array, " B"]]:
    """Moves the valid text states to the front, in order, and zeroes the rest; and the number of valid ones.

    Text tokens have no positions, so their order means nothing, and a length can stand for any mask.
    """
    order = jnp.argsort(~txt_mask, axis=1, stable=True)
    lengths = jnp.sum(txt_mask, axis=1, dtype=jnp.int32)
    txt = jnp.take_along_axis(txt, order[:, :, None], axis=1)
    valid = jnp.arange(txt.shape[1]) < lengths[:, None]
    return jnp.where(valid[:, :, None], txt, 0), lengths


def joint_conditions(
    config: DiTConfig,
    grid: tuple[int, ...],
    vec: Array,
    txt_lengths: Array,
    *,
    num_txt: int,
    clean_frames: Array | None,
    devices: int = 1,
) -> Conditions:
    """The conditions of the joint sequence [image tokens, text tokens], image tokens filled up to a multiple of `devices`."""
    t, y, x = grid
    num_img = t * y * x
    after = -num_img % devices + num_txt
    image = rope_table((t, y, x), config.rope_axes, config.rope_theta)
    still = jnp.zeros((after, image.cos.shape[1]), jnp.float32)
    rope = Rope(cos=jnp.concatenate([image.cos, still + 1]), sin=jnp.concatenate([image.sin, still]))
    clean = None
    if clean_frames is not None:
        frame = jnp.arange(num_img) // (y * x) * config.patch_size[0]
        clean = jnp.pad(frame < clean_frames[:, None], ((0, 0), (0, after)))
    context = None
    backend = backend_for(config.attention, config.compute_dtype)
    mesh = jax.sharding.get_abstract_mesh()
    degree = 1 if mesh.empty else config.degree_on(mesh.shape)
    if devices > 1:
        context = How(num_img, degree, backend)
    return Conditions(vec=vec, clean=clean, rope=rope, kv_lengths=num_img + txt_lengths, backend=backend, context=context)
