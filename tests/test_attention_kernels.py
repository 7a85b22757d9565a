"""Laws of the kernels of attention: one gives what the other does, in values, gradients and parts that can be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax import attention_kernels
from hunyuan_jax.attention_kernels import BLOCKS, LANES, REFERENCE, SPLASH, backend_for, block_length, block_sizes, merge
from hunyuan_jax.models.attention import attention

BATCH, HEADS, WIDTH = 2, 3, 16


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def arrays(rng: np.random.Generator, *tokens: int) -> list[np.ndarray]:
    return [rng.normal(size=(BATCH, count, HEADS, WIDTH)).astype(np.float32) for count in tokens]


@pytest.mark.parametrize(("queries", "keys"), [(5, 3), (130, 128), (900, 300)])
@pytest.mark.parametrize("masked", [False, True])
def test_splash_gives_the_results_and_the_gradients_of_the_reference(rng, monkeypatch, queries, keys, masked):
    """Interpreted on a CPU; lengths that no block divides, and gradients made in several parts of the keys."""
    monkeypatch.setattr(attention_kernels, "MOST_COPIES", 1)
    monkeypatch.setattr(attention_kernels, "BLOCKS", (256, 128))
    q, k, v, slope = arrays(rng, queries, keys, keys, queries)
    valid = np.arange(keys) < np.array([[keys - 1], [2]]) if masked else None
    out, lse = REFERENCE.attend(q, k, v, valid)
    expected = out, lse, *REFERENCE.attend_backward(q, k, v, valid, out, lse, slope)
    got = *SPLASH.attend(q, k, v, valid), *SPLASH.attend_backward(q, k, v, valid, out, lse, slope)
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", [REFERENCE, SPLASH], ids=["reference", "splash"])
def test_parts_over_different_keys_merge_to_the_whole_even_where_one_has_no_valid_key(rng, kernel):
    q, k, v = arrays(rng, 9, 20, 20)
    valid = np.arange(20) < np.array([[20], [7]])
    parts = [kernel.attend(q, k[:, part], v[:, part], valid[:, part]) for part in (slice(0, 12), slice(12, 20))]
    merged = merge(*parts)
    for one, other in zip(merged, REFERENCE.attend(q, k, v, valid), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert merged[0].dtype == jnp.float32


def test_attention_is_the_same_with_either_kernel_and_so_are_its_gradients(rng):
    q, k, v, slope = arrays(rng, 21, 30, 30, 21)

    def score(q, k, v, backend):
        return jnp.sum(slope * attention(q, k, v, kv_lengths=jnp.array([30, 4]), backend=backend))

    one, other = (jax.jit(jax.value_and_grad(lambda *x, b=b: score(*x, b), argnums=(0, 1, 2)))(q, k, v) for b in ("reference", "splash"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_blocks_are_whole_lanes_small_enough_and_the_ones_that_pad_least():
    for tokens in (1, 128, 129, 769, 1409, 14_850, 14_976, 29_700, 118_800):
        size = block_length(tokens)
        padded = -(-tokens // size) * size
        assert size % LANES == 0
        assert size <= max(BLOCKS)
        assert padded - tokens < LANES or padded == min(-(-tokens // other) * other for other in BLOCKS)
        sizes = block_sizes(tokens, tokens)
        assert size % sizes.block_kv_compute == 0
        assert sizes.block_kv_compute >= min(size, 256)


def test_the_kernel_of_a_cpu_is_the_reference_unless_another_is_asked_for():
    assert backend_for("auto", jnp.bfloat16) == "reference"
    assert backend_for("splash", jnp.bfloat16) == "splash"
