"""Laws of the DiT: what may and may not change its output, its size to the last parameter, and its shapes at full size."""

import collections
import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from configs import t2v_13b
from hunyuan_jax.attention_kernels import CUDNN_FORWARD
from hunyuan_jax.errors import UserError
from hunyuan_jax.flops import equations
from hunyuan_jax.models.dit import DiT, DiTConfig, SingleBlock, joint_conditions, scaled_guidance, stacked

TINY = DiTConfig(
    width=48, num_heads=2, num_double_blocks=2, num_single_blocks=3, text_dim=20, pooled_dim=12, rope_axes=(4, 10, 10), guidance_embed=True
)
KEYS = Path(__file__).parents[2] / "shared" / "keys" / "keys_dit_official.tsv"


def inputs(*, batch: int = 3, size: tuple[int, int, int] = (3, 4, 6), text: int = 7, channels: int = 16) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "latents": jax.random.normal(keys[0], (batch, *size, channels)),
        "t": jnp.linspace(0.1, 1.0, batch),
        "txt": jax.random.normal(keys[1], (batch, text, TINY.text_dim)),
        "txt_mask": jnp.arange(text) < jnp.array([4, 1, text])[:batch, None],
        "pooled": jax.random.normal(keys[2], (batch, TINY.pooled_dim)),
        "guidance": jnp.linspace(1.0, 8.0, batch),
    }


@pytest.fixture(scope="module")
def params() -> dict:
    """Random everywhere, the parameters that start at 0 included, so that every path is open."""
    shapes = jax.eval_shape(lambda: DiT(TINY).init(jax.random.key(0), **inputs()))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@partial(jax.jit, static_argnames="config")
def run(params: dict, config: DiTConfig = TINY, **arrays: jax.Array) -> jax.Array:
    return DiT(config).apply({"params": params}, **arrays)


@partial(jax.jit, static_argnames="config")
def run_and_gradients(params: dict, config: DiTConfig = TINY, **arrays: jax.Array) -> tuple[jax.Array, dict]:
    """The mean square of the velocity, and its gradient by the parameters."""
    return jax.value_and_grad(lambda p: jnp.mean(DiT(config).apply({"params": p}, **arrays) ** 2))(params)


@pytest.fixture(scope="module")
def base(params) -> np.ndarray:
    return np.asarray(run(params, **inputs()))


def test_output_is_float32_and_has_the_shape_of_the_latents(base):
    assert base.shape == inputs()["latents"].shape
    assert base.dtype == np.float32
    assert np.all(np.isfinite(base))


@pytest.fixture(scope="module")
def fresh() -> dict:
    """Parameters as training starts with them."""
    return jax.jit(DiT(TINY).init)(jax.random.key(0), **inputs())["params"]


def test_a_new_model_predicts_zero(fresh):
    assert np.all(run(fresh, **inputs()) == 0)


def test_padding_text_tokens_change_nothing(params, base):
    x = inputs()
    for noise in (1e4, jnp.nan, jnp.inf):
        changed = run(params, **{**x, "txt": jnp.where(x["txt_mask"][:, :, None], x["txt"], noise)})
        np.testing.assert_array_equal(changed, base)


def test_more_padding_gives_the_same_velocity(params, base):
    x = inputs()
    longer = run(params, **{**x, "txt": jnp.pad(x["txt"], ((0, 0), (0, 5), (0, 0))), "txt_mask": jnp.pad(x["txt_mask"], ((0, 0), (0, 5)))})
    np.testing.assert_allclose(longer, base, atol=2e-5)


def test_order_and_place_of_valid_text_tokens_mean_nothing(params, base):
    x = inputs()
    order = jnp.array([6, 3, 0, 5, 2, 1, 4])
    moved = run(params, **{**x, "txt": x["txt"][:, order], "txt_mask": x["txt_mask"][:, order]})
    np.testing.assert_allclose(moved, base, atol=2e-5)


def test_valid_text_tokens_matter(params, base):
    x = inputs()
    changed = run(params, **{**x, "txt": x["txt"].at[:, 0].add(1)})
    assert np.all(np.abs(changed - base).max(axis=(1, 2, 3, 4)) > 1e-3)


def test_empty_text_is_finite_in_value_and_gradient(params):
    x = {**inputs(), "txt_mask": jnp.zeros((3, 7), bool)}
    value, grads = run_and_gradients(params, **x)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["latents", "t", "txt", "txt_mask", "pooled", "guidance"])
def test_samples_do_not_influence_one_another(params, base, name):
    x = inputs()
    other = x[name].at[1].set(True) if name == "txt_mask" else x[name].at[1].multiply(0.5)
    changed = np.asarray(run(params, **{**x, name: other}))
    np.testing.assert_array_equal(changed[[0, 2]], base[[0, 2]])
    assert np.abs(changed[1] - base[1]).max() > 1e-4


def test_clean_frames_are_data(params, base):
    x = inputs()
    np.testing.assert_allclose(run(params, **x, clean_frames=jnp.array([0, 0, 0])), base, atol=2e-5)
    mixed = np.asarray(run(params, **x, clean_frames=jnp.array([0, 1, 3])))
    np.testing.assert_allclose(mixed[0], base[0], atol=2e-5)
    assert np.all(np.abs(mixed[1:] - base[1:]).max(axis=(1, 2, 3, 4)) > 1e-3)


def test_at_time_zero_without_guidance_every_frame_is_clean(params):
    config = dataclasses.replace(TINY, guidance_embed=False)
    x = {name: array for name, array in inputs().items() if name != "guidance"}
    plain = {name: tree for name, tree in params.items() if name != "guidance_in"}
    x["t"] = jnp.zeros(3)
    clean = run(plain, config, **x, clean_frames=jnp.array([0, 1, 3]))
    np.testing.assert_allclose(clean, run(plain, config, **x), atol=2e-5)


def test_rematerialisation_changes_nothing(params):
    none, none_grads = run_and_gradients(params, **inputs())
    full, full_grads = run_and_gradients(params, dataclasses.replace(TINY, remat="full"), **inputs())
    np.testing.assert_allclose(none, full, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(none_grads), jax.tree.leaves(full_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()) + 1e-7)


def test_scan_equals_the_loop_over_blocks(params):
    def tokens_of(key, *shape):
        return jax.random.normal(jax.random.key(key), shape)

    x, vec = tokens_of(0, 2, 18 + 5, TINY.width), tokens_of(1, 2, 1, TINY.width)
    conditions = joint_conditions(TINY, (3, 2, 3), vec, jnp.array([5, 2]), num_txt=5, clean_frames=None)
    weights = params["single_blocks"]
    (scanned,), _ = stacked(SingleBlock, length=3, remat="none")(TINY).apply({"params": weights}, (x,), conditions)
    for layer in range(3):
        (x,), _ = SingleBlock(TINY).apply({"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], weights)}, (x,), conditions)
    np.testing.assert_allclose(scanned, x, atol=1e-4)


def test_layers_start_different(fresh):
    first, second = fresh["double_blocks"]["img_attn_qkv"]["kernel"]
    assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("size", [(2, 3, 5), (1, 1, 4)])
def test_odd_sizes_are_padded_by_their_last_row_and_column_and_cropped(params, size):
    x = inputs(size=size)
    ends = [(0, 0), (0, 0), (0, size[1] % 2), (0, size[2] % 2), (0, 0)]
    padded = run(params, **{**x, "latents": jnp.pad(x["latents"], ends, mode="edge")})
    out = run(params, **x)
    assert out.shape == x["latents"].shape
    np.testing.assert_allclose(out, padded[:, :, : size[1], : size[2]], atol=2e-5)


def test_bfloat16_stays_near_float32(params):
    x = {**inputs(), "guidance": jnp.array([1.0, 2.0, 8.0])}  # a thousand times these are bfloat16 numbers
    base = run(params, **x)
    low = run(params, dataclasses.replace(TINY, dtype="bfloat16"), **x)
    assert low.dtype == jnp.float32
    assert np.linalg.norm(low - base) < 0.05 * np.linalg.norm(base)


def test_parameters_are_float32_whatever_the_compute_dtype():
    low = dataclasses.replace(TINY, dtype="bfloat16")
    shapes = jax.eval_shape(lambda: DiT(low).init(jax.random.key(0), **inputs()))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_guidance_is_rounded_as_the_released_model_rounds_it():
    scales = jnp.array([6.0, 3.5, 4.5, 7.5, 1.0, 8.0])
    np.testing.assert_array_equal(jax.jit(partial(scaled_guidance, dtype=jnp.bfloat16))(scales), [6016, 3504, 4512, 7488, 1000, 8000])
    np.testing.assert_array_equal(jax.jit(partial(scaled_guidance, dtype=jnp.float32))(scales), [6000, 3500, 4500, 7500, 1000, 8000])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"rope_axes": (4, 10, 12)}, "rope_axes"),
        ({"rope_axes": (5, 9, 10)}, "rope_axes"),
        ({"rope_axes": (12, 12)}, "rope_axes"),
        ({"patch_size": (1, 2, 0)}, "patch_size"),
        ({"width": 0}, "width"),
        ({"num_single_blocks": -1}, "num_single_blocks"),
        ({"remat": "some"}, "remat"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_an_impossible_config_says_why(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance": None}, "guidance"),
        ({"latents": jnp.zeros((3, 3, 4, 6, 33))}, "latents with 16 channels.*33"),
        ({"txt": jnp.zeros((3, 7, 21))}, "txt"),
        ({"pooled": jnp.zeros((3, 13))}, "pooled"),
    ],
)
def test_inputs_of_another_model_are_refused(params, change, words):
    with pytest.raises(UserError, match=words):
        run(params, **{**inputs(), **change})


def test_guidance_for_a_model_without_it_is_refused(params):
    with pytest.raises(UserError, match="guidance must be None"):
        run(params, dataclasses.replace(TINY, guidance_embed=False), **inputs())


# Full size, by shapes alone.


def full_inputs(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One clip of 129 frames at 720 x 1280 pixels and 256 text tokens."""
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    arrays = {
        "latents": float32((1, 33, 90, 160, config.in_channels)),
        "t": float32((1,)),
        "txt": float32((1, 256, config.text_dim)),
        "txt_mask": jax.ShapeDtypeStruct((1, 256), jnp.bool),
        "pooled": float32((1, config.pooled_dim)),
    }
    return arrays | ({"guidance": float32((1,))} if config.guidance_embed else {})


def full_shapes(config: DiTConfig) -> dict:
    return jax.eval_shape(lambda x: DiT(config).init(jax.random.key(0), **x), full_inputs(config))["params"]


@pytest.fixture(scope="module")
def full_config() -> DiTConfig:
    return DiTConfig(**t2v_13b.get_config("video_720").model)


@pytest.mark.parametrize(
    ("change", "count"),
    [({"guidance_embed": True}, 12_821_012_544), ({}, 12_810_782_784), ({"in_channels": 33}, 12_810_991_680)],
)
def test_full_size_has_the_released_number_of_parameters(full_config, change, count):
    shapes = full_shapes(dataclasses.replace(full_config, **change))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_full_size_forward_traces_at_720p_and_129_frames(full_config):
    shapes = {"params": full_shapes(full_config)}
    out = jax.eval_shape(lambda variables, x: DiT(full_config).apply(variables, **x), shapes, full_inputs(full_config))
    assert out.shape == (1, 33, 90, 160, 16)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("stage", t2v_13b.STAGES)
def test_every_stage_of_the_ladder_builds(stage):
    assert DiTConfig(**t2v_13b.get_config(stage).model).head_dim == 128


def test_an_unknown_stage_is_refused_by_name():
    with pytest.raises(ValueError, match="video_999"):
        t2v_13b.get_config("video_999")


def official_shapes(shapes: dict) -> dict[str, list[int]]:
    """Our full-size shapes under the released names: layers unstacked, kernels as torch lays them out."""
    stacks = {"double_blocks": "double_blocks", "single_blocks": "single_blocks"}
    stacks["txt_in.individual_token_refiner"] = "txt_in.individual_token_refiner.blocks"
    renames = {"adaLN_modulation": "adaLN_modulation.1"}
    official = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        *modules, kind = [renames.get(key.key, key.key) for key in path]
        name, shape = ".".join(modules), list(leaf.shape)
        if modules[0] in ("time_in", "guidance_in") or "t_embedder" in modules:
            name = name.replace("in_layer", "mlp.0").replace("out_layer", "mlp.2")
        if "c_embedder" in modules:
            name = name.replace("in_layer", "linear_1").replace("out_layer", "linear_2")
        names = [name]
        for ours, theirs in stacks.items():
            if name.startswith(f"{ours}."):
                names = [f"{theirs}.{layer}{name[len(ours) :]}" for layer in range(shape.pop(0))]
        if kind == "kernel":
            shape = [3072, 16, 1, 2, 2] if name == "img_in.proj" else shape[::-1]
        suffix = "bias" if kind == "bias" else "weight"
        official |= {f"{name}.{suffix}": shape for name in names}
    return official


@pytest.mark.skipif(not KEYS.exists(), reason=f"The list of released tensor names is not beside this checkout ({KEYS.name}).")
def test_names_and_shapes_are_those_of_the_released_checkpoint(full_config):
    lines = [line.split("\t") for line in KEYS.read_text().splitlines() if line.strip()]
    released = {name: [int(n) for n in shape.strip("[]").split(",")] for name, shape in lines}
    assert official_shapes(full_shapes(dataclasses.replace(full_config, guidance_embed=True))) == released


@pytest.mark.parametrize(("remat", "forward"), [("none", 5), ("attention", 5), ("attention_host", 5), ("full", 10)])
def test_cudnns_forward_kernel_runs_once_in_each_block_where_attention_is_kept(remat, forward, monkeypatch):
    """In the trace of the gradient, which needs no GPU but only a version of cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_100)
    config = dataclasses.replace(TINY, remat=remat, attention="cudnn", dtype="bfloat16")
    given = inputs()
    shapes = jax.eval_shape(lambda: DiT(config).init(jax.random.key(0), **given)["params"])
    counts: collections.Counter[str] = collections.Counter()
    for equation, times in equations(jax.grad(lambda params: jnp.sum(DiT(config).apply({"params": params}, **given))), shapes):
        counts[equation.primitive.name] += int(times)
    assert counts[CUDNN_FORWARD] == forward
    assert counts[CUDNN_FORWARD.replace("fwd", "bwd")] == 5
