"""Laws of the text tower: causal, blind to padding, and the Llama of transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.text_encoders import TextTower, TextTowerConfig

SMALL = TextTowerConfig(vocab_size=50, width=32, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=48)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9))
EVERY = np.ones(TOKENS.shape, bool)


def abstract_tower(config: TextTowerConfig):
    shape = (1, 3)
    arguments = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    return jax.eval_shape(lambda tokens, mask: TextTower(config).init(jax.random.key(0), tokens, mask)["params"], *arguments)


@pytest.fixture(scope="module")
def params():
    """Random everywhere, the norms' weights included."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(loc=float(leaf.ndim == 1), scale=0.3, size=leaf.shape), jnp.float32), abstract_tower(SMALL)
    )


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


def test_states_are_the_third_last_of_transformers_llama(params, run):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": SMALL.rope_theta}
    config = transformers.LlamaConfig(
        vocab_size=50, **sizes, rms_norm_eps=SMALL.norm_eps, rope_parameters=rope, rope_theta=SMALL.rope_theta
    )
    theirs = transformers.LlamaModel(config).eval().float()
    load_llama(theirs, params, torch)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS), output_hidden_states=True).hidden_states[-3].numpy()
    error = np.abs(np.asarray(run(TOKENS, EVERY)) - expected).max() / np.abs(expected).max()
    assert error <= 1e-5


def load_llama(theirs, params, torch) -> None:
    """Our parameters into the layers that both have; the rest of theirs stays as it is."""
    state = {"embed_tokens.weight": params["embed_tokens"]}
    for layer, parts in ((name, parts) for name, parts in params.items() if name.startswith("layers_")):
        for name, leaf in parts.items():
            place = {"proj": "self_attn" if name[0] in "qkvo" else "mlp"}.get(name.split("_")[-1])
            path = ".".join(part for part in (layer.replace("_", "."), place, name, "weight") if part)
            state[path] = leaf["weight"] if "weight" in leaf else leaf["kernel"].T
    found = theirs.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()}, strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith(("layers.2.", "layers.3.", "norm.")) for name in found.missing_keys)


def test_the_default_config_is_llama_3_8b_without_its_last_two_layers():
    params = abstract_tower(TextTowerConfig())
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 128_320 * 4096 + 30 * layer
    assert "layers_29" in params
    assert "layers_30" not in params


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"num_kv_heads": 3}, {"skip_layers": 32}, {"skip_layers": -1}])
def test_impossible_towers_are_refused(wrong):
    with pytest.raises(UserError, match="Text tower"):
        TextTowerConfig(**wrong)
