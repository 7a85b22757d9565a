"""Laws of the FLOP count: it is what the traced model multiplies, near what the compiler counts, and the published size at 13B."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart, t2v_13b
from hunyuan_jax.chips import peak_flops
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.flops import dit_forward_flops, product_flops
from hunyuan_jax.models.dit import DiT, DiTConfig
from hunyuan_jax.models.vae import frame_causal_attention
from hunyuan_jax.models.vae_tiling import Tiling
from hunyuan_jax.tasks import planned_task

SMALL = DiTConfig(
    width=96, num_heads=4, num_double_blocks=2, num_single_blocks=3, text_dim=40, pooled_dim=20, rope_axes=(4, 10, 10), mlp_ratio=2.5
)
VARIANTS = {
    "plain": (SMALL, False),
    "guidance and clean frames": (dataclasses.replace(SMALL, guidance_embed=True), True),
    "more channels, larger patches": (dataclasses.replace(SMALL, in_channels=33, patch_size=(1, 4, 4), num_refiner_blocks=1), False),
}


def inputs(config: DiTConfig, *, grid: tuple[int, int, int], num_txt: int, clean: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one sample of `grid` tokens."""
    size = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
    shapes = {
        "latents": (1, *size, config.in_channels),
        "t": (1,),
        "txt": (1, num_txt, config.text_dim),
        "pooled": (1, config.pooled_dim),
    } | ({"guidance": (1,)} if config.guidance_embed else {})
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    arrays["txt_mask"] = jax.ShapeDtypeStruct((1, num_txt), jnp.bool)
    return arrays | ({"clean_frames": jax.ShapeDtypeStruct((1,), jnp.int32)} if clean else {})


def variables(config: DiTConfig, arrays: dict) -> dict:
    return jax.eval_shape(lambda x: DiT(config).init(jax.random.key(0), **x), arrays)


@pytest.mark.parametrize("variant", VARIANTS)
def test_count_is_that_of_the_traced_products(variant):
    config, clean = VARIANTS[variant]
    arrays = inputs(config, grid=(3, 2, 5), num_txt=7, clean=clean)
    traced = product_flops(lambda v, x: DiT(config).apply(v, **x), variables(config, arrays), arrays)
    assert dit_forward_flops(config, 30, 7, segments=2 if clean else 1) == traced


@pytest.mark.parametrize(("program", "passes"), [(lambda run: run, 1), (jax.grad, 3)], ids=["forward", "gradient"])
def test_count_is_the_compilers_within_one_per_cent(program, passes):
    """Which counts other operations too, and the body of a scan once: so one block of a kind, and wide ones."""
    config = DiTConfig(
        width=1024,
        num_heads=8,
        num_double_blocks=1,
        num_single_blocks=1,
        text_dim=64,
        pooled_dim=64,
        num_refiner_blocks=1,
        guidance_embed=True,
    )
    arrays = inputs(config, grid=(2, 8, 8), num_txt=32)
    run = program(lambda v, x: jnp.sum(DiT(config).apply(v, **x)))
    counted = jax.jit(run).lower(variables(config, arrays), arrays).compile().cost_analysis()["flops"]
    assert passes * dit_forward_flops(config, 128, 32) == pytest.approx(counted, rel=0.01)


def test_full_size_takes_the_published_operations():
    """13.59 GFLOP a token in linear layers and 737,280 for each pair of tokens; conditions are a small part."""
    config = DiTConfig(**t2v_13b.get_config("video_720").model)
    one, two, four = (dit_forward_flops(config, n, 0) for n in (0, 10_000, 20_000))
    pairs = (four - 2 * two + one) / (2 * 10_000**2)
    assert pairs == 737_280
    assert ((two - one) - pairs * 10_000**2) / 10_000 == pytest.approx(13.59e9, rel=1e-3)
    assert dit_forward_flops(config, 118_800, 256) == pytest.approx(12.07e15, rel=5e-3)


def test_convolutions_and_loops_are_counted_as_often_as_they_multiply():
    frames, kernel = jnp.zeros((2, 7, 9, 4)), jnp.zeros((3, 5, 4, 6))  # N H W C, H W in out

    def convolved(frames, kernel):
        return jax.lax.conv_general_dilated(frames, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    once = 2 * (2 * 4 * 9 * 6) * (3 * 5 * 4)
    assert product_flops(convolved, frames, kernel) == once
    assert product_flops(lambda f, k: jax.lax.map(lambda x: convolved(x, k), jnp.stack(3 * [f])), frames, kernel) == 3 * once
    grouped = lambda f, k: jax.lax.conv_general_dilated(  # noqa: E731
        f, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert product_flops(grouped, frames, kernel[:, :, :2]) == 2 * (2 * 7 * 9 * 6) * (3 * 5 * 2)


@pytest.mark.parametrize(
    ("frames", "frame_size", "block", "asked"), [(3, 5, 4, 15), (5, 8, 4, 40), (4, 6, 6, 8), (1, 7, 3, 7), (2, 4, 64, 8)]
)
def test_causal_attention_counts_the_blocks_that_it_meets_or_the_pairs_that_are_seen(frames, frame_size, block, asked):
    """Pairs by a mask; queries may be a share of each frame's. Both passes of a gradient meet the same blocks."""
    length, channels, block = frames * frame_size, 6, min(block, asked)
    arrays = jnp.zeros((2, asked, channels)), jnp.zeros((2, length, channels)), jnp.zeros((2, length, channels))
    frame_of = lambda count: np.arange(-(-count // block) * block) * frames // count  # noqa: E731
    whole = frame_of(length) <= frame_of(asked)[:, None]
    seen = whole[:asked, :length]
    met = block**2 * whole.reshape(len(whole) // block, block, -1, block).any(axis=(1, 3))
    attend = functools.partial(frame_causal_attention, frame_size=frame_size, block=block)
    assert product_flops(attend, *arrays, needed=True) == pytest.approx(2 * 4 * channels * seen.sum(), rel=1e-4)
    assert product_flops(attend, *arrays) == pytest.approx(2 * 4 * channels * met.sum(), rel=1e-4)
    gradient = jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))
    ratio = product_flops(gradient, *arrays) / product_flops(gradient, *arrays, needed=True)
    assert ratio == pytest.approx(met.sum() / seen.sum(), rel=1e-4)


def test_products_that_nothing_depends_on_are_not_counted():
    x = jnp.zeros((3, 3))
    assert product_flops(lambda x: (x @ x, x @ (x + 1))[0], x) == 2 * 27


def test_the_work_of_a_step_is_that_of_its_batch():
    """Three forward passes of every sample; of the VAE those of a clip, whatever the batch, and twice where seams are weighed."""
    config = quickstart.get_config("t2v")
    task, shape = planned_task(config), lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    said = task.work(VideoBatch(sample_id=shape(3), mean=shape(3, 4, 8, 8, 16), txt=shape(3, 8, 64)))
    assert said == {"frames": 3 * 13, "tokens": 3 * (4 * 2 * 2 + 8), "model_flops": 9 * dit_forward_flops(task.model, 16, 8)}
    vae = planned_task(quickstart.get_config("vae"))
    one, three = (vae.work(VideoBatch(sample_id=shape(n), frames=shape(n, 5, 16, 16, 3))) for n in (1, 3))
    assert three == {name: 3 * value for name, value in one.items()}
    params = jax.eval_shape(vae.init, jax.random.key(0))
    compiled = jax.jit(vae.reconstruct).lower(params, shape(1, 5, 16, 16, 3)).compile()
    assert one["model_flops"] == pytest.approx(3 * compiled.cost_analysis()["flops"], rel=0.2)
    tiles = dataclasses.replace(vae, tiling=Tiling(tile=(4, 16, 8), overlap=(0, 0, 0)))
    weighed = dataclasses.replace(tiles, loss_config=dataclasses.replace(vae.loss_config, seam_weight=1.0))
    clip = VideoBatch(sample_id=shape(1), frames=shape(1, 5, 16, 16, 3), tiled=True)
    assert weighed.work(clip)["model_flops"] == tiles.work(clip)["model_flops"] + one["model_flops"]
    assert weighed.work(dataclasses.replace(clip, tiled=False)) == one


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(kind, peak):
    assert peak_flops(kind) == peak
