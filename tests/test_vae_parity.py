"""Parity with diffusers' HunyuanVideo VAE: random weights everywhere, read from the files diffusers writes, on the CPU.

Ours runs in float32 and theirs, after writing its float32 weights, in float64: what differs is our rounding alone.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLHunyuanVideo  # noqa: E402

from hunyuan_jax import convert  # noqa: E402
from hunyuan_jax.models import vae_tiling  # noqa: E402
from hunyuan_jax.models.vae import VAE  # noqa: E402
from hunyuan_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled  # noqa: E402
from hunyuan_jax.weights import weights_of  # noqa: E402

CASES = [((1, 40, 24), "planes"), ((9, 40, 24), "volume")]
TOLERANCE = 1e-5  # largest difference over largest value
GRADIENT_TOLERANCE = 1e-4
# The released tiling, scaled down: 256 pixels to 32, 64 frames to 16.
TILING = Tiling(tile=(16, 32, 32), overlap=(4, 8, 8))
# One frame and many; trailing tiles of one frame and of some; edges in both directions, in one and in none.
TILED_SIZES = [(1, 40, 56), (21, 40, 32), (25, 48, 40), (33, 24, 24)]


def make_models(folder, *, widths: tuple[int, ...], groups: int, latents: int = 16):
    """diffusers' model, and ours read from its files."""
    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=widths, layers_per_block=1, norm_num_groups=groups, latent_channels=latents)
    for name, parameter in theirs.eval().named_parameters():
        # Also what starts at 0 or 1 is random, or a norm's scale could be lost without notice.
        is_scale = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = theirs.use_slicing = theirs.use_tiling = False
    theirs.save_pretrained(folder)
    return theirs.double(), *convert.load(folder, component="vae")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("vae"), widths=(8, 16, 32, 32), groups=4)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """Smaller ones, of which theirs tiles as `TILING` does."""
    theirs, config, params = make_models(tmp_path_factory.mktemp("tiled"), widths=(4, 4, 8, 8), groups=2, latents=4)
    theirs.enable_tiling(32, 32, 16, 24, 24, 12)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = True
    return theirs, config, params


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


def first(x: np.ndarray) -> torch.Tensor:
    """Channels first, in float64."""
    return torch.tensor(np.asarray(x)).double().permute(0, 4, 1, 2, 3)


def assert_tiled_agree(tiled, size):
    theirs, config, params = tiled
    frames = np.random.default_rng(3).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    latents = np.random.default_rng(4).normal(size=(1, *config.latent_shape(*size))).astype(np.float32)
    with torch.no_grad():
        posterior, decoded = theirs.encode(first(frames)).latent_dist, theirs.decode(first(latents)).sample
    ours = encode_tiled(config, params, frames, TILING)
    assert relative_error(ours.mean, last(posterior.mean)) <= TOLERANCE
    assert relative_error(ours.logvar, last(posterior.logvar)) <= TOLERANCE
    assert relative_error(decode_tiled(config, params, latents, TILING), last(decoded)) <= TOLERANCE


@pytest.mark.parametrize("size", TILED_SIZES)
def test_tiles_are_cut_and_joined_as_in_diffusers(tiled, size, monkeypatch):
    """Each tile goes through diffusers' own network, so that what is compared is the tiling, at many sizes."""
    theirs = tiled[0]

    def coder(config, method, *, devices):
        def code(params, x):
            with torch.no_grad():
                x = first(x)
                return last(theirs.quant_conv(theirs.encoder(x)) if method == "moments" else theirs.decoder(theirs.post_quant_conv(x)))

        return code

    monkeypatch.setattr(vae_tiling, "_coder", coder)
    assert_tiled_agree(tiled, size)


def test_tiled_coding_agrees_with_diffusers(tiled):
    """In float64: normalising groups of few values makes rounding in float32, by the machine's order of sums, as large as the limit."""
    theirs, config, params = tiled
    with jax.enable_x64(True):
        assert_tiled_agree((theirs, dataclasses.replace(config, dtype="float64"), params), (21, 40, 40))


def assert_gradients_agree(models, folder, *, ours, theirs, x: np.ndarray, parts: tuple[str, ...]):
    """Of a sum of outputs with random weights, for the input and for every parameter of `parts`; by the size of the largest in each.

    `ours` and `theirs` give their outputs, channels last and first, as tuples.
    """
    reference, config, params = models
    rng = np.random.default_rng(5)
    reference = copy.deepcopy(reference)
    there = first(x).requires_grad_()
    outputs = theirs(reference, there)
    weights = [rng.normal(size=last(out).shape).astype(np.float32) for out in outputs]
    sum((out * first(weight)).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    assert there.grad is not None
    for parameter in reference.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    reference.save_pretrained(folder)
    expected = convert.load(folder, component="vae")[1]

    @jax.jit
    def gradients(params, x):
        return jax.grad(
            lambda params, x: sum(jnp.sum(out * weight) for out, weight in zip(ours(VAE(config), params, x), weights, strict=True)),
            argnums=(0, 1),
        )(params, x)

    for_params, for_x = gradients(params, jnp.asarray(x))
    assert relative_error(for_x, last(there.grad)) <= GRADIENT_TOLERANCE
    for part in parts:
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[part]))
        for (path, mine), their in zip(jax.tree_util.tree_leaves_with_path(for_params[part]), jax.tree.leaves(expected[part]), strict=True):
            # A bias before a group norm moves hardly anything: its gradient is rounding alone, and small beside all others.
            scale = max(float(np.abs(their).max()), 1e-3 * largest)
            assert float(np.abs(np.asarray(mine) - their).max()) <= GRADIENT_TOLERANCE * scale, (part, path)


def test_gradients_of_encoding_agree_with_diffusers(models, tmp_path):
    def theirs(model, x):
        posterior = model.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def ours(vae, params, x):
        posterior = vae.apply({"params": params}, x, method="encode")
        return posterior.mean, posterior.logvar

    frames = np.random.default_rng(6).uniform(-1, 1, (1, 5, 24, 16, 3)).astype(np.float32)
    assert_gradients_agree(models, tmp_path, ours=ours, theirs=theirs, x=frames, parts=("encoder", "quant_conv"))


def test_gradients_of_decoding_agree_with_diffusers(models, tmp_path):
    latents = np.random.default_rng(7).normal(size=(1, 2, 3, 2, 16)).astype(np.float32)
    assert_gradients_agree(
        models,
        tmp_path,
        ours=lambda vae, params, x: (vae.apply({"params": params}, x, method="decode"),),
        theirs=lambda model, x: (model.decode(x).sample,),
        x=latents,
        parts=("decoder", "post_quant_conv"),
    )
