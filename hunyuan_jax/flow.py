"""Flow matching, the theory on one page. Paper section 4.6.1; signs and times as in the released code.

x_t = (1 - t) data + t noise            t = 1 is noise, t = 0 is data
velocity = dx/dt = noise - data         what the model predicts
         = (x_t - data) / t             so a model may also predict the data
loss = mean (model(x_t, t) - velocity)^2,  t = shift(sigmoid(n), s),  n ~ N(mean, std)
shift(t, s) = s t / (1 + (s - 1) t)     s > 1 spends more of the time near noise, as large videos need
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hunyuan_jax.errors import UserError

LEAST_TIME = 1e-3  # nearer to the data its velocity is not told from what is predicted of the data

Times = TypeVar("Times", Float[Array, "*S"], Float[np.ndarray, "*S"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """How training times are drawn: logit-normal, shifted, none below `least`. The released trainer uses mean 0, std 1, shift 7."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.std < 0 or self.shift <= 0 or not 0 <= self.least < 1:
            raise UserError(
                f"time: std must be at least 0, shift above 0 and least in [0, 1), not {self.std}, {self.shift} and {self.least}."
            )


def shift_time(t: Times, shift: float) -> Times:
    """Moves times in [0, 1] towards 1 for shift > 1; 0 and 1 stay."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def draw_times(keys: PRNGKeyArray, config: TimeConfig) -> Float[Array, "B"]:
    """A training time for each key."""
    normal = jax.vmap(lambda key: jax.random.normal(key))(keys)
    return jnp.maximum(shift_time(jax.nn.sigmoid(config.mean + config.std * normal), config.shift), config.least)


def at_time(data: Float[Array, "B *S"], noise: Float[Array, "B *S"], t: Float[Array, "B"]) -> Float[Array, "B *S"]:
    """The point of the straight path from data to noise at time t."""
    t = t.reshape(-1, *(1,) * (data.ndim - 1))
    return (1.0 - t) * data + t * noise


def velocity(data: Float[Array, "B *S"], noise: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
    """The path's derivative in time, the same at every time."""
    return noise - data


def velocity_from_data(x: Float[Array, "B *S"], data: Float[Array, "B *S"], t: Float[Array, "B"]) -> Float[Array, "B *S"]:
    """The velocity at `x` of a path that began at `data`: (x - data) / t, with t taken as no less than `LEAST_TIME`."""
    return (x - data) / jnp.maximum(t, LEAST_TIME).reshape(-1, *(1,) * (x.ndim - 1))


def flow_loss(predicted: Float[Array, "B *S"], target: Float[Array, "B *S"]) -> Float[Array, "B"]:
    """Mean squared error of each sample's velocity, in float32."""
    error = jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.mean(error, axis=tuple(range(1, error.ndim)))
