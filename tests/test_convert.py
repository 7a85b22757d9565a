"""Laws of weights in and out: no bit is lost between any two layouts, and diffusers computes the same from what we write."""

import dataclasses
import itertools
import json
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hunyuan_jax import convert  # noqa: E402
from hunyuan_jax.convert import write  # noqa: E402
from hunyuan_jax.errors import UserError  # noqa: E402
from hunyuan_jax.models.dit import DiT, DiTConfig  # noqa: E402
from hunyuan_jax.models.layouts import LAYOUTS, places, table  # noqa: E402
from hunyuan_jax.models.vae import VAEConfig  # noqa: E402
from hunyuan_jax.tensor_files import open_tensors, write_safetensors  # noqa: E402
from hunyuan_jax.weights import CONFIG, InMemory, Weights, open_weights, weights_of  # noqa: E402
from tests.commands import ROOT, run_module  # noqa: E402
from tests.diffusers_dit import diffusers_dit  # noqa: E402

TINY = DiTConfig(width=32, num_heads=2, num_double_blocks=2, num_single_blocks=3, text_dim=6, pooled_dim=5, rope_axes=(4, 6, 6))
CONFIGS = {
    "dit": TINY,
    "guided": dataclasses.replace(TINY, guidance_embed=True, num_refiner_blocks=1),
    "concat": dataclasses.replace(TINY, in_channels=33),
    "vae": VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2),
}


def random_weights(config, dtype=jnp.float32, seed=0) -> Weights:
    """Tensors of random bits that are finite numbers, as a tencent file would hold them."""
    rng = np.random.default_rng(seed)
    stored = {
        name: InMemory(rng.standard_normal((p.num_rows, *places(config)[p.tensor].shape[1:])).astype(dtype))
        for name, p in table("tencent", config).items()
    }
    return Weights(config, "tencent", stored, {})


def assert_equal_bits(one: Weights, other: Weights) -> None:
    for tensor in places(one.config):
        a, b = np.ascontiguousarray(one.read(tensor)), np.ascontiguousarray(other.read(tensor))
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_between_all_layouts_lose_no_bit(tmp_path, name, dtype):
    config = CONFIGS[name]
    original = random_weights(config, jnp.dtype(dtype))
    for first, second in itertools.product(LAYOUTS, repeat=2):
        write(original, tmp_path / f"{first}.safetensors", first)
        there = open_weights(tmp_path / f"{first}.safetensors")
        write(there, tmp_path / f"{first}-{second}", second)
        back = open_weights(tmp_path / f"{first}-{second}")
        assert back.config == config
        assert back.layout == second or isinstance(config, VAEConfig)
        assert_equal_bits(original, back)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "native"])
@pytest.mark.parametrize("name", ["dit", "guided", "concat"])
def test_a_model_is_known_from_names_and_shapes_alone(tmp_path, name, layout):
    config = CONFIGS[name]
    write(random_weights(config), tmp_path / "with.safetensors", layout)
    file = open_tensors(tmp_path / "with.safetensors")
    write_safetensors(tmp_path / "bare.safetensors", file.tensors, (t.read() for t in file.tensors.values()))
    (tmp_path / "config.json").write_text(json.dumps({"rope_axes_dim": config.rope_axes}))
    assert open_weights(tmp_path / "bare.safetensors").config == config
    assert open_weights(tmp_path / "bare.safetensors").layout == layout


def test_float32_to_bfloat16_rounds_and_back_is_exact(tmp_path):
    original = random_weights(TINY)
    write(original, tmp_path / "half.safetensors", "comfyui", dtype="bf16")
    write(open_weights(tmp_path / "half.safetensors"), tmp_path / "full.safetensors", "diffusers", dtype="fp32")
    full = open_weights(tmp_path / "full.safetensors")
    for tensor in places(TINY):
        np.testing.assert_array_equal(full.read(tensor), original.read(tensor).astype(jnp.bfloat16).astype(np.float32))


def inputs(config: DiTConfig) -> dict:
    key = iter(jax.random.split(jax.random.key(0), 8))
    return {
        "latents": jax.random.normal(next(key), (2, 3, 5, 6, config.in_channels)),
        "t": jnp.array([0.3, 0.9]),
        "txt": jax.random.normal(next(key), (2, 7, config.text_dim)),
        "txt_mask": jnp.arange(7) < jnp.array([[7], [3]]),
        "pooled": jax.random.normal(next(key), (2, config.pooled_dim)),
        "guidance": jnp.array([6.0, 2.0]) if config.guidance_embed else None,
    }


def theirs(model, x: dict) -> np.ndarray:
    as_torch = lambda a: torch.from_numpy(np.array(a))  # noqa: E731
    with torch.no_grad():
        out = model(
            hidden_states=as_torch(x["latents"]).permute(0, 4, 1, 2, 3),
            timestep=as_torch(1000 * x["t"]),
            encoder_hidden_states=as_torch(x["txt"]),
            encoder_attention_mask=as_torch(x["txt_mask"]),
            pooled_projections=as_torch(x["pooled"]),
            guidance=None if x["guidance"] is None else as_torch(1000 * x["guidance"]),
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("name", ["dit", "guided", "concat"])
def test_diffusers_and_we_compute_the_same_from_each_others_files(tmp_path, name):
    config = CONFIGS[name]
    x = inputs(config) | {"latents": inputs(config)["latents"][:, :, :4]}
    model = diffusers_dit(config, image_condition="latent_concat" if name == "concat" else None)
    model.save_pretrained(tmp_path / "theirs")
    loaded, params = convert.load(tmp_path / "theirs")
    assert loaded == config
    expected = theirs(model, x)
    ours = np.asarray(DiT(config).apply({"params": params}, **x))
    # The last bit of torch's exp in one frequency turns an angle by 2e-4 where guidance is 6000 thousandths.
    assert np.linalg.norm(ours - expected) <= 2e-5 * np.linalg.norm(expected)
    write(weights_of(config, params), tmp_path / "ours", "diffusers")
    again = type(model).from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(again, x), expected)


def test_how_images_condition_a_model_survives_layouts_that_do_not_say_it(tmp_path):
    diffusers_dit(CONFIGS["guided"], image_condition="token_replace").save_pretrained(tmp_path / "theirs")
    write(open_weights(tmp_path / "theirs"), tmp_path / "ours.safetensors", "comfyui")
    write(open_weights(tmp_path / "ours.safetensors"), tmp_path / "again", "diffusers")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["image_condition_type"] == "token_replace"


def convert_command(src: str, dst: str, to: str, *more: str, expect: int = 0) -> str:
    return run_module("hunyuan_jax.convert", "--src", src, "--dst", dst, "--to", to, *more, expect=expect)


def test_the_command_names_the_licence_of_weights_from_elsewhere_and_of_what_came_of_them(tmp_path):
    config = dataclasses.replace(TINY, num_double_blocks=1, num_single_blocks=1)
    tensors = {name: torch.from_numpy(tensor.value) for name, tensor in random_weights(config).stored.items()}
    torch.save({"module": tensors}, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps({"rope_axes_dim": config.rope_axes}))
    first = convert_command(f"{tmp_path}/weights.pt", f"{tmp_path}/ours.safetensors", "native", "--verify")
    assert "a transformer in the tencent layout" in first
    assert f"{len(tensors)} tensors verified" in first
    second = convert_command(f"{tmp_path}/ours.safetensors", f"{tmp_path}/theirs", "diffusers")
    for said in (first, second):
        assert said.count("Tencent Hunyuan Community License") == 1
    assert_equal_bits(open_weights(tmp_path / "theirs"), random_weights(config))

    (tmp_path / "theirs" / "config.json").unlink()
    write(weights_of(config, convert.load(tmp_path / "theirs")[1]), tmp_path / "trained.safetensors", "tencent")
    assert "License" not in convert_command(f"{tmp_path}/trained.safetensors", f"{tmp_path}/out", "comfyui")
    assert "nothing.pt cannot be read" in convert_command(f"{tmp_path}/nothing.pt", f"{tmp_path}/out2", "native", expect=2)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_load_the_same_parameters_onto_a_mesh_and_together_read_every_byte_once(tmp_path, processes):
    path = tmp_path / "model.safetensors"
    write(random_weights(TINY), path, "diffusers")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.sharded_load", str(path), str(port)]
    started = [
        subprocess.Popen([*command, str(n), str(processes)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for n in range(processes)
    ]
    ended = [(process.communicate(timeout=300), process.returncode) for process in started]
    assert [code for _, code in ended] == [0] * processes, ended[0][0][1].decode()[-3000:]
    said = [json.loads(out.decode().splitlines()[-1]) for (out, _), _ in ended]
    sizes = [tensor.nbytes for tensor in open_tensors(path).tensors.values()]
    # Vectors that devices do not divide are read by each process; they are a few hundred bytes.
    assert sum(sizes) <= sum(each["bytes"] for each in said) <= 1.02 * sum(sizes)
    assert max(each["bytes"] for each in said) <= 1.02 * sum(sizes) / processes
    assert max(each["largest"] for each in said) <= max(sizes) // 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converting_holds_no_more_than_a_few_tensors_in_memory(tmp_path, layout):
    config = dataclasses.replace(TINY, width=256, rope_axes=(32, 48, 48), num_single_blocks=12)
    write(random_weights(config, jnp.bfloat16), tmp_path / "model.safetensors", "tencent")
    weights = open_weights(tmp_path / "model.safetensors")
    largest = max(tensor.nbytes for tensor in open_tensors(tmp_path / "model.safetensors").tensors.values())
    tracemalloc.start()
    try:
        write(weights, tmp_path / "out.safetensors", layout)
        convert.verify(weights, tmp_path / "out.safetensors", dtype="keep")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * largest + 2e6 < 0.3 * (tmp_path / "out.safetensors").stat().st_size


def spoiled(tmp_path: Path, change) -> Path:
    write(random_weights(TINY), tmp_path / "sound.safetensors", "tencent")
    tensors = {name: tensor.read() for name, tensor in open_tensors(tmp_path / "sound.safetensors").tensors.items()}
    change(tensors)
    write_safetensors(
        tmp_path / "spoiled.safetensors", tensors, tensors.values(), metadata=open_tensors(tmp_path / "sound.safetensors").metadata
    )
    return tmp_path / "spoiled.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("single_blocks.1.linear2.bias"), r"1 missing.*single_blocks\.1\.linear2\.bias is missing"),
        (
            lambda t: t.update({"single_blocks.1.linaer2.bias": t.pop("single_blocks.1.linear2.bias")}),
            r"Did you mean 'single_blocks\.1\.linear2\.bias'",
        ),
        (
            lambda t: t.update({"vector_in.in_layer.bias": np.zeros(3, np.float32)}),
            r"vector_in\.in_layer\.bias has shape \(3,\), \(32,\) was expected",
        ),
        (lambda t: t.pop("time_in.mlp.0.weight"), "neither a HunyuanVideo transformer nor its VAE"),
        (lambda t: t.update({"img_in.proj.bias": t["img_in.proj.bias"].astype(np.int32)}), "img_in.proj.bias is int32; give"),
        (
            lambda t: t.update({"img_in.proj.bias": t["img_in.proj.bias"].astype(jnp.float8_e4m3fn)}),
            "float8_e4m3fn; give the weights in bfloat16",
        ),
    ],
)
def test_weights_that_are_not_the_model_are_refused(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        open_weights(spoiled(tmp_path, change))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_single_blocks": 10**9},
        {"num_refiner_blocks": 2.5},
        {"width": "32"},
        {"width": 10**30, "num_heads": 10**29, "rope_axes": [2, 4, 4]},
        {"rope_axes": [[4], 6, 6]},
        {"text_dim": None},
    ],
)
def test_a_file_that_says_of_itself_what_cannot_be_is_refused(tmp_path, changes):
    tensors = {name: tensor.value for name, tensor in random_weights(TINY).stored.items()}
    said = {CONFIG: json.dumps(dataclasses.asdict(TINY) | changes)}
    write_safetensors(tmp_path / "model.safetensors", tensors, tensors.values(), metadata=said)
    with pytest.raises(UserError):
        open_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ['"words"', "[1, 2]", "null", '{"width": 32', '{"width": 32}'])
def test_a_configuration_of_another_kind_is_refused(tmp_path, text):
    tensors = {name: tensor.value for name, tensor in random_weights(TINY).stored.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, tensors.values(), metadata={CONFIG: text})
    with pytest.raises(UserError):
        open_weights(tmp_path / "model.safetensors")


def test_pieces_of_different_types_become_one_that_holds_them_all(tmp_path):
    write(random_weights(TINY), tmp_path / "full.safetensors", "diffusers")
    file = open_tensors(tmp_path / "full.safetensors")
    tensors = {name: tensor.read() for name, tensor in file.tensors.items()}
    name = "single_transformer_blocks.0.attn.to_q.weight"
    tensors[name] = tensors[name].astype(jnp.bfloat16)
    write_safetensors(tmp_path / "mixed.safetensors", tensors, tensors.values(), metadata=file.metadata)
    mixed = open_weights(tmp_path / "mixed.safetensors").read("single_blocks.0.linear1.weight")
    expected = random_weights(TINY).read("single_blocks.0.linear1.weight").copy()
    expected[: TINY.width] = tensors[name].astype(np.float32)
    np.testing.assert_array_equal(mixed, expected)


def test_an_extra_tensor_is_an_error_unless_named(tmp_path):
    path = spoiled(tmp_path, lambda t: t.update({"ema_step": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match="ema_step is unknown"):
        open_weights(path)
    assert_equal_bits(open_weights(path, ignore=["ema_*"]), random_weights(TINY))


@pytest.mark.parametrize(
    ("name", "prefix"), [("dit", "model.model."), ("dit", "model.diffusion_model."), ("guided", "transformer."), ("vae", "vae.")]
)
def test_prefixes_that_tools_put_before_all_names_are_seen_through(tmp_path, name, prefix):
    tensors = {prefix + key: tensor.value for key, tensor in random_weights(CONFIGS[name]).stored.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, tensors.values())
    write(random_weights(CONFIGS[name]), tmp_path, "diffusers")
    (tmp_path / convert.VAE_WEIGHTS).unlink()
    assert_equal_bits(open_weights(tmp_path / "model.safetensors"), random_weights(CONFIGS[name]))


def test_verifying_finds_a_single_bit(tmp_path):
    path = tmp_path / "model.safetensors"
    write(random_weights(TINY), path, "diffusers")
    assert convert.verify(random_weights(TINY), path, dtype="keep") == len(places(TINY))
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not what was read"):
        convert.verify(random_weights(TINY), path, dtype="keep")


def test_a_component_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'vae'"):
        convert.load(tmp_path, component="vea")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, text):
    write(random_weights(CONFIGS["vae"]), tmp_path, "diffusers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        open_weights(tmp_path)
