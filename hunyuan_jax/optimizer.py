"""Optimizers and learning-rate schedules from configuration: one optax chain."""

import dataclasses

import jax
import optax

from hunyuan_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and, over `decay_steps` (0: none), a cosine to `final_fraction` of the peak."""

    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UserError(f"optimizer: learning_rate and clip_norm must be above 0, not {self.learning_rate} and {self.clip_norm}.")
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise UserError(f"optimizer: decay_steps={self.decay_steps} must be above warmup_steps={self.warmup_steps}, or 0 for no decay.")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of a step."""
    peak = config.learning_rate
    warmup = optax.linear_schedule(0.0 if config.warmup_steps else peak, peak, config.warmup_steps)
    if config.decay_steps:
        after = optax.cosine_decay_schedule(peak, config.decay_steps - config.warmup_steps, config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; biases, norms and other vectors are not decayed."""

    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(make_schedule(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
