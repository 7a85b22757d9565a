"""Laws of the layers: published values of sinusoid and rope, norms that normalise, modulation that starts closed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.models.layers import (
    LayerNorm,
    Modulation,
    RMSNorm,
    apply_rope,
    gated_add,
    gelu_tanh,
    layer_norm,
    modulate,
    per_token,
    rope_table,
    silu,
    sinusoid,
)

RELEASED_AXES, RELEASED_THETA = (16, 56, 56), 256.0


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_sinusoid_has_the_published_values():
    features = np.asarray(sinusoid(jnp.array([873.25])))[0]
    np.testing.assert_allclose(features[[0, 1, 2, 64, 127]], [0.993650, -0.497148, -0.605405, -0.769794, 0.995600], atol=1e-5)
    np.testing.assert_allclose(features[[128, 129, 130, 192, 255]], [-0.112519, 0.867666, 0.795917, 0.638292, 0.093702], atol=1e-5)


def test_rope_table_has_the_published_values():
    rope = rope_table((3, 4, 5), RELEASED_AXES, RELEASED_THETA)
    token, channels = (2 * 4 + 3) * 5 + 4, np.array([0, 2, 14, 16, 18, 70, 72, 74, 126])
    cos = [-0.416147, 0.540302, 0.999878, -0.989992, -0.777204, 0.999898, -0.653644, -0.990251, 0.999819]
    sin = [0.909297, 0.841471, 0.015624, 0.141120, 0.629249, 0.014285, -0.756802, -0.139294, 0.019046]
    assert rope.cos.shape == (60, 64)
    np.testing.assert_allclose(rope.cos[token, channels // 2], cos, atol=1e-6)
    np.testing.assert_allclose(rope.sin[token, channels // 2], sin, atol=1e-6)


def test_rope_turns_adjacent_pairs_as_complex_numbers():
    rope = rope_table((2, 3, 4), (4, 6, 6), RELEASED_THETA)
    x = random(2, 24, 3, 16)
    pairs = np.asarray(x).astype(np.float64).view(np.complex128)
    angles = np.arctan2(np.asarray(rope.sin), np.asarray(rope.cos)).astype(np.float64)
    expected = (pairs * np.exp(1j * angles)[None, :, None, :]).view(np.float64)
    np.testing.assert_allclose(apply_rope(x, rope), expected, atol=1e-5)


def test_rope_scores_depend_on_the_distance_of_tokens_only():
    grid = (3, 4, 5)
    q, k = random(16), random(16, seed=1)
    rope = rope_table(grid, (4, 6, 6), RELEASED_THETA)
    turned = [apply_rope(jnp.broadcast_to(x, (1, 60, 1, 16)), rope).reshape(*grid, 16) for x in (q, k)]
    near = turned[0][0, 1, 1] @ turned[1][1, 2, 0]
    far = turned[0][1, 2, 4] @ turned[1][2, 3, 3]
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_norms_normalise_and_start_without_scale_or_shift():
    x = 5 + 3 * random(2, 7, 32)
    y = np.asarray(layer_norm(x))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-5)
    z = RMSNorm().apply(RMSNorm().init(jax.random.key(0), x), x)
    np.testing.assert_allclose(np.mean(np.square(z), -1), 1, atol=1e-5)
    module = LayerNorm(jnp.float32)
    np.testing.assert_allclose(module.apply(module.init(jax.random.key(0), x), x), y, atol=1e-6)


def test_norms_of_large_bfloat16_are_computed_in_float32():
    x = (1000 + random(4, 512)).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(layer_norm(x)).std(-1), 1, atol=1e-3)


def test_modulation_starts_closed():
    module = Modulation(2, jnp.float32)
    vec, x = random(3, 1, 32), random(3, 5, 32)
    out = module.apply(module.init(jax.random.key(0), vec), vec)
    assert len(out) == 2
    for mod in out:
        np.testing.assert_array_equal(gated_add(x, mod.gate, random(3, 5, 32, seed=2)), x)
        np.testing.assert_array_equal(modulate(x, mod.shift, mod.scale), layer_norm(x))


def test_clean_tokens_take_the_values_of_the_second_segment():
    values = random(2, 2, 8)
    clean = jnp.array([[True, False, True], [False, False, False]])
    spread = per_token(values, clean)
    for b in range(2):
        for token in range(3):
            np.testing.assert_array_equal(spread[b, token], values[b, int(clean[b, token])])
    np.testing.assert_array_equal(per_token(values, None), values[:, :1])


@pytest.mark.parametrize(("ours", "reference"), [(gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True)), (silu, jax.nn.silu)])
def test_recomputed_activations_have_the_same_values_and_gradients(ours, reference):
    x = 3 * random(64)
    np.testing.assert_allclose(ours(x), reference(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(reference))(x), rtol=1e-5, atol=1e-6)
