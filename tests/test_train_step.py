"""Laws of the training step: the guard, the moving average, and gradient descent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.train_step import EmaConfig, average, init_state, make_step


@dataclasses.dataclass(frozen=True)
class Parabola:
    """A task with loss (w - frames)^2, made non-finite by a non-finite frame; the gradient alone by `bad_gradient`."""

    bad_gradient: bool = False

    def loss(self, params, batch, *, key):
        loss = jnp.mean(jnp.square(params["w"] - batch.frames))
        if self.bad_gradient:
            loss = loss + jnp.sqrt(jnp.sum(jnp.square(params["w"] - params["w"])))  # finite, with a gradient of nan
        return loss, {"w": params["w"]}


def batch_of(value: float) -> VideoBatch:
    return VideoBatch(sample_id=jnp.zeros(1, jnp.uint32), frames=jnp.full((1, 1, 1, 1, 3), value))


def prepared(task, *, decay: float = 0.5):
    optimizer = optax.adam(0.1)
    step = jax.jit(make_step(task, optimizer, ema=EmaConfig(decay=decay), key=jax.random.key(0)))
    return step, init_state({"w": jnp.array(3.0)}, optimizer)


def without_counts(state):
    return state.params, state.ema, state.opt_state


@pytest.mark.parametrize(("task", "value"), [(Parabola(), np.nan), (Parabola(), np.inf), (Parabola(bad_gradient=True), 1.0)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(task, value):
    step, state = prepared(task)
    state, _ = prepared(Parabola())[0](state, batch_of(1.0))
    after, metrics = step(state, batch_of(value))
    jax.tree.map(np.testing.assert_array_equal, without_counts(after), without_counts(state))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert float(metrics["skipped"]) == 1.0


def test_training_goes_on_after_a_bad_step():
    step, state = prepared(Parabola())
    for value in [1.0, np.nan, *[1.0] * 200]:
        state, metrics = step(state, batch_of(value))
    assert (int(state.step), int(state.skipped)) == (202, 1)
    np.testing.assert_allclose(state.params["w"], 1.0, atol=0.05)
    assert float(metrics["loss"]) < 0.01


def test_a_finite_step_is_the_optimizers():
    step, state = prepared(Parabola())
    after, metrics = step(state, batch_of(1.0))
    np.testing.assert_allclose(after.params["w"], 3.0 - 0.1, rtol=1e-5)  # Adam's first step has the size of its rate
    np.testing.assert_allclose(metrics["grad_norm"], 4.0, rtol=1e-6)
    assert (int(after.step), int(after.skipped)) == (1, 0)


def test_the_average_of_constant_parameters_has_its_closed_form():
    ema, params = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
    left = 1.0
    for step in range(30):
        ema = average(ema, params, step=jnp.array(step), decay=0.6)
        left *= min(0.6, (1 + step) / (10 + step))
        np.testing.assert_allclose(ema["w"], 1 - left, rtol=1e-5)


def test_the_average_of_moving_parameters_is_the_weighted_sum():
    """After the warm-up the weight of the parameters k steps ago is (1 - decay) decay^k."""
    decay, values = 0.9, np.random.default_rng(0).normal(size=200).astype(np.float32)
    ema = {"w": jnp.array(0.0)}
    for step, value in enumerate(values):
        ema = average(ema, {"w": jnp.array(value)}, step=jnp.array(1000 + step), decay=decay)
    expected = sum((1 - decay) * decay**k * value for k, value in enumerate(values[::-1]))
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-4)


def test_the_average_stays_in_float32_when_parameters_do_not():
    ema = average({"w": jnp.zeros(2)}, {"w": jnp.ones(2, jnp.bfloat16)}, step=jnp.array(0), decay=0.9)
    assert ema["w"].dtype == jnp.float32


def test_a_state_begins_with_its_average_at_the_parameters():
    _, state = prepared(Parabola())
    np.testing.assert_array_equal(state.ema["w"], state.params["w"])
    assert state.ema["w"] is not state.params["w"]
