"""Laws of sampling: the released grid, Euler exact on straight paths, guidance in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.sampling import SamplingConfig, euler, guided, time_grid

NOISE, DATA = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 1, 3, 4, 5)), jnp.float32)


def test_the_grid_is_the_released_one():
    grid = 1000 * time_grid(50, shift=7.0)
    assert grid.shape == (51,)
    np.testing.assert_allclose(grid[[0, 1, 2, 3]], [1000, 997.093, 994.083, 990.964], atol=1e-3)
    np.testing.assert_allclose(grid[[-4, -3, -2, -1]], [308.824, 225.806, 125.0, 0.0], atol=1e-3)


@pytest.mark.parametrize(("steps", "shift", "last"), [(10, 17.0, 653.846), (50, 5.0, 92.593), (30, 7.0, 194.444)])
def test_the_last_time_is_the_released_one(steps, shift, last):
    np.testing.assert_allclose(1000 * time_grid(steps, shift=shift)[-2], last, atol=1e-3)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (3, 7.0), (20, 17.0)])
def test_euler_is_exact_on_straight_paths(steps, shift):
    out = euler(lambda x, t: NOISE - DATA, NOISE, time_grid(steps, shift=shift))
    np.testing.assert_allclose(out, DATA, atol=2e-6)


def test_the_path_of_any_number_of_steps_stays_on_its_line():
    """Of a model that knows the data, velocity (x - data) / t, every step lands on the line, and the last one on the data."""
    out = euler(lambda x, t: (x - DATA) / t.reshape(-1, 1, 1, 1, 1), NOISE, time_grid(7, shift=5.0))
    np.testing.assert_allclose(out, DATA, atol=1e-5)


def test_euler_approaches_the_solution_in_first_order():
    """dx/dt = x from t = 1 to 0 shrinks x by e."""
    errors = [float(jnp.abs(euler(lambda x, t: x, NOISE, time_grid(n, shift=1.0)) - NOISE / np.e).max()) for n in (50, 100)]
    assert errors[1] < 0.55 * errors[0] < 0.05


def test_without_guidance_the_model_is_called_once():
    def never(x, t):
        raise AssertionError("the unconditional model was called")

    velocity = guided(lambda x, t: x, never, scale=1.0)
    np.testing.assert_array_equal(velocity(NOISE, jnp.ones(2)), NOISE)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, -1.0), (0.5, 0.5), (6.0, 17.0)])
def test_guidance_moves_from_the_unconditional_through_the_conditional(scale, expected):
    velocity = guided(lambda x, t: jnp.full_like(x, 2.0), lambda x, t: jnp.full_like(x, -1.0), scale=scale)
    np.testing.assert_allclose(velocity(NOISE, jnp.ones(2)), jnp.full_like(NOISE, expected), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"shift": 0.0}])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(UserError, match="sampling"):
        SamplingConfig(**wrong)
