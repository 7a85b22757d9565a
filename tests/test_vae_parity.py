"""Parity with diffusers' HunyuanVideo VAE: random weights everywhere, read from the files diffusers writes, on the CPU.

Ours runs in float32 and theirs, after writing its float32 weights, in float64: what differs is our rounding alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLHunyuanVideo  # noqa: E402

from hunyuan_jax import convert  # noqa: E402
from hunyuan_jax.models.vae import VAE  # noqa: E402
from hunyuan_jax.weights import weights_of  # noqa: E402

CASES = [((1, 40, 24), "planes"), ((9, 40, 24), "volume")]
TOLERANCE = 1e-5  # largest difference over largest value


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """diffusers' model, and ours read from its files."""
    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=4).eval()
    for name, parameter in theirs.named_parameters():
        # Also what starts at 0 or 1 is random, or a norm's scale could be lost without notice.
        is_scale = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = theirs.use_slicing = theirs.use_tiling = False
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    return theirs.double(), *convert.load(folder, component="vae")


def last(x: torch.Tensor) -> np.ndarray:
    """Channels last."""
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def relative_error(ours: jax.Array, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("size", "convolution"), CASES)
def test_encoding_agrees_with_diffusers(models, size, convolution):
    theirs, config, params = models
    frames = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(torch.from_numpy(frames).double().permute(0, 4, 1, 2, 3)).latent_dist
    vae = VAE(dataclasses.replace(config, convolution=convolution))
    ours = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))(params, jnp.asarray(frames))
    assert relative_error(ours.mean, last(expected.mean)) <= TOLERANCE
    assert relative_error(ours.logvar, last(expected.logvar)) <= TOLERANCE


@pytest.mark.parametrize(("size", "convolution"), CASES)
def test_decoding_agrees_with_diffusers(models, size, convolution):
    theirs, config, params = models
    latents = np.random.default_rng(2).normal(size=(2, *config.latent_shape(*size))).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(latents).double().permute(0, 4, 1, 2, 3)).sample
    vae = VAE(dataclasses.replace(config, convolution=convolution))
    ours = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="decode"))(params, jnp.asarray(latents))
    assert ours.shape == (2, *size, 3)
    assert relative_error(ours, last(expected)) <= TOLERANCE


def test_a_saved_vae_is_read_by_diffusers(models, tmp_path):
    theirs, config, params = models
    convert.write(weights_of(config, params), tmp_path, "diffusers")
    again = AutoencoderKLHunyuanVideo.from_pretrained(tmp_path, local_files_only=True)
    for (name, there), (_, here) in zip(again.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(there.double(), here), name
