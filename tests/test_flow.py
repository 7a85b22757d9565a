"""Laws of flow matching, each against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.flow import TimeConfig, at_time, draw_times, flow_loss, shift_time, velocity, velocity_from_data

DATA, NOISE = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 2, 4)).astype(np.float32)


def test_time_0_is_data_and_time_1_is_noise():
    np.testing.assert_array_equal(at_time(DATA, NOISE, jnp.zeros(3)), DATA)
    np.testing.assert_array_equal(at_time(DATA, NOISE, jnp.ones(3)), NOISE)


def test_every_sample_has_its_own_time():
    t = jnp.array([0.0, 0.25, 1.0])
    expected = np.stack([DATA[0], 0.75 * DATA[1] + 0.25 * NOISE[1], NOISE[2]])
    np.testing.assert_allclose(at_time(DATA, NOISE, t), expected, rtol=1e-6)


def test_velocity_is_the_derivative_of_the_path():
    t = jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: at_time(DATA, NOISE, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(velocity(DATA, NOISE), derivative, atol=1e-6)


def test_the_velocity_that_a_perfect_prediction_of_the_data_gives_is_the_velocity():
    t = jnp.array([0.1, 0.5, 1.0])
    np.testing.assert_allclose(
        velocity_from_data(at_time(DATA, NOISE, t), jnp.asarray(DATA), t), velocity(DATA, NOISE), rtol=1e-4, atol=1e-5
    )


def test_at_the_data_itself_its_velocity_is_finite():
    assert np.all(np.isfinite(velocity_from_data(jnp.asarray(DATA), jnp.asarray(DATA + 1), jnp.zeros(3))))


def test_no_time_is_drawn_below_the_least():
    keys = jax.random.split(jax.random.key(0), 2000)
    free, bound = draw_times(keys, TimeConfig()), draw_times(keys, TimeConfig(least=0.4))
    np.testing.assert_array_equal(bound, np.maximum(free, 0.4))
    assert np.mean(bound == 0.4) > 0.1


def test_the_loss_of_a_sample_is_its_mean_square():
    target = jnp.asarray(DATA)
    np.testing.assert_allclose(flow_loss(target + jnp.array([0.0, 1.0, -2.0]).reshape(3, 1, 1, 1, 1), target), [0, 1, 4], rtol=1e-5)


def test_the_loss_is_computed_in_float32():
    assert flow_loss(jnp.asarray(DATA, jnp.bfloat16), jnp.asarray(DATA, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 17.0])
def test_shifting_keeps_the_ends_and_the_order_and_moves_towards_noise(shift):
    t = jnp.linspace(0.0, 1.0, 101)
    shifted = np.asarray(shift_time(t, shift))
    assert (shifted[0], shifted[-1]) == (0.0, 1.0)
    assert (np.diff(shifted) > 0).all()
    assert (shifted >= np.asarray(t) - 1e-6).all()
    np.testing.assert_allclose(shift_time(jnp.array(0.5), shift), shift / (1 + shift), rtol=1e-6)


def test_shifts_multiply():
    t = jnp.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(shift_time(shift_time(t, 2.0), 3.5), shift_time(t, 7.0), atol=1e-6)


def logit(t: np.ndarray) -> np.ndarray:
    return np.log(t / (1 - t))


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 1.5, 1.0), (0.0, 1.0, 7.0)])
def test_times_are_logit_normal_and_a_shift_adds_its_logarithm(mean, std, shift):
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = logit(np.asarray(draw_times(keys, TimeConfig(mean=mean, std=std, shift=shift)), np.float64))
    assert abs(logits.mean() - (mean + math.log(shift))) < 0.05
    assert abs(logits.std() - std) < 0.05


def test_a_time_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 8)
    np.testing.assert_array_equal(draw_times(keys, TimeConfig())[5:], draw_times(keys[5:], TimeConfig()))


@pytest.mark.parametrize("wrong", [{"std": -1.0}, {"shift": 0.0}])
def test_impossible_times_are_refused(wrong):
    with pytest.raises(UserError, match="time"):
        TimeConfig(**wrong)
