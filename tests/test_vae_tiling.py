"""Laws of tiles: lengths are exact, neighbours blend without a trace, memory does not depend on the length of the video.

Where the subject is how tiles are cut and joined, the VAE is replaced by a codec that compresses as it does and keeps nothing but
colours: there tiled and untiled must agree wherever the clip's colours are all alike within what a latent covers.
"""

import dataclasses
import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.models import vae_tiling
from hunyuan_jax.models.vae import VAE, Posterior, VAEConfig, abstract_params
from hunyuan_jax.models.vae_tiling import (
    Tiling,
    decode_pieces,
    decode_tiled,
    encode_pieces,
    encode_tiled,
    in_tiles,
    padded_size,
)
from tests.commands import run_program

SMALL = VAEConfig(latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4)
TILING = Tiling(tile=(16, 32, 32), overlap=(4, 8, 8))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32)), abstract_params(SMALL))


def make_untiled(params):
    """`encode` and `decode` of the whole, compiled once per shape."""
    run = {m: jax.jit(lambda p, x, m=m: VAE(SMALL).apply({"params": p}, x, method=m)) for m in ("encode", "decode")}
    return {method: lambda x, method=method: run[method](params, jnp.asarray(x)) for method in run}


@pytest.fixture(scope="module")
def untiled(params):
    return make_untiled(params)


@pytest.fixture
def colours(monkeypatch):
    """Replaces the VAE by a codec of colours; returns the shapes of the tiles it was given, by method."""
    seen: dict[str, list[tuple[int, ...]]] = {"moments": [], "decode": []}

    def coder(config, method, *, devices):
        def code(params, x):
            seen[method].append(x.shape)
            if method == "decode":
                x = np.concatenate([x[:, :1], np.repeat(x[:, 1:], 4, axis=1)], axis=1)[..., :3]
                return x.repeat(8, axis=2).repeat(8, axis=3)
            return np.repeat(np.asarray(x)[:, ::4, ::8, ::8].mean(axis=-1, keepdims=True), 8, axis=-1)

        return code

    monkeypatch.setattr(vae_tiling, "_coder", coder)
    return seen


SIZES = [(1, 40, 24), (17, 32, 32), (25, 32, 72), (41, 24, 88), (65, 88, 80)]


@pytest.mark.parametrize("overlap", [(4, 8, 8), (12, 24, 16), (0, 0, 0)])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_what_has_no_neighbourhood_join_without_a_trace(colours, size, overlap):
    tiling = Tiling(tile=(16, 32, 32), overlap=overlap)
    latents = random(2, *SMALL.latent_shape(*size))
    decoded = decode_tiled(SMALL, {}, latents, tiling)
    expected = vae_tiling._coder(SMALL, "decode", devices=())({}, latents)
    assert decoded.shape == (2, *size, 3)
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    frames = random(2, *size, 3)
    posterior = encode_tiled(SMALL, {}, frames, tiling)
    np.testing.assert_allclose(posterior.mean, vae_tiling._coder(SMALL, "moments", devices=())({}, frames)[..., :4], atol=1e-6)


def test_a_tile_fades_in_from_all_of_the_last_one_to_nearly_all_of_its_own():
    before, here = np.zeros((1, 6, 1), np.float32), np.ones((1, 5, 1), np.float32)
    for blended in (vae_tiling._blend(before, here, 4, axis=1), vae_tiling._blend(jnp.asarray(before), jnp.asarray(here), 4, axis=1)):
        np.testing.assert_allclose(blended[0, :, 0], [0, 0.25, 0.5, 0.75, 1])


# As little as still takes an average over neighbours and over time, and compiles in a moment.
PLAIN = VAEConfig(
    latent_channels=2, block_out_channels=(2,), layers_per_block=1, norm_num_groups=1, spatial_compression=1, temporal_compression=1
)
CUT = Tiling(tile=(4, 4, 4), overlap=(0, 2, 0))


@pytest.fixture(scope="module")
def plain_params():
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape, np.float32)), abstract_params(PLAIN))


@pytest.mark.parametrize("at_once", [False, True])
def test_within_a_program_tiles_give_what_they_give_from_the_host_and_gradients_pass_through_them(plain_params, at_once):
    """Gradients against differences of the host's tiles, along a direction in which parameters and frames move together."""
    both, tiling = (plain_params, jnp.asarray(random(1, 5, 6, 4, 3))), dataclasses.replace(CUT, at_once=at_once)
    weights, rng = random(1, 5, 6, 4, 3, seed=1), np.random.default_rng(4)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), both)

    def from_the_host(params, frames):
        posterior = encode_tiled(PLAIN, params, np.asarray(frames), CUT)
        return decode_tiled(PLAIN, params, np.asarray(posterior.mean), CUT)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def within(both):
        params, frames = both
        code = lambda method: functools.partial(VAE(PLAIN).apply, {"params": params}, method=method)  # noqa: E731
        posterior = Posterior.from_moments(in_tiles(PLAIN, "moments", code("moments"), frames, tiling))
        out = in_tiles(PLAIN, "decode", code("decode"), posterior.mean, tiling)
        return jnp.sum(weights * out), out

    (_, out), grads = within(both)
    np.testing.assert_allclose(out, from_the_host(*both), atol=1e-5)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    step = 1e-3
    ends = [from_the_host(*jax.tree.map(lambda a, d, by=by: a + by * d, both, direction)) for by in (step, -step)]
    assert slope == pytest.approx(float(np.sum(weights * (ends[0] - ends[1]), dtype=np.float64)) / (2 * step), rel=1e-2)


def test_tiles_are_of_few_shapes_however_long_the_video_and_none_is_of_one_frame_that_is_dropped(colours):
    shapes = []
    for frames in (37, 97):
        list(decode_pieces(SMALL, {}, random(1, *SMALL.latent_shape(frames, 72, 88)), TILING))
        shapes.append(set(colours["decode"]))
        assert len(shapes[-1]) <= 8
        assert min(shape[1] for shape in shapes[-1]) > 1
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", [(16, 32, 32), (18, 33, 27), (30, 41, 50), (2, 1, 1)])
def test_clips_of_any_size_are_padded_with_their_edge_and_come_back_in_their_size(colours, size):
    frames = random(1, *size, 3)
    padded = padded_size(SMALL, size)
    assert all(0 <= after - before < factor for after, before, factor in zip(padded, size, (4, 8, 8), strict=True))
    by_hand = np.pad(frames, ((0, 0), *((0, b - a) for a, b in zip(size, padded, strict=True)), (0, 0)), mode="edge")
    posterior = encode_tiled(SMALL, {}, frames, TILING)
    np.testing.assert_array_equal(posterior.mean, encode_tiled(SMALL, {}, by_hand, TILING).mean)
    whole = decode_tiled(SMALL, {}, posterior.mean, TILING)
    cut = decode_tiled(SMALL, {}, posterior.mean, TILING, size=size)
    assert cut.shape == frames.shape
    np.testing.assert_array_equal(cut, whole[:, : size[0], : size[1], : size[2]])


@pytest.mark.parametrize("size", [(5, 32, 32), (13, 32, 32), (9, 33, 32), (9, 32, 24)])
def test_a_size_that_is_not_that_of_the_latents_is_refused(colours, size):
    with pytest.raises(UserError, match="size"):
        decode_tiled(SMALL, {}, random(1, *SMALL.latent_shape(9, 32, 32)), TILING, size=size)


def test_pieces_are_the_whole_in_order(colours):
    latents, frames = random(1, *SMALL.latent_shape(49, 40, 32)), random(1, 49, 40, 32, 3)
    pieces = list(decode_pieces(SMALL, {}, latents, TILING))
    assert [piece.shape[1] for piece in pieces] == [13, 12, 12, 12]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), decode_tiled(SMALL, {}, latents, TILING))
    means = [posterior.mean for posterior in encode_pieces(SMALL, {}, frames, TILING)]
    np.testing.assert_array_equal(np.concatenate(means, axis=1), encode_tiled(SMALL, {}, frames, TILING).mean)


def test_memory_of_coding_is_flat_in_the_length_of_the_video(colours):
    def peak(steps: int, code) -> tuple[int, int]:
        """Bytes at most on the host, and in arrays on devices, while pieces come and go; the video itself is not counted."""
        video = random(1, 1 + 3 * steps, 8, 8, 4) if code is decode_pieces else random(1, 1 + 12 * steps, 64, 64, 3)
        tracemalloc.start()
        on_devices = max(sum(x.nbytes for x in jax.live_arrays()) for _ in code(SMALL, {}, video, TILING))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, on_devices

    for code in (decode_pieces, encode_pieces):
        peak(3, code)  # what is compiled and imported on the way is not the subject
        (short, short_device), (long, long_device) = peak(3, code), peak(24, code)
        assert long <= 1.1 * short
        assert long_device <= short_device


class Tape:
    """A video that can only be read in short stretches."""

    def __init__(self, video: np.ndarray, longest: int) -> None:
        self.video, self.longest, self.shape = video, longest, video.shape

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        assert index[1].stop - index[1].start <= self.longest
        return self.video[index]


def test_only_the_frames_of_one_tile_are_read_at_a_time(colours):
    frames = random(1, 50, 32, 32, 3)
    from_tape = encode_tiled(SMALL, {}, Tape(frames, 17), TILING)
    np.testing.assert_array_equal(from_tape.mean, encode_tiled(SMALL, {}, frames, TILING).mean)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_one_tile_that_covers_all_is_the_untiled_vae_bit_for_bit(params, untiled, method):
    if method == "encode":
        frames = random(1, 9, 32, 24, 3)
        ours, expected = encode_tiled(SMALL, params, frames, TILING), untiled["encode"](frames)
        np.testing.assert_array_equal(ours.logvar, expected.logvar)
        np.testing.assert_array_equal(ours.mean, expected.mean)
    else:
        latents = random(1, 3, 4, 3, 4)
        np.testing.assert_array_equal(decode_tiled(SMALL, params, latents, TILING), untiled["decode"](latents))


@pytest.mark.parametrize("norm", [False, True])
def test_frames_depend_on_later_ones_through_group_norm_alone(params, untiled, monkeypatch, norm):
    """As released: without group norm the whole VAE is exactly causal; with it, its statistics carry later frames back in time."""
    run = untiled
    if not norm:
        monkeypatch.setattr("hunyuan_jax.models.vae._group_norm", lambda config, name: lambda x: x)
        run = make_untiled(params)
    frames, latents = random(1, 9, 32, 24, 3), random(1, 3, 4, 3, 4)
    later_frames, later_latents = frames.copy(), latents.copy()
    later_frames[:, 5:] *= -1  # the frames of the last latent
    later_latents[:, 2:] *= -1
    encode = lambda x: run["encode"](x).mean  # noqa: E731
    for method, one, other, kept in ((encode, frames, later_frames, 2), (run["decode"], latents, later_latents, 5)):
        before, after = np.asarray(method(one)), np.asarray(method(other))
        assert (before[:, kept:] != after[:, kept:]).any()
        assert (before[:, :1] != after[:, :1]).any() == norm
        if not norm:
            np.testing.assert_array_equal(before[:, :kept], after[:, :kept])


def test_what_xla_accounts_for_a_tile_is_what_its_program_takes(params):
    probe = Tiling.square(*vae_tiling.PROBE)
    needed = probe.device_bytes(SMALL)
    assert Tiling.within(needed, SMALL) == probe
    frames = jax.ShapeDtypeStruct((1, probe.tile[0] + 1, *probe.tile[1:], 3), jnp.float32)
    encode = jax.jit(lambda p, x: VAE(SMALL).apply({"params": p}, x, method="encode"))
    memory = encode.lower(params, frames).compile().memory_analysis()
    assert 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) < memory.temp_size_in_bytes + memory.argument_size_in_bytes <= needed


@pytest.mark.parametrize("power", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("chosen", range(len(vae_tiling.LADDER)))
def test_the_tiling_within_a_bound_is_the_largest_that_fits_or_one_below_it_where_memory_is_not_linear(params, monkeypatch, chosen, power):
    needed = [round((frames * side**2) ** power) for frames, side in vae_tiling.LADDER]
    by_tile = {Tiling.square(*place): need for place, need in zip(vae_tiling.LADDER, needed, strict=True)}
    fixed = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(vae_tiling, "abstract_params", lambda config: params)
    monkeypatch.setattr(Tiling, "device_bytes", lambda self, config, device=None: fixed + by_tile[self])
    tiling = Tiling.within(fixed + needed[chosen], SMALL)
    assert by_tile[tiling] <= needed[chosen]
    if power >= 1:
        assert tiling == Tiling.square(*vae_tiling.LADDER[chosen])
    with pytest.raises(UserError, match="smallest tile needs"):
        Tiling.within(fixed + needed[0] - 1, SMALL)


@pytest.mark.parametrize(
    "wrong",
    [{"overlap": (64, 64, 64)}, {"overlap": (-4, 0, 0)}, {"tile": (64, 250, 256)}, {"tile": (66, 256, 256)}, {"overlap": (2, 0, 0)}],
)
def test_tilings_that_do_not_fit_the_latents_are_refused(wrong):
    with pytest.raises(UserError, match="Tiling"):
        decode_tiled(SMALL, {}, random(1, 1, 1, 1, 4), Tiling(**wrong))


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from hunyuan_jax.models.vae import VAEConfig, abstract_params
from hunyuan_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled
config = VAEConfig(latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4)
rng = np.random.default_rng(1)
params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), abstract_params(config))
frames = rng.uniform(-1, 1, (3, 5, 64, 64, 3)).astype(np.float32)  # 12 tiles of one shape, of which 4 leave devices over
tiling = Tiling(tile=(16, 32, 32), overlap=(4, 0, 0))
posteriors = [encode_tiled(config, params, frames, tiling, devices=devices) for devices in (None, jax.devices()[:1])]
clips = [decode_tiled(config, params, posteriors[1].mean, tiling, devices=devices) for devices in (None, jax.devices()[:1])]
assert len(jax.devices()) == 8
for sharded, alone in ((posteriors[0].mean, posteriors[1].mean), (posteriors[0].logvar, posteriors[1].logvar), clips):
    error = np.abs(np.asarray(sharded) - np.asarray(alone)).max() / np.abs(alone).max()
    assert error <= 1e-6, error
print("equal")
"""


def test_tiles_spread_over_8_devices_give_the_same():
    assert run_program(EIGHT_DEVICES) == "equal"
