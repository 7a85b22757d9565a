"""Laws of adapters: no bit is lost between their layouts, and the merged model is what each tool makes of its file."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers.loaders import lora_conversion_utils  # noqa: E402

from hunyuan_jax import adapters, convert  # noqa: E402
from hunyuan_jax.errors import UserError  # noqa: E402
from hunyuan_jax.models import layouts, lora  # noqa: E402
from hunyuan_jax.models.dit import RELEASED, DiT, DiTConfig  # noqa: E402
from hunyuan_jax.models.lora import LAYOUTS, Adapter, LoRA  # noqa: E402
from hunyuan_jax.tensor_files import open_tensors, write_safetensors  # noqa: E402
from hunyuan_jax.weights import open_weights, weights_of  # noqa: E402
from tests.commands import run_module  # noqa: E402
from tests.diffusers_dit import diffusers_dit, our_params  # noqa: E402
from tests.test_convert import inputs, theirs  # noqa: E402

TINY = DiTConfig(
    width=32, num_heads=2, num_double_blocks=2, num_single_blocks=3, text_dim=6, pooled_dim=5, rope_axes=(4, 6, 6), guidance_embed=True
)
QKV = "double_blocks.1.img_attn_qkv.weight"
LINEAR1 = "single_blocks.2.linear1.weight"
FINAL = "final_layer.adaLN_modulation.1.weight"


def random_adapter(rng, tensor: str, rank: int, scale: float = 1.0, dtype=np.float32) -> Adapter:
    out, *into = layouts.places(TINY)[tensor].shape
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    return Adapter(draw(rank, math.prod(into)), draw(out, rank), np.full(rank, scale))


def in_blocks(rng, tensor: str, ranks: dict[str, int], scales: dict[str, float] | None = None, dtype=np.float32) -> Adapter:
    """An adapter as diffusers' parts of a fused weight make it, each of its own rank and some absent."""
    parts = {name: part for name, part in lora.modules("diffusers", TINY).items() if part.tensor == tensor}
    own = []
    for (name, part), rank in itertools.product(parts.items(), ranks.items()):
        if name.endswith(rank[0]):
            found = random_adapter(rng, tensor, rank[1], (scales or {}).get(rank[0], 1.0), dtype)
            own.append((part, Adapter(found.down, found.up[: part.num_rows], found.scale)))
    return lora.fused(own, layouts.places(TINY)[tensor].shape[0])


def sample(dtype=np.float32, *, scaled: bool = True, seed: int = 0) -> dict[str, Adapter]:
    """Every weight has an adapter, of ranks 1 to 4; with `scaled`, alpha is not the rank. Two are in blocks, one lacks a part."""
    rng = np.random.default_rng(seed)
    tensors = [tensor for tensor, place in layouts.places(TINY).items() if len(place.shape) > 1]
    ranks, scales = itertools.cycle((1, 2, 3, 4)), itertools.cycle((0.5, 2.0, 1 / 3, float(np.float32(1.2345))) if scaled else (1.0,))
    found = {tensor: random_adapter(rng, tensor, next(ranks), next(scales), dtype) for tensor in tensors}
    scale = 2.0 if scaled else 1.0
    found[QKV] = in_blocks(rng, QKV, {"to_q": 2, "to_v": 3}, {"to_q": scale, "to_v": scale}, dtype)
    found[LINEAR1] = in_blocks(rng, LINEAR1, {"to_q": 1, "to_k": 2, "to_v": 1, "proj_mlp": 4}, dtype=dtype)
    found["single_blocks.0.linear1.weight"].up[32:64] = 0  # no part k
    return found


def assert_equal_bits(one: dict[str, Adapter], other: dict[str, Adapter]) -> None:
    assert one.keys() == other.keys()
    for tensor in one:
        a, b = one[tensor], other[tensor]
        assert a.down.dtype == b.down.dtype, tensor
        assert (a.down.tobytes(), a.up.tobytes()) == (b.down.tobytes(), b.up.tobytes()), tensor
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-11, err_msg=tensor)


def assert_equal_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert one[name].tobytes() == other[name].tobytes(), name


def through_file(tmp_path, found: dict[str, Adapter], layout: str) -> LoRA:
    folder = tmp_path / f"{layout}-{len(list(tmp_path.iterdir()))}"
    adapters.write(folder / "adapter.safetensors", found, layout, TINY)
    return adapters.read(folder / "adapter.safetensors", TINY)


def parsed(tensors: dict[str, np.ndarray], **options) -> LoRA:
    return lora.parse(tensors, TINY, **options)


# --- Layouts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_between_all_layouts_lose_no_bit(tmp_path, layout, dtype):
    original = sample(jnp.dtype(dtype), scaled=layout != "official")
    assert {a.up.dtype for a in original.values()} == {a.down.dtype for a in original.values()} == {jnp.dtype(dtype)}
    there = through_file(tmp_path, original, layout)
    assert there.layout == layout
    assert_equal_bits(original, there.adapters)
    for second in LAYOUTS if layout == "official" else LAYOUTS[:3]:
        back = through_file(tmp_path, there.adapters, second)
        assert back.layout == second
        assert_equal_bits(original, back.adapters)
        again = lora.tensors_in(back.adapters, layout, TINY)
        assert_equal_tensors(again, lora.tensors_in(original, layout, TINY))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_size_modules_have_names_of_their_own_and_hold_every_row_once(layout):
    rows = {tensor: 0 for tensor, place in layouts.places(RELEASED).items() if len(place.shape) > 1}
    for part in lora.modules(layout, RELEASED).values():
        rows[part.tensor] += part.num_rows
    assert rows == {tensor: layouts.places(RELEASED)[tensor].shape[0] for tensor in rows}


def test_keys_are_those_of_the_tools():
    found = {tensor: sample()[tensor] for tensor in ("single_blocks.1.linear2.weight", "double_blocks.0.txt_mlp.fc1.weight", FINAL)}
    keys = {layout: set(lora.tensors_in(found, layout, TINY)) for layout in LAYOUTS}
    assert keys["diffusers"] >= {
        "transformer.single_transformer_blocks.1.proj_out.lora_A.weight",
        "transformer.transformer_blocks.0.ff_context.net.0.proj.lora_B.weight",
        "transformer.norm_out.linear.lora_B.weight",
    }
    assert keys["musubi"] >= {"lora_unet_single_blocks_1_linear2.lora_down.weight", "lora_unet_double_blocks_0_txt_mlp_fc1.alpha"}
    assert keys["diffusion-pipe"] >= {"transformer.single_blocks.1.linear2.lora_A.weight"}
    assert keys["official"] >= {
        "Hunyuan_video_I2V_lora_single_blocks_1_linear2.lora_up.weight",
        "Hunyuan_video_I2V_lora_final_layer_adaLN_modulation_1.alpha",
    }


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.", "lora_A", "lora_B"),
        ("diffusion_model.", "lora_down", "lora_up"),
        ("base_model.model.", "lora_A.default", "lora_B.default"),
        ("", "lora_A", "lora_B"),
    ],
)
def test_released_and_comfyuis_paths_are_read_under_every_prefix(prefix, down, up):
    rng = np.random.default_rng(0)
    names = {
        "double_blocks.0.img_attn_qkv": "double_blocks.0.img_attn_qkv.weight",
        "double_blocks.1.img_attn.qkv": QKV,
        "double_blocks.0.txt_mlp.2": "double_blocks.0.txt_mlp.fc2.weight",
        "single_blocks.0.modulation.lin": "single_blocks.0.modulation.linear.weight",
    }
    found = {tensor: random_adapter(rng, tensor, 2) for tensor in names.values()}
    tensors = {f"{prefix}{name}.{down}.weight": found[tensor].down for name, tensor in names.items()}
    tensors |= {f"{prefix}{name}.{up}.weight": found[tensor].up for name, tensor in names.items()}
    read = parsed(tensors)
    assert read.layout == "diffusion-pipe"
    assert set(read.adapters) == set(found)
    assert_equal_bits({tensor: found[tensor] for tensor in read.adapters}, read.adapters)


def test_blocks_come_back_as_they_were_and_shared_parts_keep_their_rank():
    rng = np.random.default_rng(0)
    parts = [part for part in lora.modules("diffusers", TINY).values() if part.tensor == LINEAR1]
    own = [(part, random_adapter(rng, LINEAR1, rank, scale)) for part, rank, scale in zip(parts, (2, 1, 3, 2), (1, 0.3, 1, 7), strict=True)]
    own = [(part, Adapter(a.down, a.up[: part.num_rows], a.scale)) for part, a in own]
    down = own[0][1].down
    one_down = [(part, Adapter(down, a.up[:, [0, 0]], np.full(2, scale))) for (part, a), scale in zip(own, (1, 2, 3, 4), strict=True)]
    for chosen in (own, own[1:3], own[:1], [own[3], own[0]], one_down):
        again = lora.split(lora.fused(chosen, 224), parts)
        chosen = sorted(chosen, key=lambda item: item[0].rows)
        assert [part for part, _ in again] == [part for part, _ in chosen]
        for (_, a), (_, b) in zip(chosen, again, strict=True):
            assert_equal_bits({"": a}, {"": b})
    shared = random_adapter(rng, LINEAR1, 5)
    assert all(a.rank == 5 for _, a in lora.split(shared, parts))
    assert_equal_bits({"": shared}, {"": lora.fused(lora.split(shared, parts), 224)})


def test_any_fused_adapter_comes_back_from_its_parts():
    """Zeros and minus zeros in all patterns, so that components change no part, one, several, and in any order."""
    rng = np.random.default_rng(0)
    parts = [part for part in lora.modules("diffusers", TINY).values() if part.tensor == QKV]
    for _ in range(200):
        whole = random_adapter(rng, QKV, rng.integers(1, 5))
        mask = np.repeat(rng.integers(0, 3, (3, whole.rank)), 32, axis=0)
        up = np.where(mask == 0, 0, np.where((mask == 1) & (rng.random() < 0.2), np.float32(-0.0), whole.up))
        whole = Adapter(whole.down, up, whole.scale)
        assert_equal_bits({"": whole}, {"": lora.fused(lora.split(whole, parts), 96)})


def test_only_up_has_its_halves_swapped_in_the_final_modulation():
    found = sample()[FINAL]
    tensors = lora.tensors_in({FINAL: found}, "diffusers", TINY)
    np.testing.assert_array_equal(tensors["transformer.norm_out.linear.lora_A.weight"], found.down)
    np.testing.assert_array_equal(tensors["transformer.norm_out.linear.lora_B.weight"], np.concatenate([found.up[32:], found.up[:32]]))


# --- Scale ---------------------------------------------------------------------------------------------------------------------

MODULE, TENSOR = "single_blocks.1.linear2", "single_blocks.1.linear2.weight"


def tensors_of(layout: str, rank: int = 4, **more) -> dict[str, np.ndarray]:
    """One module in a layout without alpha, and the tensors `more` of it."""
    tensors = lora.tensors_in({TENSOR: random_adapter(np.random.default_rng(0), TENSOR, rank)}, layout, TINY)
    bare = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    module = next(iter(bare)).rsplit(".", 2)[0]
    return bare | {f"{module}.{name}": np.asarray(value) for name, value in more.items()}


@pytest.mark.parametrize(
    ("layout", "alpha", "settings", "scale"),
    [
        ("musubi", None, {"r": 9, "lora_alpha": 7}, 1),
        ("musubi", np.float32(2), {"r": 9, "lora_alpha": 7}, 0.5),
        ("musubi", np.int64(4), None, 1),
        ("official", np.float32(2), None, 1),
        ("diffusers", None, None, 1),
        ("diffusers", np.float32(2), None, 0.5),
        ("diffusers", None, {"r": 4, "lora_alpha": 6}, 1.5),
        ("diffusers", None, {"r": 4, "lora_alpha": 6, "use_rslora": True}, 3),
        ("diffusers", None, {"r": 8, "rank_pattern": {"^single_transformer_blocks.1.proj_out": 4}, "lora_alpha": 8}, 2),
        ("diffusers", None, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^proj_out": 1, "1.proj_out": 2, "proj_out": 4}}, 0.5),
        ("diffusion-pipe", None, None, 1),
        ("diffusion-pipe", None, {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"single_blocks\.1\.linear2": 12}}, 3),
    ],
)
def test_alpha_means_what_it_means_to_the_tool(layout, alpha, settings, scale):
    tensors = tensors_of(layout, **({} if alpha is None else {"alpha": alpha}))
    np.testing.assert_array_equal(parsed(tensors, settings=settings).adapters[TENSOR].scale, [scale] * 4)


@pytest.mark.parametrize(
    ("dtype", "scale", "kept"), [("bfloat16", 0.5, "bfloat16"), ("bfloat16", 1 / 3, "float32"), ("float32", 3, "float32")]
)
def test_official_has_the_scale_in_up_and_alpha_is_the_rank(dtype, scale, kept):
    found = random_adapter(np.random.default_rng(0), TENSOR, 4, scale, jnp.dtype(dtype))
    tensors = lora.tensors_in({TENSOR: found}, "official", TINY)
    up = tensors["Hunyuan_video_I2V_lora_single_blocks_1_linear2.lora_up.weight"]
    assert up.dtype == kept
    np.testing.assert_allclose(up.astype(np.float32), found.up.astype(np.float32) * np.float32(scale), rtol=2e-7)
    assert tensors["Hunyuan_video_I2V_lora_single_blocks_1_linear2.alpha"] == 4


def test_parts_with_scales_of_their_own_stay_so_and_merge_alike_where_a_layout_has_one():
    found = {QKV: in_blocks(np.random.default_rng(0), QKV, {"to_q": 2, "to_k": 3}, {"to_q": 3.0, "to_k": 0.7})}
    again = {layout: parsed(lora.tensors_in(found, layout, TINY), settings=lora.settings_of(found, layout, TINY)) for layout in LAYOUTS}
    assert_equal_bits(found, again["diffusers"].adapters)
    base = np.zeros((96, 32), np.float32)
    for read in again.values():
        np.testing.assert_allclose(lora.merged(base, read.adapters[QKV]), lora.merged(base, found[QKV]), rtol=1e-6, atol=1e-6)


def test_settings_are_read_where_the_tools_keep_them(tmp_path):
    found = {TENSOR: random_adapter(np.random.default_rng(0), TENSOR, 4, 2.0)}
    for layout in ("diffusers", "diffusion-pipe"):
        adapters.write(tmp_path / layout / "a.safetensors", found, layout, TINY)
        assert adapters.read(tmp_path / layout, TINY).adapters[TENSOR].scale[0] == 2
    tensors = lora.tensors_in(found, "diffusers", TINY)
    for settings in ({"r": 4, "lora_alpha": 8}, {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 9}):
        write_safetensors(tmp_path / "a.safetensors", tensors, tensors.values(), metadata={lora.SETTINGS: json.dumps(settings)})
        assert adapters.read(tmp_path / "a.safetensors", TINY).adapters[TENSOR].scale[0] == 2
    (tmp_path / "diffusion-pipe" / adapters.SETTINGS).write_text("[")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        adapters.read(tmp_path / "diffusion-pipe", TINY)


def test_an_adapter_that_torch_saved_is_read(tmp_path):
    found = {TENSOR: random_adapter(np.random.default_rng(0), TENSOR, 4, 0.5)}
    torch.save(
        {name: torch.from_numpy(np.array(value)) for name, value in lora.tensors_in(found, "musubi", TINY).items()}, tmp_path / "a.pt"
    )
    assert_equal_bits(found, adapters.read(tmp_path / "a.pt", TINY).adapters)


def test_settings_of_another_adapter_are_not_overwritten(tmp_path):
    for rank in (2, 4):
        adapters.write(tmp_path / "a.safetensors", {TENSOR: random_adapter(np.random.default_rng(0), TENSOR, rank)}, "diffusion-pipe", TINY)
    with pytest.raises(UserError, match="settings of another adapter"):
        adapters.write(tmp_path / "b.safetensors", {TENSOR: random_adapter(np.random.default_rng(0), TENSOR, 3)}, "diffusion-pipe", TINY)


def test_metadata_is_what_the_tools_look_for(tmp_path):
    found = {QKV: in_blocks(np.random.default_rng(0), QKV, {"to_q": 2, "to_k": 3, "to_v": 3})}
    adapters.write(tmp_path / "d.safetensors", found, "diffusers", TINY, metadata={"title": "red circles"})
    said = open_tensors(tmp_path / "d.safetensors").metadata
    assert (said["format"], said["title"]) == ("pt", "red circles")
    settings = json.loads(said["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (3, 3)
    assert settings["transformer.rank_pattern"] == {"^transformer_blocks.1.attn.to_q": 2} == settings["transformer.alpha_pattern"]
    adapters.write(tmp_path / "m.safetensors", found, "musubi", TINY)
    said = open_tensors(tmp_path / "m.safetensors").metadata
    assert said == {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_network_alpha": "8"}
    assert lora.metadata_of(sample(), "musubi", TINY)["ss_network_dim"] == "Dynamic"


# --- Merging -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return our_params({name: value.detach().numpy() for name, value in diffusers_dit(TINY).named_parameters()}, TINY)


@pytest.fixture(scope="module")
def velocity():
    apply = jax.jit(lambda params, x: DiT(TINY).apply({"params": params}, **x))
    return lambda params, x: np.asarray(apply(params, x))


def merged_by_torch(tensors: dict[str, np.ndarray], scales: dict[str, float]):
    """diffusers' model with an adapter in its layout added to its own parameters."""
    model = diffusers_dit(TINY)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module, scale in scales.items():
            down, up = (torch.from_numpy(np.array(tensors[f"transformer.{module}.lora_{half}.weight"])) for half in "AB")
            parameters[f"{module}.weight"] += scale * (up.flatten(1) @ down.flatten(1)).reshape(parameters[f"{module}.weight"].shape)
    return model


@pytest.fixture(scope="module")
def expected():
    """Inputs, and the velocity of diffusers' model with `sample()` merged by 0.02."""
    tensors, settings = lora.tensors_in(sample(), "diffusers", TINY), lora.settings_of(sample(), "diffusers", TINY)
    alphas = {module: settings["alpha_pattern"].get(f"^{module}", settings["lora_alpha"]) for module in settings["target_modules"]}
    scales = {module: 0.02 * alpha / len(tensors[f"transformer.{module}.lora_A.weight"]) for module, alpha in alphas.items()}
    x = inputs(TINY) | {"latents": inputs(TINY)["latents"][:, :, :4]}
    return x, theirs(merged_by_torch(tensors, scales), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_merged_model_has_the_velocity_of_diffusers_merged_model(tmp_path, params, velocity, expected, layout):
    x, out = expected
    assert np.linalg.norm(velocity(params, x) - out) > 0.1 * np.linalg.norm(out)
    merged = lora.merge_params(TINY, params, through_file(tmp_path, sample(), layout).adapters, 0.02)
    assert np.linalg.norm(velocity(merged, x) - out) < 1e-5 * np.linalg.norm(out)


def test_weights_merged_one_by_one_are_the_merged_parameters(params):
    found = {tensor: adapter for tensor, adapter in sample().items() if tensor != "double_blocks.0.img_mod.linear.weight"}
    after = weights_of(TINY, lora.merge_params(TINY, params, found, -0.5))
    before = weights_of(TINY, params)
    for tensor in layouts.places(TINY):
        expected = before.read(tensor)
        if tensor in found:
            expected = lora.merged(expected, found[tensor], -0.5)
        np.testing.assert_allclose(after.read(tensor), expected, rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_merging_is_in_float32_and_keeps_the_type():
    found = random_adapter(np.random.default_rng(0), TENSOR, 3, 1 / 3, jnp.bfloat16)
    base = np.random.default_rng(1).standard_normal((32, 160)).astype(jnp.bfloat16)
    exact = base.astype(np.float64) + 0.7 * (found.up.astype(np.float64) * found.scale) @ found.down.astype(np.float64)
    out = lora.merged(base, found, 0.7)
    assert out.dtype == jnp.bfloat16
    assert (out == exact.astype(np.float32).astype(jnp.bfloat16)).mean() > 0.999


def test_diffusers_own_converter_makes_the_same_modules_of_released_paths():
    """It ignores alpha, takes width 3072 for `linear1`, and treats A of the refiner's qkv and of the final modulation as it does B."""
    found = {
        tensor: a for tensor, a in sample(scaled=False).items() if not any(name in tensor for name in (FINAL, "linear1", "self_attn_qkv"))
    }
    given = {name: torch.from_numpy(np.array(value)) for name, value in lora.tensors_in(found, "diffusion-pipe", TINY).items()}
    converted = {name: value.numpy() for name, value in lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers(given).items()}
    read = parsed(converted)
    assert read.layout == "diffusers"
    for tensor, adapter in found.items():
        base = np.zeros(layouts.places(TINY)[tensor].shape, np.float32)
        np.testing.assert_allclose(
            lora.merged(base, read.adapters[tensor]), lora.merged(base, adapter), rtol=1e-5, atol=1e-5, err_msg=tensor
        )


def test_diffusers_own_converter_splits_linear1_as_we_do():
    config = dataclasses.replace(
        TINY, width=3072, num_heads=24, rope_axes=(16, 56, 56), num_double_blocks=0, num_single_blocks=1, num_refiner_blocks=0
    )
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 3072)).astype(np.float32), rng.standard_normal((7 * 3072, 2)).astype(np.float32)
    found = {"single_blocks.0.linear1.weight": Adapter(down, up, np.ones(2))}
    given = {name: torch.from_numpy(value) for name, value in lora.tensors_in(found, "diffusion-pipe", config).items()}
    converted = lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers(given)
    assert_equal_tensors({name: value.numpy() for name, value in converted.items()}, lora.tensors_in(found, "diffusers", config))


# --- Errors and effect ---------------------------------------------------------------------------------------------------------


def spoiled(change, layout: str = "diffusers") -> dict[str, np.ndarray]:
    tensors = tensors_of(layout)
    change(tensors)
    return tensors


DOWN = "transformer.single_transformer_blocks.1.proj_out.lora_A.weight"
UP = "transformer.single_transformer_blocks.1.proj_out.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(UP), "has down and lacks up"),
        (lambda t: t.update({DOWN: t[DOWN][:3]}), r"down \(3, 160\) and up \(32, 4\), where \[rank, 160\] and \[32, rank\]"),
        (lambda t: t.update({DOWN: t[DOWN][:, :3]}), r"down \(4, 3\)"),
        (lambda t: t.update({UP: t[UP][:3]}), r"up \(3, 4\)"),
        (lambda t: t.update({DOWN: t[DOWN][:0], UP: t[UP][:, :0]}), "of one rank were expected"),
        (lambda t: t.update({DOWN: np.full((4, 160), np.nan, np.float32)}), "NaN or infinite numbers in down"),
        (lambda t: t.update({UP: np.full((32, 4), np.inf, jnp.bfloat16)}), "NaN or infinite numbers in up"),
        (lambda t: t.update({DOWN: t[DOWN].astype(jnp.float8_e4m3fn)}), "down of float8_e4m3fn"),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}), "down of int32"),
        (lambda t: t.update({UP.replace("lora_B.weight", "alpha"): np.ones(2)}), "alpha of shape"),
        (
            lambda t: t.update({DOWN.replace("proj_out", "proj_uot"): t[DOWN]}),
            "proj_uot.*Did you mean 'single_transformer_blocks.1.proj_out'",
        ),
        (lambda t: t.update({DOWN.replace("blocks.1.", "blocks.3."): t[DOWN]}), r"blocks\.3\.proj_out\.lora_A\.weight is unknown"),
        (lambda t: t.update({UP.replace("weight", "bias"): t[UP][:, 0]}), "is neither down, up nor alpha"),
        (lambda t: t.update({DOWN.replace("lora_A", "lora_down"): t[DOWN]}), "comes twice"),
        (lambda t: t.update({"text_encoder.q_proj.lora_A.weight": t[DOWN]}), "adapts a text encoder too"),
        (lambda t: t.update({"lora_te_q_proj.lora_down.weight": t[DOWN]}), "adapts a text encoder too"),
        (lambda t: t.update({"lora_unet_single_blocks_1_linear2.lora_down.weight": t[DOWN]}), "transformer.*is unknown"),
        (lambda t: t.clear(), "no adapter of a HunyuanVideo transformer"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        parsed(spoiled(change))


def test_a_weight_under_two_names_is_refused():
    tensors = {}
    for name, (half, shape) in itertools.product(("img_attn_qkv", "img_attn.qkv"), (("A", (2, 32)), ("B", (96, 2)))):
        tensors[f"diffusion_model.double_blocks.0.{name}.lora_{half}.weight"] = np.ones(shape, np.float32)
    with pytest.raises(UserError, match="under two names"):
        parsed(tensors)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8, "lora_alpha": 8}, "has rank 4, and 8 by its settings"),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "DoRA"),
        ({"r": 4, "lora_alpha": "8"}, "'8' as lora_alpha"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(a+)+": 3}}, "write them out"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": [3]}, "write them out"),
    ],
)
def test_settings_that_are_not_the_adapters_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        parsed(tensors_of("diffusers"), settings=settings)


def test_an_adapter_that_changes_nothing_is_refused_and_the_rest_is_told():
    rng = np.random.default_rng(0)
    base = {tensor: rng.standard_normal(layouts.places(TINY)[tensor].shape).astype(jnp.bfloat16) for tensor in (QKV, TENSOR)}
    small = {tensor: random_adapter(rng, tensor, 2, 1e-6) for tensor in base}
    changes = {tensor: lora.change(base[tensor], lora.merged(base[tensor], small[tensor])) for tensor in base}
    changes[QKV] = lora.change(base[QKV], base[QKV])
    with pytest.raises(UserError, match=r"none of its 2 weights. In 0 of them .* in 2 the change is lost when it is rounded"):
        lora.check_effect(small, {tensor: lora.change(base[tensor], base[tensor]) for tensor in base})
    zero = {tensor: Adapter(a.down, 0 * a.up, a.scale) for tensor, a in small.items()}
    merged = {tensor: lora.merged(base[tensor], zero[tensor]) for tensor in base}
    with pytest.raises(UserError, match="In 2 of them down, up or alpha is all zero"):
        lora.check_effect(zero, {tensor: lora.change(base[tensor], merged[tensor]) for tensor in base})
    large = lora.merged(base[TENSOR], Adapter(small[TENSOR].down, small[TENSOR].up, np.full(2, 0.1)))
    said = lora.check_effect(small, changes | {TENSOR: lora.change(base[TENSOR], large)})
    assert said.startswith("1 of 2 weights changed")
    assert TENSOR in said


def test_a_change_is_measured_against_the_weight():
    base = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    after = base + np.array([[0.0, 0.0], [0.5, 0.0]], np.float32)
    assert lora.change(base, after) == lora.Change(relative=pytest.approx(0.1), elements=0.25)


# --- The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, params):
    convert.write(weights_of(TINY, params), tmp_path / "base.safetensors", "tencent")
    return tmp_path / "base.safetensors"


def test_the_command_merges_adapters_into_weights_of_any_layout(tmp_path, base, params):
    adapters.write(tmp_path / "lora" / "adapter.safetensors", sample(), "musubi", TINY)
    options = ("--lora", f"{tmp_path}/lora/adapter.safetensors", "--multiplier", "0.5", "--verify")
    said = run_module("hunyuan_jax.convert", "--src", str(base), "--dst", f"{tmp_path}/merged", "--to", "diffusers", *options)
    assert "weights changed" in said
    assert f"{len(layouts.places(TINY))} tensors verified" in said
    merged = convert.load(tmp_path / "merged")[1]
    expected = lora.merge_params(TINY, params, sample(), 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max())), merged, expected)
    assert open_weights(tmp_path / "merged").metadata["lora_multiplier"] == "0.5"

    run_module(
        "hunyuan_jax.convert",
        "--src",
        str(base),
        "--dst",
        f"{tmp_path}/nothing",
        "--to",
        "diffusers",
        *options[:2],
        "--multiplier",
        "0",
        expect=2,
    )
    assert not (tmp_path / "nothing").exists()


def test_a_change_that_the_type_swallows_is_refused(params):
    qkv = jax.tree.map(np.ones_like, params["double_blocks"]["img_attn_qkv"])
    ones = {**params, "double_blocks": {**params["double_blocks"], "img_attn_qkv": qkv}}
    weights, found = weights_of(TINY, ones), {QKV: dataclasses.replace(sample()[QKV], up=1e-6 * sample()[QKV].up)}
    assert convert.merged_with(weights, found, 1.0)[1].startswith("1 of 1 weights changed")
    with pytest.raises(UserError, match="lost when it is rounded"):
        convert.merged_with(weights, found, 1.0, dtype="bf16")


def test_the_command_writes_adapters_in_another_layout(tmp_path, base):
    adapters.write(tmp_path / "adapter.safetensors", sample(), "musubi", TINY)
    arguments = ("--src", f"{tmp_path}/adapter.safetensors", "--dst", f"{tmp_path}/out/other.safetensors")
    assert "in the musubi layout" in run_module("hunyuan_jax.convert", *arguments, "--to", "diffusers", "--model", str(base))
    assert_equal_bits(sample(), adapters.read(tmp_path / "out" / "other.safetensors", TINY).adapters)
    assert "not 'comfyui'" in run_module("hunyuan_jax.convert", *arguments, "--to", "comfyui", "--model", str(base), expect=2)
    assert "were expected" in run_module(
        "hunyuan_jax.convert", *arguments, "--to", "diffusers", expect=2
    )  # the released model has other shapes
    assert "not 'musubi'" in run_module("hunyuan_jax.convert", "--src", str(base), "--dst", f"{tmp_path}/x", "--to", "musubi", expect=2)
