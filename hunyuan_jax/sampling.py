"""From noise to latents: a grid of times, Euler steps along the velocity, and two-pass guidance. Paper section 5.4."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hunyuan_jax.errors import UserError
from hunyuan_jax.flow import shift_time

VelocityFn = Callable[[Float[Array, "B T Y X C"], Float[Array, "B"]], Float[Array, "B T Y X C"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Euler `steps`, the `shift` of their times, `cfg_scale`, the strength of two-pass guidance (1: a single pass), and
    `guidance`, the scale that a model with a guidance embedding is given."""

    steps: int = 50
    shift: float = 7.0
    cfg_scale: float = 1.0
    guidance: float = 6.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.shift <= 0:
            raise UserError(f"sampling: steps must be at least 1 and shift above 0, not {self.steps} and {self.shift}.")


def time_grid(steps: int, *, shift: float) -> np.ndarray:
    """steps + 1 times from 1 (noise) to 0 (data), float32: an even grid, shifted."""
    return shift_time(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)


def guided(conditional: VelocityFn, unconditional: VelocityFn, *, scale: float) -> VelocityFn:
    """The unconditional velocity moved `scale` times the way to the conditional one (classifier-free guidance)."""
    if scale == 1.0:
        return conditional

    def velocity(x: Float[Array, "B T Y X C"], t: Float[Array, "B"]) -> Float[Array, "B T Y X C"]:
        without = unconditional(x, t)
        return without + scale * (conditional(x, t) - without)

    return velocity


def euler(velocity_fn: VelocityFn, noise: Float[Array, "B T Y X C"], times: np.ndarray) -> Float[Array, "B T Y X C"]:
    """Integrates dx/dt = velocity from times[0] to times[-1] with one Euler step between neighbours; exact on straight paths."""

    def step(x: Float[Array, "B T Y X C"], span: Float[Array, "2"]) -> tuple[Float[Array, "B T Y X C"], None]:
        now, after = span[0], span[1]
        return x + (after - now) * velocity_fn(x, jnp.full((x.shape[0],), now)), None

    spans = jnp.stack([jnp.asarray(times[:-1]), jnp.asarray(times[1:])], axis=1)
    return jax.lax.scan(step, noise, spans)[0]
