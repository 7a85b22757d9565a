"""Laws of the text encoders: causal, blind to padding, and layer by layer the Llama and the CLIP of transformers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.text_encoders import CLIPText, CLIPTextConfig, TextTower, TextTowerConfig, abstract_params
from hunyuan_jax.text_weights import released_name
from tests.commands import run_program

SMALL = TextTowerConfig(vocab_size=50, width=32, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=48)
CLIP = CLIPTextConfig(vocab_size=60, max_positions=14, width=32, num_layers=3, num_heads=4, mlp_width=48)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9))
EVERY = np.ones(TOKENS.shape, bool)


def random_params(config):
    """Random everywhere, the norms' weights and the biases included."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(loc=float(path[-1].key in ("weight", "scale")), scale=0.3, size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.fixture(scope="module")
def run(params):
    return jax.jit(lambda tokens, mask: TextTower(SMALL).apply({"params": params}, tokens, mask))


def test_padding_changes_nothing_before_it(run):
    mask = EVERY.copy()
    mask[:, 6:] = False
    other = np.where(mask, TOKENS, 7)
    np.testing.assert_allclose(run(other, mask)[:, :6], run(TOKENS, EVERY)[:, :6], atol=1e-5)
    assert np.isfinite(run(other, mask)).all()


def test_later_tokens_do_not_change_earlier_states(run):
    later = TOKENS.copy()
    later[:, 5:] = (later[:, 5:] + 1) % 50
    out, changed = run(TOKENS, EVERY), run(later, EVERY)
    np.testing.assert_array_equal(out[:, :5], changed[:, :5])
    assert (np.asarray(out[:, 5:]) != np.asarray(changed[:, 5:])).any(axis=-1).all()


def test_clip_does_not_see_what_stands_behind_the_end_of_text():
    tokens = np.concatenate([TOKENS % 40, [[59, 0, 0], [59, 0, 0]]], axis=1)
    behind = np.where(np.arange(12) < 10, tokens, 5)
    params = random_params(CLIP)
    apply = jax.jit(lambda tokens: CLIPText(CLIP).apply({"params": params}, tokens))
    (states, pooled), (others, same) = apply(tokens), apply(behind)
    np.testing.assert_array_equal(pooled, same)
    np.testing.assert_array_equal(pooled, states[:, 9])
    np.testing.assert_array_equal(states[:, :10], others[:, :10])
    assert (np.asarray(states[:, 10:]) != np.asarray(others[:, 10:])).any(axis=-1).all()


def relative_error(ours, theirs, valid) -> float:
    """The largest difference at valid tokens, over the largest value there."""
    ours, theirs = np.asarray(ours)[valid], np.asarray(theirs)[valid]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("head_dim", [None, 12])
def test_every_layer_is_the_one_of_transformers_llama(head_dim):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, head_dim=head_dim, skip_layers=0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = transformers.LlamaModel(
        transformers.LlamaConfig(vocab_size=50, **sizes, head_dim=head_dim, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta)
    )
    params = random_params(config)
    assert load_into(theirs, params, config) == ["norm.weight"]
    last = []
    theirs.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))  # before the norm that we leave out
    tokens = np.random.default_rng(2).integers(0, 50, (3, 40))
    valid = np.arange(40) < np.array([40, 17, 3])[:, None]
    with torch.no_grad():
        given = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(valid.astype(np.int64))}
        expected = [*theirs.eval()(**given, output_hidden_states=True).hidden_states[:-1], *last]
    assert len(expected) == 5
    np.testing.assert_array_equal(params["embed_tokens"][tokens], expected[0])

    def layers(tokens, mask):
        stopped = [TextTower(dataclasses.replace(config, skip_layers=4 - layer)) for layer in (1, 2, 3, 4)]
        return [tower.apply({"params": params}, tokens, mask) for tower in stopped]

    for layer, (ours, state) in enumerate(zip(jax.jit(layers)(tokens, valid), expected[1:], strict=True), start=1):
        assert relative_error(ours, state, valid) <= 1e-5, layer


@pytest.mark.parametrize("eos", [2, 57])
def test_every_layer_and_the_pooled_state_are_those_of_transformers_clip(eos):
    """With the legacy 2 the end is the highest id, 59, though a 2 comes first; with 57 it is not the 58 before it. Both are padding too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(CLIP, eos_token_id=eos)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 14}
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=60, **sizes, eos_token_id=eos))
    params = random_params(config)
    assert load_into(theirs, params, config) == []
    lengths = np.array([12, 7, 4])
    valid = np.arange(12) < lengths[:, None]
    tokens = np.where(np.arange(12) < lengths[:, None] - 1, np.random.default_rng(3).integers(3, 57, (3, 12)), 59 if eos == 2 else 57)
    tokens[:, 1] = 2 if eos == 2 else 58
    with torch.no_grad():
        given = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(valid.astype(np.int64))}
        found = theirs.eval()(**given, output_hidden_states=True)
        expected = [theirs.final_layer_norm(state) for state in found.hidden_states]

    def layers(tokens):
        return [CLIPText(dataclasses.replace(config, num_layers=layer)).apply({"params": params}, tokens) for layer in range(4)]

    for layer, ((ours, _), state) in enumerate(zip(jax.jit(layers)(tokens), expected, strict=True)):
        assert relative_error(ours, state, valid) <= 1e-5, layer
    states, pooled = jax.jit(layers)(tokens)[-1]
    assert relative_error(pooled, found.pooler_output, slice(None)) <= 1e-5
    np.testing.assert_array_equal(pooled, states[np.arange(3), lengths - 1])


def load_into(theirs, params, config) -> list[str]:
    """Puts our parameters into a model of transformers; returns what it has besides."""
    import torch

    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parameter = "/".join(key.key for key in path)
        state[released_name(parameter, config)] = torch.from_numpy(np.array(leaf.T if parameter.endswith("/kernel") else leaf))
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    return found.missing_keys


@pytest.mark.parametrize("config", [SMALL, CLIP])
def test_bfloat16_gives_the_same_states_to_its_precision(config):
    model, inputs = (TextTower, (TOKENS, EVERY)) if config is SMALL else (CLIPText, (TOKENS,))
    params, half = random_params(config), dataclasses.replace(config, dtype="bfloat16")
    run = jax.jit(lambda *inputs: [jax.tree.leaves(model(c).apply({"params": params}, *inputs))[0] for c in (config, half)])
    states = run(*inputs)
    assert [state.dtype for state in states] == [jnp.float32, jnp.bfloat16]
    assert 1e-4 < relative_error(states[1].astype(jnp.float32), states[0], slice(None)) < 3e-2


def test_the_default_tower_is_llama_3_8b_without_its_last_two_layers():
    config = TextTowerConfig()
    params = abstract_params(config)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 128_320 * 4096 + 30 * layer == 7_068_958_720
    assert "layers_29" in params
    assert "layers_30" not in params
    tokens, mask = jax.ShapeDtypeStruct((2, 351), jnp.int32), jax.ShapeDtypeStruct((2, 351), jnp.bool_)
    out = jax.eval_shape(lambda params, *inputs: TextTower(config).apply({"params": params}, *inputs), params, tokens, mask)
    assert out.shape == (2, 351, 4096)


def test_the_default_clip_is_the_text_tower_of_vit_l_14():
    params = abstract_params(CLIPTextConfig())
    layer = 4 * (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768 + 4 * 768
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == (49_408 + 77 + 2) * 768 + 12 * layer == 123_060_480
    tokens = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    states, pooled = jax.eval_shape(lambda params, tokens: CLIPText(CLIPTextConfig()).apply({"params": params}, tokens), params, tokens)
    assert states.shape == (2, 77, 768)
    assert pooled.shape == (2, 768)


@pytest.mark.parametrize(
    "wrong",
    [{"num_heads": 3}, {"num_kv_heads": 3}, {"skip_layers": 32}, {"skip_layers": -1}, {"head_dim": 7}, {"dtype": "float16"}],
)
def test_impossible_towers_are_refused(wrong):
    with pytest.raises(UserError, match="Text tower"):
        TextTowerConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"num_heads": 7}, {"dtype": "float16"}])
def test_impossible_clips_are_refused(wrong):
    with pytest.raises(UserError, match="CLIP"):
        CLIPTextConfig(**wrong)


def test_clip_refuses_texts_longer_than_its_positions():
    with pytest.raises(UserError, match="at most 14 tokens, and a text has 15"):
        CLIPText(CLIP).apply({"params": random_params(CLIP)}, np.zeros((1, 15), int))


EXCHANGED = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from hunyuan_jax.hlo import Program
from hunyuan_jax.models.text_encoders import CLIPText, CLIPTextConfig, TextTower, TextTowerConfig, abstract_params
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings, replicated

mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
language = TextTowerConfig(vocab_size=640, width=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=96)
clip = CLIPTextConfig(vocab_size=640, max_positions=12, width=64, num_layers=2, num_heads=4, mlp_width=96)
ids, mask, clip_ids = (
    jax.ShapeDtypeStruct((8, length), dtype, sharding=batch_sharding(mesh))
    for length, dtype in ((40, jnp.int32), (40, jnp.bool_), (12, jnp.int32))
)
for encoder, config, inputs in ((TextTower, language, (ids, mask)), (CLIPText, clip, (clip_ids,))):
    shapes = abstract_params(config)
    places = param_shardings(shapes, mesh)
    params = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)
    run = lambda params, *x: encoder(config).apply({"params": params}, *x)
    outputs = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run, params, *inputs)))
    with jax.set_mesh(mesh):
        program = jax.jit(run, out_shardings=replicated(mesh))
        exchanges = Program(program.lower(params, *inputs).compile().as_text()).exchanges(dict(mesh.shape))
    kernels = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "kernel")
    wanted = {"all-gather": 3 / 4 * 4 * (kernels + inputs[0].size + outputs), "all-to-all": 3 / 4 * inputs[0].size / 4 * 64 * 4}
    sent = {kind: sum(e.sent * e.times for e in exchanges if e.kind == kind) for kind in {e.kind for e in exchanges}}
    assert sent == wanted, (encoder, sent, wanted)
print("kernels alone")
"""


def test_over_devices_kernels_travel_and_the_features_that_are_looked_up_and_no_table_and_no_other_activation():
    assert run_program(EXCHANGED) == "kernels alone"
