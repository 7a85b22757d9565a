"""Laws of attention: it is softmax attention, and keys past the length do not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.models.attention import attention

B, L, M, H, D = 3, 7, 9, 2, 8
LENGTHS = jnp.array([9, 1, 4])


@pytest.fixture(scope="module")
def qkv() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(3 * jax.random.normal(key, (B, n, H, D)) for key, n in zip(keys, (L, M, M), strict=True))


def by_hand(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> np.ndarray:
    """One query at a time in float64, over sliced keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, n in enumerate(np.asarray(lengths)):
        for row in range(q.shape[1]):
            for h in range(H):
                scores = np.exp(k[b, :n, h] @ q[b, row, h] / np.sqrt(D))
                out[b, row, h] = scores @ v[b, :n, h] / scores.sum()
    return out


def test_attention_is_softmax_over_the_valid_keys(qkv):
    np.testing.assert_allclose(attention(*qkv, kv_lengths=LENGTHS), by_hand(*qkv, LENGTHS), atol=1e-5)
    np.testing.assert_allclose(attention(*qkv), by_hand(*qkv, np.full(B, M)), atol=1e-5)


def test_keys_past_the_length_have_no_effect_and_no_gradient(qkv):
    q, k, v = qkv
    past = (jnp.arange(M) >= LENGTHS[:, None])[:, :, None, None]
    out = attention(q, k, v, kv_lengths=LENGTHS)
    np.testing.assert_array_equal(attention(q, jnp.where(past, 1e4, k), jnp.where(past, -1e4, v), kv_lengths=LENGTHS), out)
    grads = jax.grad(lambda k, v: jnp.sum(jnp.sin(attention(q, k, v, kv_lengths=LENGTHS))), argnums=(0, 1))(k, v)
    for grad in grads:
        assert np.all(np.where(past, grad, 0) == 0)
        assert np.any(np.where(past, 0, grad) != 0)


def test_blocks_of_queries_change_neither_values_nor_gradients(qkv, monkeypatch):
    def value_and_gradients():
        out, pull_back = jax.vjp(lambda q, k, v: attention(q, k, v, kv_lengths=LENGTHS), *qkv)
        return out, pull_back(jax.random.normal(jax.random.key(1), out.shape))

    whole, whole_grads = value_and_gradients()
    monkeypatch.setattr("hunyuan_jax.models.attention.LEAST_BLOCK", 2)
    monkeypatch.setattr("hunyuan_jax.models.attention.BLOCK_SCORES", 1)
    assert "scan" in str(jax.make_jaxpr(attention)(*qkv))  # four blocks, the last with a query that is none
    blocked, blocked_grads = value_and_gradients()
    np.testing.assert_allclose(blocked, whole, atol=1e-5)
    for ours, reference in zip(blocked_grads, whole_grads, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_no_valid_key_gives_finite_values_and_gradients(qkv):
    def total(q, k, v):
        return jnp.sum(attention(q, k, v, kv_lengths=jnp.zeros(B, jnp.int32)))

    value, grads = jax.value_and_grad(total, argnums=(0, 1, 2))(*qkv)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_large_scores_do_not_overflow(qkv):
    q, k, v = qkv
    assert np.all(np.isfinite(attention(1e4 * q, 1e4 * k, v, kv_lengths=LENGTHS)))


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(qkv):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    out = attention(q, k, v, kv_lengths=LENGTHS)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_hand(q, k, v, LENGTHS), atol=0.03)
