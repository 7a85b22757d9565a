"""The networks that judge the VAE's frames: LPIPS, which never learns, and a patch discriminator, which learns beside the VAE.

    LPIPS(a, b)           VGG-16 features of two images after relu1_2, 2_2, 3_3, 4_3 and 5_3, each scaled to length 1 at every
                          position; squared differences, weighted by channel, averaged over positions, summed over the five
    Discriminator(x)      clips B T H W 3 or images (T = 1) -> a logit for each patch, above 0 where it takes them for data

and how they enter a loss: hinge losses, and the weight that keeps the adversary's gradient in proportion. LPIPS is Zhang et al.
2018 with the constants of its package, version 0.1; patches are Isola et al. 2017, the weight is Esser et al. 2021 (VQGAN).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import Conv3D
from hunyuan_jax.parallel.sharding import placed, sequence_size

# --- LPIPS ---------------------------------------------------------------------------------------------------------------------

# By stage the (input, output) channels of VGG-16's convolutions; a stage ends where LPIPS looks, the next begins by max pooling.
VGG_STAGES = (
    ((3, 64), (64, 64)),
    ((64, 128), (128, 128)),
    ((128, 256), (256, 256), (256, 256)),
    ((256, 512), (512, 512), (512, 512)),
    ((512, 512), (512, 512), (512, 512)),
)
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The features of VGG-16 after the last ReLU of each of its five stages."""

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> list[Float[Array, "N H2 W2 C"]]:
        features = []
        for i, convolutions in enumerate(VGG_STAGES):
            if i:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for j, (_, channels) in enumerate(convolutions):
                x = nn.relu(nn.Conv(channels, (3, 3), name=f"conv{i + 1}_{j + 1}")(x))
            features.append(x)
        return features


def unit_length(x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
    """Features of length 1 at each position. Where all are 0 they stay so, and so does their gradient."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return x / (length + 1e-10)


class LPIPS(nn.Module):
    """The perceptual distance of images in [-1, 1]; 0 for equal ones. Height and width must be at least 16."""

    @nn.compact
    def __call__(self, a: Float[Array, "N H W 3"], b: Float[Array, "N H W 3"]) -> Float[Array, "N"]:
        shift, scale = jnp.array(LPIPS_SHIFT), jnp.array(LPIPS_SCALE)
        # Both at once, so that the network is one in the program, and side by side, so that a pair's distance is found on one device.
        features = VGG16(name="vgg")((jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]) - shift) / scale)
        distance = jnp.zeros(len(a))
        for i, both in enumerate(features):
            one, other = jnp.moveaxis(unit_length(both).reshape(len(a), 2, *both.shape[1:]), 1, 0)
            weights = self.param(f"lin{i}", nn.initializers.constant(1.0 / both.shape[-1]), (both.shape[-1],))
            distance += jnp.mean(jnp.square(one - other) @ weights, axis=(1, 2))
        return distance


def lpips_shapes() -> Any:
    """Shapes and dtypes of the parameters of `LPIPS`."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(lambda x: LPIPS().init(jax.random.key(0), x, x)["params"], image)


def lpips_of_clips(
    params: Any, a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"], *, keys: PRNGKeyArray | None = None, frames: int = 0
) -> Float[Array, "B"]:
    """The mean LPIPS of the clips' frames; of `frames` of them alone, drawn by each clip's key, where it is above 0.

    Devices that share the rows of a clip share its frames instead, each whole, where these divide.
    """
    if 0 < frames < a.shape[1]:
        chosen = jax.vmap(lambda key: jax.random.choice(key, a.shape[1], (frames,), replace=False))(keys)
        a, b = (jax.vmap(lambda clip, index: clip[index])(x, chosen) for x in (a, b))
    if a.shape[1] % sequence_size() == 0:
        a, b = (placed(x, "samples", "whole frames") for x in (a, b))
    distance: Any = LPIPS().apply({"params": params}, *(x.reshape(-1, *x.shape[2:]) for x in (a, b)))
    return jnp.mean(distance.reshape(a.shape[:2]), axis=1)


# --- The discriminator -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Widths of the levels; the defaults are the large one, 11.1M parameters, and (16, 32, 64) is enough for small clips.

    Each level but the last halves height and width, the last `time_halvings` of these also the number of frames: by default a
    logit belongs to 8 x 8 pixels and 4 frames, as a latent does. `power_steps` is the number of power iterations behind each
    spectral norm; `convolution` is that of `VAEConfig`.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    time_halvings: int = 2
    power_steps: int = 4
    convolution: Literal["volume", "planes"] = "volume"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) < 2 or min(self.widths) < 1 or self.power_steps < 1:
            raise UserError(f"critic: at least two widths and one of power_steps are needed, not {self.widths} and {self.power_steps}.")
        if not 0 <= self.time_halvings < len(self.widths):
            raise UserError(f"critic: time_halvings must be between 0 and {len(self.widths) - 1}, not {self.time_halvings}.")
        if self.convolution not in ("volume", "planes"):
            raise UserError(f"critic: convolution must be 'volume' or 'planes', not {self.convolution!r}.")

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """The (time, height, width) stride of each level."""
        halvings = len(self.widths) - 1
        return (*((1 if i < halvings - self.time_halvings else 2, 2, 2) for i in range(halvings)), (1, 1, 1))


def spectrally_normal(kernel: Float[Array, "t h w C D"], *, steps: int) -> Float[Array, "t h w C D"]:
    """The kernel, divided by the largest singular value of its matrix [t h w C, D].

    The value comes from a few power iterations that begin at the same vector each time, not from a vector carried from step to
    step: nothing is kept besides the parameters. It is a lower bound, a few per cent off at most once a direction stands out.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1])
    fixed = jax.lax.stop_gradient(matrix)
    right = jax.random.normal(jax.random.key(0), matrix.shape[1:])
    for _ in range(steps):
        left = _unit(fixed @ right)
        right = _unit(left @ fixed)
    return kernel / jnp.maximum(left @ matrix @ right, 1e-12)


def _unit(x: Float[Array, "N"]) -> Float[Array, "N"]:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class SpectralConv(nn.Module):
    """A 4 x 4 x 4 convolution of spectral norm 1 with bias that repeats the edges; a size n becomes ceil(n / stride).

    Four is a multiple of the stride 2, so that every pixel is seen equally often and gradients have no chequered pattern. In time
    one frame repeated is a still clip, which makes images no special case.
    """

    config: DiscriminatorConfig
    features: int
    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T2 H2 W2 D"]:
        c = self.config

        def normalised(variables: Mapping[str, Any]) -> Mapping[str, Any]:
            params = variables["params"]
            return {"params": {**params, "kernel": spectrally_normal(params["kernel"], steps=c.power_steps)}}

        convolution: Any = nn.map_variables(Conv3D, "params", trans_in_fn=normalised, init=True)
        how: dict[str, Any] = {"kernel_init": nn.initializers.lecun_normal(), "edges": ((2, 1), (1, 2), (1, 2)), "name": "patch"}
        return convolution(self.features, 4, self.strides, c.convolution, c.dtype, **how)(x)


class Discriminator(nn.Module):
    """A stack of strided 3D convolutions with leaky ReLUs between, and a logit for each patch that it sees.

    Spectral normalisation bounds how fast the logits change with the pixels, which keeps hinge losses stable without statistics
    of the batch or the group: a clip's logits depend on that clip alone and a logit on its own patch alone.
    """

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W 3"]) -> Float[Array, "B T2 Y X"]:
        c = self.config
        for i, (features, strides) in enumerate(zip(c.widths, c.strides, strict=True)):
            x = nn.leaky_relu(SpectralConv(c, features, strides, name=f"level_{i}")(x), 0.2)
        return SpectralConv(c, 1, (1, 1, 1), name="logits")(x)[..., 0].astype(jnp.float32)


def init_discriminator(config: DiscriminatorConfig, key: PRNGKeyArray) -> Any:
    """Fresh parameters, float32."""
    return Discriminator(config).init(key, jnp.zeros((1, 1, 8, 8, 3)))["params"]


# --- Losses ----------------------------------------------------------------------------------------------------------------------


def hinge_loss_of_discriminator(real: Float[Array, "..."], made: Float[Array, "..."]) -> Float[Array, ""]:
    """Half the sum of two hinges: logits of data should be above 1, of what was made below -1."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + made)))


def hinge_loss_of_generator(made: Float[Array, "..."]) -> Float[Array, ""]:
    """What was made should have high logits."""
    return -jnp.mean(made)


def adaptive_weight(fidelity: Any, adversarial: Any, *, limit: float) -> Float[Array, ""]:
    """The norm of one gradient over that of the other, between 0 and `limit`: times this the second is as long as the first.

    The gradients are those of the two losses at the decoder's last layer, as trees of arrays.
    """

    def norm(tree: Any) -> Float[Array, ""]:
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))

    return jax.lax.stop_gradient(jnp.clip(norm(fidelity) / (norm(adversarial) + 1e-4), 0.0, limit))
