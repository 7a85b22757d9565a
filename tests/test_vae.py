"""Laws of the causal 3D VAE: its size, causality, exact time layout, two ways to convolve, and its files."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax import convert
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import (
    VAE,
    CausalConv,
    FrameCausalAttention,
    LatentMoments,
    Posterior,
    VAEConfig,
    abstract_params,
    frame_causal_attention,
    upsample_nearest,
    whitened,
)
from hunyuan_jax.weights import weights_of

SMALL = VAEConfig(latent_channels=4, block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def random_params(shapes, *, seed: int = 1):
    """Parameters of these shapes in which nothing is 0 or 1, so that closed branches are open."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32)), shapes)


def random_params_of(module: nn.Module, x: jax.Array):
    return random_params(jax.eval_shape(module.init, jax.random.key(0), x))


@pytest.fixture(scope="module")
def small_params():
    return random_params(abstract_params(SMALL))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_default_config_is_the_released_model_in_size():
    params = abstract_params(VAEConfig())
    parts = {"encoder": 100_341_408, "decoder": 146_136_067, "quant_conv": 1_056, "post_quant_conv": 272}
    assert {name: count(part) for name, part in params.items()} == parts
    assert count(params) == 246_478_803
    assert len(jax.tree.leaves(params)) == 248


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_planes_and_volume_are_the_same_convolution(strides):
    x = random(2, 5, 6, 8, 4)
    convolutions = [CausalConv(dataclasses.replace(SMALL, convolution=how), 8, strides=strides) for how in ("volume", "planes")]
    params = random_params_of(convolutions[0], x)
    volume, planes = (jax.jit(convolution.apply)(params, x) for convolution in convolutions)
    np.testing.assert_allclose(planes, volume, atol=1e-5)


def test_a_sum_of_planes_in_bfloat16_is_rounded_once():
    config = dataclasses.replace(SMALL, convolution="planes", dtype="bfloat16")
    x = random(1, 5, 6, 6, 8).astype(jnp.bfloat16)
    layer = CausalConv(config, 8)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), random_params_of(layer, x))
    params["params"]["conv"]["bias"] *= 0  # which is added after
    exact = CausalConv(dataclasses.replace(config, dtype="float32"), 8).apply(params, x)
    rounded = exact.astype(jnp.bfloat16).astype(jnp.float32)
    assert jnp.mean(layer.apply(params, x).astype(jnp.float32) == rounded) > 0.99  # but where float32's own error decides
    grads = jax.grad(lambda params, x: jnp.sum(layer.apply(params, x).astype(jnp.float32)), argnums=(0, 1))(params, x)
    assert (grads[0]["params"]["conv"]["kernel"].dtype, grads[1].dtype) == (jnp.float32, jnp.bfloat16)


def test_a_convolution_never_sees_later_frames():
    x = random(1, 5, 6, 6, 4)
    convolution = CausalConv(SMALL, 8)
    params = random_params_of(convolution, x)
    apply = jax.jit(convolution.apply)
    out, changed = apply(params, x), apply(params, x.at[:, 3:].add(1.0))
    np.testing.assert_array_equal(out[:, :3], changed[:, :3])
    assert (out[:, 3:] != changed[:, 3:]).all()


def test_before_the_first_frame_and_beyond_the_edge_everything_is_as_there():
    x = jnp.broadcast_to(random(1, 1, 1, 1, 4), (1, 4, 5, 6, 4))
    convolution = CausalConv(SMALL, 8)
    out = jax.jit(convolution.apply)(random_params_of(convolution, x), x)
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1, :1, :1], out.shape), atol=1e-5)


def test_attention_never_sees_later_frames_and_sees_all_of_its_own(monkeypatch):
    # Group norm takes its statistics over all frames, which is not the subject here.
    monkeypatch.setattr("hunyuan_jax.models.vae._group_norm", lambda config, name: lambda x: x)
    x = random(1, 4, 2, 3, 8)
    attention = FrameCausalAttention(SMALL)
    params = random_params_of(attention, x)
    apply = jax.jit(attention.apply)
    out, changed = apply(params, x), apply(params, x.at[:, 2, 1, 2].add(1.0))
    np.testing.assert_array_equal(out[:, :2], changed[:, :2])
    assert (out[:, 2:] != changed[:, 2:]).any(axis=-1).all()


def dense_attention(q, k, v, frame_size: int):
    """With the whole matrix of scores."""
    frame = jnp.arange(q.shape[1]) // frame_size
    scores = jnp.einsum("bqc,bkc->bqk", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bqk,bkc->bqc", nn.softmax(jnp.where(frame <= frame[:, None], scores, -jnp.inf)), v)


@pytest.mark.parametrize("block", [4, 7, 16, 64])
def test_attention_in_blocks_is_attention_with_the_whole_matrix_and_so_are_its_gradients(block):
    q, k, v, cotangent = (random(2, 35, 8, seed=seed) for seed in range(4))

    @jax.jit
    def both(q, k, v):
        blocks, back = jax.vjp(lambda *x: frame_causal_attention(*x, frame_size=7, block=block), q, k, v)
        dense, dense_back = jax.vjp(lambda *x: dense_attention(*x, 7), q, k, v)
        return (blocks, *back(cotangent)), (dense, *dense_back(cotangent))

    for ours, expected in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_attention_grows_as_its_positions_and_not_as_their_square(backward):
    def attend(q, k, v):
        return frame_causal_attention(q, k, v, frame_size=96, block=64)

    def temporary_bytes(positions: int) -> int:
        x = jax.ShapeDtypeStruct((1, positions, 8), jnp.float32)
        run = jax.grad(lambda *x: jnp.sum(attend(*x)), argnums=(0, 1, 2)) if backward else attend
        return jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    few, many = 24 * 96, 4 * 24 * 96
    assert temporary_bytes(many) <= 4.5 * temporary_bytes(few)
    assert temporary_bytes(many) < 4 * many**2 / 50


def test_the_first_frame_is_never_repeated_in_time():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1, 1) + jnp.array([0.0, 0.5]).reshape(1, 1, 1, 2, 1)
    out = upsample_nearest(x, (2, 3, 2))
    assert out.shape == (1, 5, 3, 4, 1)
    np.testing.assert_array_equal(out[0, :, 0, 0, 0], [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(out[0, 1, 2, :, 0], [1, 1, 1.5, 1.5])
    assert upsample_nearest(x, (1, 2, 2)).shape == (1, 3, 2, 4, 1)


@pytest.mark.parametrize(("space", "time"), [(8, 4), (4, 2), (2, 1)])
def test_frames_come_back_in_the_shape_they_had(space, time):
    config = dataclasses.replace(SMALL, spatial_compression=space, temporal_compression=time)
    frames = jax.ShapeDtypeStruct((2, 1 + 2 * time, 3 * space, 2 * space, 3), jnp.float32)
    params = abstract_params(config)
    posterior = jax.eval_shape(lambda p, x: VAE(config).apply({"params": p}, x, method="encode"), params, frames)
    assert posterior.mean.shape == posterior.logvar.shape == (2, *config.latent_shape(*frames.shape[1:4])) == (2, 3, 3, 2, 4)
    assert jax.eval_shape(lambda p, x: VAE(config).apply({"params": p}, x), params, frames).shape == frames.shape


@pytest.mark.parametrize("shape", [(4, 16, 16), (0, 16, 16), (5, 15, 16), (5, 16, 12)])
def test_clips_that_cannot_be_represented_are_refused(shape):
    with pytest.raises(UserError, match="VAE"):
        VAEConfig().latent_shape(*shape)


@pytest.mark.parametrize(
    "wrong", [{"norm_num_groups": 3}, {"convolution": "fast"}, {"remat": "some"}, {"spatial_compression": 6}, {"temporal_compression": 16}]
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(UserError, match="VAE"):
        VAEConfig(**wrong)


def test_recomputing_changes_no_gradient_and_keeps_a_quarter_for_it_at_most(small_params):
    frames = random(1, 5, 16, 16, 3)

    def reconstruct(params, remat):
        return VAE(dataclasses.replace(SMALL, remat=remat)).apply({"params": params}, frames)

    def kept(remat):
        residuals = jax.eval_shape(lambda params: jax.vjp(functools.partial(reconstruct, remat=remat), params)[1], small_params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    assert kept("full") <= kept("none") / 4
    grads = [
        jax.jit(jax.grad(lambda params, remat=remat: jnp.sum(jnp.square(reconstruct(params, remat)))))(small_params)
        for remat in ("none", "full")
    ]
    for none, full in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(full, none, rtol=1e-4, atol=1e-5 * float(jnp.abs(none).max()) + 1e-5)


def test_kl_is_zero_for_the_standard_normal_and_has_its_closed_form():
    shape = (2, 1, 1, 1, 3)
    np.testing.assert_array_equal(Posterior(mean=jnp.zeros(shape), logvar=jnp.zeros(shape)).kl(), [0, 0])
    kl = Posterior(mean=jnp.full(shape, 2.0), logvar=jnp.full(shape, math.log(4.0))).kl()
    np.testing.assert_allclose(kl, 2 * [3 * 0.5 * (4 + 4 - 1 - math.log(4))], rtol=1e-6)


def test_saved_weights_load_exactly_and_with_their_config(tmp_path, small_params):
    config = dataclasses.replace(SMALL, convolution="planes", scaling_factor=0.7)
    convert.write(weights_of(config, small_params), tmp_path, "diffusers")
    loaded_config, loaded = convert.load(tmp_path, component="vae")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, small_params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", convert.VAE_WEIGHTS]


@pytest.fixture(scope="module")
def encoded(small_params):
    """Clips of many colours, and a function from parameters to their latents and reconstructions."""
    clips = jnp.clip(0.5 * random(6, 5, 16, 16, 3) + random(6, 1, 1, 1, 3, seed=2), -1, 1)

    @jax.jit
    def run(params):
        posterior = VAE(SMALL).apply({"params": params}, clips, method="encode")
        return posterior, VAE(SMALL).apply({"params": params}, posterior.mean, method="decode")

    return run, run(small_params)


def moments_of(posterior) -> LatentMoments:
    mean, logvar = (np.asarray(x, np.float64).reshape(-1, SMALL.latent_channels) for x in (posterior.mean, posterior.logvar))
    return LatentMoments(mean.mean(axis=0), np.cov(mean, rowvar=False), np.exp(logvar).mean(axis=0))


def test_whitened_latents_have_mean_0_and_are_uncorrelated_with_variance_1(small_params, encoded):
    run, (posterior, _) = encoded
    white = moments_of(run(whitened(small_params, moments_of(posterior), ridge=1e-9))[0])
    np.testing.assert_allclose(white.mean, 0, atol=1e-3)
    np.testing.assert_allclose(white.covariance, np.eye(SMALL.latent_channels), atol=5e-3)


def test_whitening_changes_no_reconstruction_and_carries_the_posterior_along(small_params, encoded):
    run, (posterior, frames) = encoded
    moments = moments_of(posterior)
    after, same_frames = run(whitened(small_params, moments, ridge=0.1))
    np.testing.assert_allclose(same_frames, frames, rtol=1e-4, atol=1e-4 * float(jnp.abs(frames).max()))
    # Uncertainty keeps its size relative to what the latents span, summed over channels in the eigenbasis of the covariance.
    there = moments_of(after)
    assert np.trace(there.covariance) == pytest.approx(SMALL.latent_channels, rel=1e-3)
    mixed = np.cov(np.asarray(after.mean).reshape(-1, 4), np.asarray(posterior.mean).reshape(-1, 4), rowvar=False)[:4, 4:]
    forth = mixed @ np.linalg.inv(moments.covariance)
    np.testing.assert_allclose(there.posterior_variance, np.square(forth) @ moments.posterior_variance, rtol=1e-2)


def test_a_ridge_keeps_small_what_hardly_varies(small_params, encoded):
    run, (posterior, _) = encoded
    values = np.linalg.eigvalsh(moments_of(posterior).covariance)
    white = np.linalg.eigvalsh(moments_of(run(whitened(small_params, moments_of(posterior), ridge=0.5))[0]).covariance)
    expected = values / (values + 0.5 * values.mean())
    np.testing.assert_allclose(white / white.sum(), expected / expected.sum(), rtol=1e-2)


def test_latents_that_do_not_vary_cannot_be_whitened(small_params):
    with pytest.raises(UserError, match="do not vary"):
        whitened(small_params, LatentMoments(np.zeros(4), np.zeros((4, 4)), np.ones(4)), ridge=0.1)
