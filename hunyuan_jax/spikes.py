"""Spikes: steps whose gradient is far larger than those before it. Where the config asks for it, they are skipped.

    norm > median + above x spread        median of the last accepted norms; spread: the median distance from it, at least 1 % of it

All is decided within the compiled step; no host is asked. A step that was skipped is not accepted, so that one spike does not make room
for the next. Gradients that have grown for good are not skipped for ever: after `MOST_IN_A_ROW` the next step is accepted, and norms are
collected anew.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LEAST_SPREAD = 0.01  # of the median
MOST_IN_A_ROW = 10


@flax.struct.dataclass
class Spikes:
    """The last accepted norms, as a ring; how many were accepted since it was empty; how many steps were skipped, in a row and in all."""

    norms: Float[Array, "N"]
    accepted: Int[Array, ""]
    in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]


def no_spikes(window: int) -> Spikes:
    """The beginning: nothing is a spike until `window` norms have been accepted."""
    count = jnp.zeros((), jnp.int32)
    return Spikes(norms=jnp.zeros(window, jnp.float32), accepted=count, in_a_row=count, skipped=count)


def is_spike(spikes: Spikes, norm: Float[Array, ""], *, above: float) -> Bool[Array, ""]:
    """Whether a step with this norm is to be skipped; `norm` is finite."""
    median = jnp.median(spikes.norms)
    spread = jnp.maximum(jnp.median(jnp.abs(spikes.norms - median)), LEAST_SPREAD * median)
    known = spikes.accepted >= len(spikes.norms)
    return known & (spikes.in_a_row < MOST_IN_A_ROW) & (norm > median + above * spread)


def after_step(spikes: Spikes, norm: Float[Array, ""], *, accepted: Bool[Array, ""], spike: Bool[Array, ""]) -> Spikes:
    """What is known after a step; one that is neither accepted nor a spike, since it was not finite, changes nothing."""
    before = jnp.where(spikes.in_a_row >= MOST_IN_A_ROW, 0, spikes.accepted)
    put = spikes.norms.at[before % len(spikes.norms)].set(norm)
    return Spikes(
        norms=jnp.where(accepted, put, spikes.norms),
        accepted=jnp.where(accepted, before + 1, spikes.accepted),
        in_a_row=jnp.where(accepted, 0, spikes.in_a_row + spike),
        skipped=spikes.skipped + spike,
    )
