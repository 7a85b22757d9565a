"""Training the causal 3D VAE: L1 between frames and their reconstruction, plus a weak KL. Paper section 4.1.

loss = mean |decode(z) - frames| + kl_weight * KL(posterior || N(0, 1)) per latent value,  z ~ posterior
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.dataset import Dataset
from hunyuan_jax.data.transforms import to_uint8
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.task import Params, normal_like, sample_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """Weights of the loss; the paper's KL weight is 1e-6."""

    kl_weight: float = 1e-6


def psnr_db(a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"]) -> Float[Array, "B"]:
    """Peak signal-to-noise ratio of clips in [-1, 1], in dB; a perfect copy is reported as 100."""
    error = jnp.mean(jnp.square(jnp.clip(a, -1, 1) - b), axis=(1, 2, 3, 4))
    return -10.0 * jnp.log10(jnp.maximum(error / 4.0, 1e-10))


@dataclasses.dataclass(frozen=True)
class VAETask:
    """Training of the VAE on clips of frames."""

    component: ClassVar[str] = "vae"

    model: VAEConfig
    loss_config: VAELossConfig

    @classmethod
    def from_config(cls, config: ConfigDict, dataset: Dataset) -> "VAETask":
        return cls(build(VAEConfig, config.model, where="model"), build(VAELossConfig, config.loss, where="loss"))

    def describe(self) -> dict[str, Any]:
        return {"task": "vae", "model": dataclasses.asdict(self.model)}

    def keep_beside(self, workdir: Path) -> None:
        """Nothing: the parameters are all there is."""

    def init(self, key: PRNGKeyArray) -> Params:
        frames = jnp.zeros((1, 1 + self.model.temporal_compression, *(2 * [2 * self.model.spatial_compression]), 3))
        return VAE(self.model).init(key, frames)["params"]

    def loss(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        vae = VAE(self.model)
        posterior: Any = vae.apply({"params": params}, batch.frames, method="encode")
        latents = posterior.sample(normal_like(sample_keys(key, batch), posterior.mean))
        frames: Any = vae.apply({"params": params}, latents, method="decode")
        l1 = jnp.mean(jnp.abs(frames - batch.frames))
        kl = jnp.mean(posterior.kl()) / posterior.mean[0].size
        loss = l1 + self.loss_config.kl_weight * kl
        return loss, {"l1": l1, "kl": kl, "psnr_db": jnp.mean(psnr_db(frames, batch.frames))}

    def reconstruct(self, params: Params, frames: Float[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
        out: Any = VAE(self.model).apply({"params": params}, frames)
        return out

    def measure(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, Float[Array, "B"]]:
        return {"psnr_db": psnr_db(self.reconstruct(params, batch.frames), batch.frames)}

    @functools.cached_property
    def _reconstruct(self) -> Any:
        return jax.jit(self.reconstruct)  # compiled once for all previews

    def preview(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Held-out clips above their reconstructions."""
        out = self._reconstruct(params, batch.frames)
        return {"reconstruction": to_uint8(np.concatenate([np.asarray(batch.frames), np.asarray(out)], axis=2))}
