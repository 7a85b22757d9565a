"""Training the causal 3D VAE. Paper section 4.1.

loss = mean |decode(z) - frames| + 0.1 LPIPS + 0.05 adversarial + 1e-6 KL(posterior || N(0, 1)) per latent value,  z ~ posterior

LPIPS takes part where the config names files with its weights, the adversary where the config has a section `critic`. Batches of a
`tiled` bucket are encoded and decoded in the tiles of the section `tiling`; a `seam_weight`, which the paper has not, adds how far that is
from what the whole clip is decoded to. The mesh's axis `sequence` splits the rows of frames.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset
from hunyuan_jax.data.transforms import to_uint8
from hunyuan_jax.errors import UserError
from hunyuan_jax.flops import product_flops
from hunyuan_jax.lpips_weights import load_lpips
from hunyuan_jax.models import critics
from hunyuan_jax.models.vae import VAE, Posterior, VAEConfig
from hunyuan_jax.models.vae_tiling import Method, Tiling, in_tiles
from hunyuan_jax.parallel.sharding import gathered, placed, split_rows
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.critic import CriticConfig, Gradients, lesson, opinion
from hunyuan_jax.tasks.task import Params, normal_like, sample_keys

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
GREY_LEVELS = 255 / 2  # of a difference between values in [-1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """Weights of the loss beside L1's; those of KL and LPIPS are the paper's. The adversary's is in the section `critic`.

    `lpips_files` are the files that hold LPIPS' weights, separated by commas (see lpips_weights.py); without any, LPIPS is off.
    `lpips_frames` is how many frames of each clip LPIPS sees in training, drawn anew each time; 0 means all. `seam_weight` multiplies the
    mean difference of a tiled batch from the same clips in whole, which are computed beside it, forward and backward: both give way.
    """

    kl_weight: float = 1e-6
    seam_weight: float = 0.0
    lpips_weight: float = 0.1
    lpips_files: str = ""
    lpips_frames: int = 0

    def __post_init__(self) -> None:
        if self.lpips_frames < 0:
            raise UserError(f"loss: lpips_frames must be at least 0, not {self.lpips_frames}.")
        if not self.seam_weight >= 0:
            raise UserError(f"loss: seam_weight must be at least 0, not {self.seam_weight}.")


class Drawn(NamedTuple):
    """Frames decoded from drawn latents, and where seams are weighed those of the same clips in whole."""

    frames: Float[Array, "B T H W 3"]
    whole: Float[Array, "B T H W 3"] | None


def psnr_db(a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"]) -> Float[Array, "B"]:
    """Peak signal-to-noise ratio of clips in [-1, 1], in dB; a perfect copy is reported as 100."""
    error = jnp.mean(jnp.square(jnp.clip(a, -1, 1) - b), axis=(1, 2, 3, 4))
    return -10.0 * jnp.log10(jnp.maximum(error / 4.0, 1e-10))


def ssim(a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"]) -> Float[Array, "B"]:
    """Structural similarity of clips in [-1, 1] (Wang et al. 2004), by frame and channel, averaged over all; 1 for equal ones.

    Gaussian windows of 11 x 11, sigma 1.5, that lie wholly within the frame: frames smaller than that have none, and no number.
    """
    offsets = jnp.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = jnp.exp(-0.5 * jnp.square(offsets / SSIM_SIGMA))
    window /= jnp.sum(window)

    def smooth(x: Float[Array, "N H W"]) -> Float[Array, "N H2 W2"]:
        for kernel in (window[:, None], window[None, :]):
            x = jax.lax.conv(x[:, None], kernel[None, None], (1, 1), "VALID")[:, 0]
        return x

    clips = len(a)
    a, b = (jnp.moveaxis(x, -1, 2).reshape(-1, *x.shape[2:4]) for x in (jnp.clip(a, -1, 1), b))
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    both = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of values that span 2
    similar = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return jnp.mean(similar.reshape(clips, -1), axis=1)


def sharpness(a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"]) -> Float[Array, "B"]:
    """How much of the fine detail of clips `b` clips `a` have: the ratio of the energies of their Laplacians, 1 for equal ones.

    Blurred copies lie below 1, copies with detail of their own, noise for one, above.
    """

    def energy(x: Float[Array, "B T H W 3"]) -> Float[Array, "B"]:
        inner = x[:, :, 1:-1, 1:-1]
        laplacian = x[:, :, :-2, 1:-1] + x[:, :, 2:, 1:-1] + x[:, :, 1:-1, :-2] + x[:, :, 1:-1, 2:] - 4 * inner
        return jnp.mean(jnp.square(laplacian), axis=(1, 2, 3, 4))

    return energy(jnp.clip(a, -1, 1)) / jnp.maximum(energy(b), 1e-10)


@dataclasses.dataclass(frozen=True)
class VAETask:
    """Training of the VAE on clips of frames.

    `lpips` are the weights of LPIPS, `critic` is the adversary, `tiling` the tiles of tiled batches, each None where it is off.
    """

    component: ClassVar[str] = "vae"
    encode_prompts: ClassVar[None] = None

    model: VAEConfig
    loss_config: VAELossConfig
    lpips: Params = None
    critic: CriticConfig | None = None
    tiling: Tiling | None = None

    @classmethod
    def from_config(cls, config: ConfigDict, dataset: Dataset) -> "VAETask":
        loss = build(VAELossConfig, config.loss, where="loss")
        lpips = load_lpips(loss.lpips_files.split(",")) if loss.lpips_files else None
        if lpips is None:
            logging.info("LPIPS is off: loss.lpips_files names no file with its weights.")
        model = build(VAEConfig, config.model, where="model")
        tiling = build(Tiling, config.tiling, where="tiling") if config.get("tiling") else None
        if tiling is not None:
            tiling.check(model)
        elif any(bucket.get("tiled") for bucket in config.data.buckets):
            raise UserError("data.buckets has a tiled bucket, and the configuration no section tiling with its `tile` and `overlap`.")
        return cls(model, loss, lpips, CriticConfig.from_section(config.get("critic")), tiling)

    @classmethod
    def planned(cls, config: ConfigDict) -> "VAETask":
        files_apart = ConfigDict(config.to_dict())
        files_apart.loss.lpips_files = ""
        lpips = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), critics.lpips_shapes())
        return dataclasses.replace(cls.from_config(files_apart, None), lpips=lpips)  # type: ignore[arg-type]

    def batch_shapes(self, bucket: Bucket) -> VideoBatch:
        frames: Any = jax.ShapeDtypeStruct((bucket.batch, *bucket.shape, 3), jnp.float32)
        ids: Any = jax.ShapeDtypeStruct((bucket.batch,), jnp.uint32)
        return VideoBatch(sample_id=ids, frames=frames, tiled=bucket.tiled)

    def describe(self) -> dict[str, Any]:
        said = {"task": "vae", "model": dataclasses.asdict(self.model)}
        return said if self.critic is None else said | {"critic": dataclasses.asdict(self.critic.model)}

    def keep_beside(self, workdir: Path) -> None:
        """Nothing: the parameters are all there is."""

    def init(self, key: PRNGKeyArray) -> Params:
        frames = jnp.zeros((1, 1 + self.model.temporal_compression, *(2 * [2 * self.model.spatial_compression]), 3))
        return VAE(self.model).init(key, frames)["params"]

    def init_critic(self, key: PRNGKeyArray) -> Params:
        assert self.critic is not None
        return critics.init_discriminator(self.critic.model, key)

    def draw(self, params: Params, batch: VideoBatch, key: PRNGKeyArray) -> tuple[Float[Array, "B T H W 3"], Float[Array, ""]]:
        """Frames decoded from latents drawn from their posterior, and its KL per latent value."""
        params = gathered(params)
        posterior = self.encode(params, batch.frames, tiled=batch.tiled)
        latents = posterior.sample(normal_like(sample_keys(key, batch), posterior.mean))
        return self.decode(params, latents, tiled=batch.tiled), jnp.mean(posterior.kl()) / posterior.mean[0].size

    def encode(self, params: Params, frames: Float[Array, "B T H W 3"], *, tiled: bool) -> Posterior:
        return Posterior.from_moments(self._code(params, "moments", frames, tiled=tiled))

    def decode(self, params: Params, latents: Float[Array, "B T Y X C"], *, tiled: bool) -> Float[Array, "B T2 H W 3"]:
        return self._code(params, "decode", latents, tiled=tiled)

    def _code(self, params: Params, method: Method, x: Float[Array, "B T H W C"], *, tiled: bool) -> Any:
        """A method of the VAE on frames or latents whose rows are split over devices, in tiles on those of each tile."""

        def code(x: Float[Array, "B T H W C"]) -> Any:
            return VAE(self.model).apply({"params": params}, split_rows(x), method=method)

        if not tiled:
            return code(x)
        assert self.tiling is not None
        # Tiles are cut from, and joined to, whole rows: their edges are not those between devices.
        return split_rows(in_tiles(self.model, method, lambda tile: placed(code(tile), "samples"), placed(x, "samples"), self.tiling))

    def also_in_whole(self, batch: VideoBatch) -> bool:
        """Whether a batch goes through the VAE a second time, to weigh its seams."""
        return batch.tiled and self.loss_config.seam_weight > 0

    def drawn(self, params: Params, batch: VideoBatch, key: PRNGKeyArray) -> tuple[Drawn, Float[Array, ""]]:
        """What `draw` gives of a batch, and of one whose seams are weighed what it gives of that in whole."""
        frames, kl = self.draw(params, batch, key)
        whole = self.draw(params, dataclasses.replace(batch, tiled=False), key)[0] if self.also_in_whole(batch) else None
        return Drawn(frames, whole), kl

    def fidelity(self, drawn: Drawn, batch: VideoBatch, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """L1 and LPIPS between frames and those of the batch, and L1 to those in whole; their weighted sum, and each apart."""
        c, (frames, whole) = self.loss_config, drawn
        loss = l1 = jnp.mean(jnp.abs(frames - batch.frames))
        terms = {"l1": l1, "psnr_db": jnp.mean(psnr_db(frames, batch.frames))}
        if whole is not None:
            terms["seam"] = jnp.mean(jnp.abs(frames - whole))
            loss += c.seam_weight * terms["seam"]
        if self.lpips is not None:
            keys = sample_keys(jax.random.fold_in(key, 0x1B1), batch)
            terms["lpips"] = jnp.mean(self._lpips(frames, batch.frames, keys=keys, frames=c.lpips_frames))
            loss += c.lpips_weight * terms["lpips"]
        return loss, terms

    def _lpips(self, *clips: Float[Array, "B T H W 3"], **how: Any) -> Float[Array, "B"]:
        # Behind a barrier the weights stay as they are, where compilers would spend minutes on reordering constants of this size.
        return critics.lpips_of_clips(jax.lax.optimization_barrier(self.lpips), *clips, **how)

    def loss(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss without the adversary."""
        drawn, kl = self.drawn(params, batch, key)
        fidelity, terms = self.fidelity(drawn, batch, key)
        return fidelity + self.loss_config.kl_weight * kl, terms | {"kl": kl}

    def gradients(self, params: Params, critic: Params, batch: VideoBatch, *, key: PRNGKeyArray, step: Int[Array, ""]) -> Gradients:
        """The whole loss and both networks' gradients.

        The losses are followed back to the frames one by one, and from the frames through the VAE together; the last layer's
        gradients of each, which the adaptive weight compares, are the last link of that way and cost next to nothing.
        """
        c = self.critic
        assert c is not None
        critic = gathered(critic)
        (drawn, kl), back = jax.vjp(lambda params: self.drawn(params, batch, key), params)
        (fidelity, terms), slope = jax.value_and_grad(lambda drawn: self.fidelity(drawn, batch, key), has_aux=True)(drawn)
        adversarial, adverse_slope = opinion(c, critic, drawn.frames, step=step)
        adverse_slope = jax.tree.map(jnp.zeros_like, drawn)._replace(frames=adverse_slope)

        last_layer = lambda slope: back((slope, jnp.zeros_like(kl)))[0]["decoder"]["conv_out"]  # noqa: E731
        adaptive = jnp.ones(())
        if c.adaptive:
            adaptive = critics.adaptive_weight(last_layer(slope), last_layer(adverse_slope), limit=c.adaptive_limit)
        adaptive = jnp.where(step >= c.joins_at, adaptive, 0.0)
        weight = c.weight * adaptive
        slope = jax.tree.map(lambda slope, adverse: slope + weight * adverse, slope, adverse_slope)
        (grads,) = back((slope, jnp.full_like(kl, self.loss_config.kl_weight)))

        critic_loss, balance, critic_grads = lesson(c, critic, drawn.frames, batch.frames, step=step)
        more = {"kl": kl, "adversarial": adversarial, "d_loss": critic_loss, "adaptive_weight": adaptive, "balance": balance}
        loss = fidelity + weight * adversarial + self.loss_config.kl_weight * kl
        return Gradients(
            loss=loss, model=grads, critic=critic_grads, critic_loss=critic_loss, learns=step >= c.start_step, metrics=terms | more
        )

    def reconstruct(self, params: Params, frames: Float[Array, "B T H W 3"], *, tiled: bool = False) -> Float[Array, "B T H W 3"]:
        """Frames through the posterior's mean."""
        params = gathered(params)
        return self.decode(params, self.encode(params, frames, tiled=tiled).mean, tiled=tiled)

    def measure(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, Float[Array, "B"]]:
        """PSNR, SSIM, sharpness and, where its weights are, LPIPS of reconstructions; of tiled ones the seam error too.

        The seam error is the mean difference between what tiles and what the whole clip at once make of a clip, in grey levels of 255.
        """
        out = self.reconstruct(params, batch.frames, tiled=batch.tiled)
        measured = {"psnr_db": psnr_db(out, batch.frames), "ssim": ssim(out, batch.frames), "sharpness": sharpness(out, batch.frames)}
        if batch.tiled:
            whole = self.reconstruct(params, batch.frames)
            seams = jnp.abs(jnp.clip(out, -1, 1) - jnp.clip(whole, -1, 1))
            measured["seam_error"] = GREY_LEVELS * jnp.mean(seams, axis=(1, 2, 3, 4))
        return gathered(measured if self.lpips is None else measured | {"lpips": self._lpips(out, batch.frames)})

    @functools.cached_property
    def _reconstruct(self) -> Any:
        return jax.jit(lambda params, frames: gathered(self.reconstruct(params, frames)))  # compiled once for all previews

    def seen(self, batch: VideoBatch) -> np.ndarray:
        return to_uint8(np.asarray(batch.frames))

    def preview(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Reconstructions of the clips."""
        return {"reconstruction": to_uint8(np.asarray(self._reconstruct(params, batch.frames)))}

    def work(self, batch: VideoBatch) -> dict[str, float]:
        """FLOPs are those of the VAE: what judges its frames, LPIPS or a critic, is not the model."""
        samples, frames = batch.frames.shape[:2]
        clip = jax.ShapeDtypeStruct((1, *batch.frames.shape[1:]), jnp.float32)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # the whole clip, not a device's part
            params = jax.eval_shape(self.init, jax.random.key(0))
            forward = sum(
                product_flops(functools.partial(self.reconstruct, tiled=tiled), params, clip, needed=True)
                for tiled in ((True, False) if self.also_in_whole(batch) else (batch.tiled,))
            )
        return {"frames": samples * frames, "model_flops": 3.0 * samples * forward}
