"""Laws of loading text encoders: what transformers saved gives its states, under whatever prefix, in whatever file, on whatever mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.text_encoders import CLIPText, CLIPTextConfig, TextTower, TextTowerConfig
from hunyuan_jax.tensor_files import open_tensors, write_safetensors
from hunyuan_jax.text_weights import CLIP_PREFIXES, LLAMA_PREFIXES, _clip_config, _llama_config, load_clip_text, load_text_tower
from tests.commands import run_program

LLAMA = TextTowerConfig(
    vocab_size=64, width=32, num_layers=4, skip_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, norm_eps=1e-6
)
CLIP = CLIPTextConfig(vocab_size=60, max_positions=12, width=32, num_layers=2, num_heads=4, mlp_width=48, eos_token_id=57)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TOKENS = np.random.default_rng(0).integers(3, 57, (3, 12))
LENGTHS = np.array([12, 8, 3])
VALID = np.arange(12) < LENGTHS[:, None]


@pytest.fixture(scope="module")
def models():
    """Tiny models of transformers, every weight random: a Llava, its language model twice over, a CLIP, and its text tower."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=4, num_key_value_heads=2, rope_theta=5e5, **SIZES)
    clip = transformers.CLIPTextConfig(
        vocab_size=60, num_hidden_layers=2, max_position_embeddings=12, bos_token_id=1, eos_token_id=57, **SIZES
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    )
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=clip.to_dict(), vision_config=vision.to_dict()))
    with torch.no_grad():
        for name, parameter in [*llava.named_parameters(), *both.named_parameters()]:
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.3)
    causal, tower = transformers.LlamaForCausalLM(text), transformers.CLIPTextModel(clip)
    causal.model.load_state_dict(llava.model.language_model.state_dict())
    tower.load_state_dict(both.text_model.state_dict())
    return {"llava": llava.eval(), "causal": causal, "bare": causal.model, "clip": both, "clip_text": tower.eval()}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(root / name, max_shard_size="20KB" if name == "llava" else "1GB")
    return root


@pytest.fixture(scope="module")
def tower(folders):
    return load_text_tower(folders / "llava")


@pytest.fixture(scope="module")
def clip(folders):
    return load_clip_text(folders / "clip_text")


def equal(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def given(torch):
    return {"input_ids": torch.from_numpy(TOKENS), "attention_mask": torch.from_numpy(VALID.astype(np.int64))}


def test_the_language_half_of_a_llava_in_shards_gives_its_third_last_states(models, folders, tower):
    import torch

    assert len(list((folders / "llava").glob("*.safetensors"))) > 5
    config, params = tower
    assert config == LLAMA
    with torch.no_grad():
        expected = models["llava"](**given(torch), output_hidden_states=True).hidden_states[-3]
    states = jax.jit(lambda params: TextTower(config).apply({"params": params}, TOKENS, VALID))(params)
    assert relative_error(np.asarray(states)[VALID], expected.numpy()[VALID]) <= 1e-5


def test_a_clip_text_model_gives_its_states_and_its_pooled_ones(models, clip):
    import torch

    config, params = clip
    assert config == CLIP
    tokens = TOKENS.copy()
    tokens[np.arange(3), LENGTHS - 1] = 57
    with torch.no_grad():
        expected = models["clip_text"](torch.from_numpy(tokens))
    states, pooled = jax.jit(lambda params: CLIPText(config).apply({"params": params}, tokens))(params)
    assert relative_error(states, expected.last_hidden_state) <= 1e-5
    assert relative_error(pooled, expected.pooler_output) <= 1e-5


@pytest.mark.parametrize("name", ["causal", "bare"])
def test_a_language_model_alone_is_the_one_within_a_llava(folders, tower, name):
    config, params = load_text_tower(folders / name)
    assert config == tower[0]
    equal(params, tower[1])


def test_a_whole_clip_has_the_text_tower_of_the_one_alone(folders, clip):
    config, params = load_clip_text(folders / "clip")
    assert config == clip[0]
    equal(params, clip[1])


def copy(folder, target, *, change=lambda tensors: tensors, settings=None):
    """A folder with the tensors of another, changed, in one file, and with its config.json, some fields changed."""
    target.mkdir()
    said = json.loads((folder / "config.json").read_text()) | (settings or {})
    (target / "config.json").write_text(json.dumps({name: value for name, value in said.items() if value != "left out"}))
    tensors = change({name: tensor.read() for name, tensor in open_tensors(folder).tensors.items()})
    write_safetensors(target / "model.safetensors", tensors, tensors.values())
    return target


@pytest.mark.parametrize("prefix", LLAMA_PREFIXES)
def test_a_tower_is_found_under_every_prefix_among_other_tensors(folders, tower, tmp_path, prefix):
    others = {
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((3, 2), np.float32),
        "multi_modal_projector.linear_1.weight": np.ones((2, 2), np.float32),
        "lm_head.weight": np.ones((4, 2), np.float32),
        f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        f"{prefix}layers.3.self_attn.q_proj.bias": np.ones(4, np.float32),  # of a layer that is not run
    }
    change = lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()} | others  # noqa: E731
    equal(load_text_tower(copy(folders / "bare", tmp_path / "copy", change=change))[1], tower[1])


@pytest.mark.parametrize("prefix", CLIP_PREFIXES)
def test_a_clip_is_found_under_every_prefix_among_other_tensors(folders, clip, tmp_path, prefix):
    others = {
        f"{prefix}embeddings.position_ids": np.arange(12)[None],
        "vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((3, 2), np.float32),
        "text_projection.weight": np.ones((2, 2), np.float32),
    }
    change = lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()} | others  # noqa: E731
    equal(load_clip_text(copy(folders / "clip_text", tmp_path / "copy", change=change))[1], clip[1])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_files_of_torch_save_are_read_as_safetensors_are(models, folders, tower, tmp_path, name):
    import torch

    torch.save(models["causal"].state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text((folders / "causal" / "config.json").read_text())
    for path in (tmp_path, tmp_path / name):
        config, params = load_text_tower(path)
        assert config == tower[0]
        equal(params, tower[1])


def test_parameters_have_the_dtype_that_is_asked_for(folders, tower):
    config, params = load_text_tower(folders / "llava", dtype="bfloat16")
    assert config == dataclasses.replace(tower[0], dtype="bfloat16")
    equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tower[1]))


def test_skipping_no_layers_loads_them_all(folders):
    config, params = load_text_tower(folders / "llava", skip_layers=0)
    assert config.layers_run == 4
    assert {name for name in params if name != "embed_tokens"} == {f"layers_{layer}" for layer in range(4)}


SHARDED = """
import json, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from flax import traverse_util
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import param_shardings
from hunyuan_jax.stored_tensor import StoredTensor
from hunyuan_jax.text_weights import load_clip_text, load_text_tower

mesh, read, original = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), [], StoredTensor._bytes
StoredTensor._bytes = lambda self, offset, count: (read.append(count), original(self, offset, count))[1]
for load, folder in ((load_text_tower, "llava"), (load_clip_text, "clip")):
    _, whole = load(f"FOLDERS/{folder}")
    wanted = traverse_util.flatten_dict(param_shardings(whole, mesh), sep="/")
    read.clear()
    placed = traverse_util.flatten_dict(load(f"FOLDERS/{folder}", shardings=wanted)[1], sep="/")
    whole = traverse_util.flatten_dict(whole, sep="/")
    assert placed.keys() == whole.keys()
    for name, value in placed.items():
        assert value.sharding.is_equivalent_to(wanted[name], value.ndim), name
        np.testing.assert_array_equal(value, whole[name])
    assert sum(read) == sum(value.nbytes for value in whole.values()), "each row is read once"
    assert max(read) <= max(value.nbytes for value in whole.values()) / 4, "each device reads its run of rows"
    kernel = placed["layers_0/q_proj/kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 16), kernel.sharding
print("equal")
"""


def test_parameters_are_read_once_onto_a_mesh_and_are_the_same_there(folders):
    assert run_program(SHARDED.replace("FOLDERS", str(folders))) == "equal"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


UP = "layers.1.mlp.up_proj.weight"
BROKEN = {
    "missing": (without(UP), rf"{UP} is missing"),
    "misspelt": (lambda t: without(UP)(t) | {UP.replace("up_proj", "upp_proj"): t[UP]}, r"Did you mean 'layers.1.mlp.upp_proj.weight'"),
    "shape": (lambda t: t | {UP: t[UP][:-1]}, rf"{UP} has shape \(47, 32\), \(48, 32\) was expected"),
    "transposed": (lambda t: t | {UP: t[UP].T}, rf"{UP} has shape \(32, 48\), \(48, 32\) was expected"),
    "integers": (lambda t: t | {UP: t[UP].astype(np.int32)}, rf"{UP} is int32"),
    "bias": (lambda t: t | {"layers.1.self_attn.q_proj.bias": t[UP][0]}, r"layers.1.self_attn.q_proj.bias is unknown"),
    "another model": (lambda t: {"h.0.attn.weight": t[UP], "h.1.attn.weight": t[UP]}, r"cannot be made of 2 tensors"),
    "other names": (lambda t: {f"h.{name}": value for name, value in t.items()}, r"embed_tokens.weight is missing"),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_tensors_that_do_not_make_up_the_model_are_refused_by_name(folders, tmp_path, change, said):
    folder = copy(folders / "bare", tmp_path / "copy", change=change)
    with pytest.raises(UserError, match=said) as caught:
        load_text_tower(folder)
    assert str(folder) in str(caught.value)
    if "cannot be made" not in said:
        assert "(prefix '" in str(caught.value)
        assert "tried were 'language_model.model.', " in str(caught.value)


def test_a_clip_without_a_bias_is_refused(folders, tmp_path):
    name = "encoder.layers.1.self_attn.out_proj.bias"
    with pytest.raises(UserError, match=f"1 missing, 0 unknown.*{name} is missing"):
        load_clip_text(copy(folders / "clip_text", tmp_path / "copy", change=without(name)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters is of the type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is of the type 'linear'"),
        ({"rope_scaling": 7}, "rope_scaling is of the type '7'"),
        ({"attention_bias": True}, "attention_bias is True, which is not supported"),
        ({"mlp_bias": True}, "mlp_bias is True, which is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, which is not supported; it must be silu"),
        ({"model_type": "qwen2"}, "has the model_type 'qwen2'; llama was expected"),
        ({"hidden_size": "32"}, "hidden_size is 32, where a positive whole number was expected"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, where a positive number was expected"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers of config.json cannot be made of 38 tensors"),
        ({"num_hidden_layers": 2}, "skip_layers=2 must be at least 0 and below num_layers=2"),
        ({"text_config": 3}, "an object was expected"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folders, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        load_text_tower(copy(folders / "bare", tmp_path / "copy", settings=settings))


def test_a_clip_with_another_activation_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="it must be quick_gelu"):
        load_clip_text(copy(folders / "clip_text", tmp_path / "copy", settings={"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="model_type 'llama'; clip_text_model or clip was expected"):
        load_clip_text(folders / "bare")


def test_a_folder_that_is_missing_or_has_no_config_or_no_tensors_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="nowhere is missing"):
        load_text_tower(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json cannot be read \(No such file or directory\)"):
        load_text_tower(tmp_path)
    (tmp_path / "config.json").write_text((folders / "bare" / "config.json").read_text())
    with pytest.raises(UserError, match="there are 0"):
        load_text_tower(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as the configuration"):
        load_text_tower(tmp_path)


@pytest.mark.parametrize("dropped", ["rms_norm_eps", "num_key_value_heads", "head_dim", "rope_parameters"])
def test_fields_left_out_are_what_transformers_takes(folders, tmp_path, dropped):
    import transformers

    settings = {dropped: "left out"} | ({"rope_theta": 3e4} if dropped == "rope_parameters" else {})
    grouped = dropped != "num_key_value_heads"

    def change(tensors):
        """One head of keys for each head of queries, where the config no longer says that they share."""
        shared = () if grouped else ("k_proj.weight", "v_proj.weight")
        return {name: np.concatenate([value, value]) if name.endswith(shared) else value for name, value in tensors.items()}

    folder = copy(folders / "bare", tmp_path / "copy", settings=settings, change=change)
    theirs = transformers.LlamaConfig.from_pretrained(folder)
    config, _ = load_text_tower(folder)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_width == theirs.head_dim
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


def test_the_defaults_of_both_configs_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    llama, clip = transformers.LlamaConfig(), transformers.CLIPTextConfig()
    assert _llama_config({}, 2, "float32", where="") == TextTowerConfig(
        vocab_size=llama.vocab_size,
        width=llama.hidden_size,
        num_layers=llama.num_hidden_layers,
        num_heads=llama.num_attention_heads,
        num_kv_heads=llama.num_key_value_heads,
        mlp_width=llama.intermediate_size,
        rope_theta=llama.rope_parameters["rope_theta"],
        norm_eps=llama.rms_norm_eps,
    )
    assert _clip_config({}, "float32", where="") == CLIPTextConfig(
        vocab_size=clip.vocab_size,
        max_positions=clip.max_position_embeddings,
        width=clip.hidden_size,
        num_layers=clip.num_hidden_layers,
        num_heads=clip.num_attention_heads,
        mlp_width=clip.intermediate_size,
        norm_eps=clip.layer_norm_eps,
        eos_token_id=clip.eos_token_id,
    )
