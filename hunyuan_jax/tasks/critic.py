"""How a critic is trained beside a model: its section of the config, what it learns, and how its opinion becomes a gradient.

    model's gradient of the frames   slope of the fidelity + weight * adaptive * slope of -mean D(made)      from `joins_at` on
    critic's loss                    hinge of D(data) above 1 and D(made) below -1                           from `start_step` on

Both are taken at the same parameters and the same frames; neither changes what the other reads in that step.
"""

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.errors import UserError
from hunyuan_jax.models import critics
from hunyuan_jax.models.critics import Discriminator, DiscriminatorConfig
from hunyuan_jax.optimizer import OptimizerConfig
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.task import Params, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The discriminator, its own optimizer, and from which step on it takes part.

    It begins to learn at `start_step`, when reconstructions are worth a look; its optimizer's schedule counts from there. After
    `lead_steps` more its opinion enters the model's loss with `weight` (the paper's is 0.05), times, if `adaptive`, the ratio of
    gradient norms at the model's last layer, which is at most `adaptive_limit`.
    """

    model: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig
    weight: float = 0.05
    start_step: int = 0
    lead_steps: int = 0
    adaptive: bool = True
    adaptive_limit: float = 1e4

    def __post_init__(self) -> None:
        if min(self.start_step, self.lead_steps, self.weight, self.adaptive_limit) < 0:
            raise UserError("critic: start_step, lead_steps, weight and adaptive_limit must be at least 0.")

    @classmethod
    def from_section(cls, section: ConfigDict | None) -> "CriticConfig | None":
        """The critic from its section of a config; no section or None is none."""
        if section is None:
            return None
        kinds: dict[str, Any] = {"model": DiscriminatorConfig, "optimizer": OptimizerConfig}
        nested = {name: build(kind, section[name], where=f"critic.{name}") for name, kind in kinds.items() if name in section}
        return build(cls, {**section, **nested}, where="critic")

    @property
    def joins_at(self) -> int:
        """The first step in which the critic's opinion moves the model."""
        return self.start_step + self.lead_steps

    def logits(self, params: Params, frames: Float[Array, "B T H W 3"]) -> Float[Array, "B T2 Y X"]:
        out: Any = Discriminator(self.model).apply({"params": params}, frames)
        return out


@flax.struct.dataclass
class Gradients:
    """What a step of an adversarial task needs to know; `learns` says whether the critic takes part yet."""

    loss: Float[Array, ""]
    model: Params
    critic: Params
    critic_loss: Float[Array, ""]
    learns: Bool[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class AdversarialTask(Task, Protocol):
    """A task whose model is judged by a critic that learns beside it; `critic` says how."""

    @property
    def critic(self) -> CriticConfig | None: ...

    def init_critic(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters of the critic, float32."""

    def gradients(self, params: Params, critic: Params, batch: VideoBatch, *, key: PRNGKeyArray, step: Int[Array, ""]) -> Gradients:
        """The losses of a batch and their gradients, with the critic as it is at `step`."""


def opinion(
    config: CriticConfig, params: Params, frames: Float[Array, "B T H W 3"], *, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, "B T H W 3"]]:
    """The generator's hinge loss of frames and its slope in them; both 0, and not computed, before the critic joins."""
    value_and_slope = jax.value_and_grad(lambda made: critics.hinge_loss_of_generator(config.logits(params, made)))
    return jax.lax.cond(step >= config.joins_at, value_and_slope, lambda made: (jnp.zeros(()), jnp.zeros_like(made)), frames)


def lesson(
    config: CriticConfig, params: Params, made: Float[Array, "B T H W 3"], data: Float[Array, "B T H W 3"], *, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Params]:
    """The critic's loss, its balance (mean logit of data minus that of what was made) and its gradient; 0 before it starts."""

    def loss(params: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
        real, fake = config.logits(params, data), config.logits(params, made)
        return critics.hinge_loss_of_discriminator(real, fake), jnp.mean(real) - jnp.mean(fake)

    def learn(params: Params) -> tuple[Float[Array, ""], Float[Array, ""], Params]:
        (value, balance), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, balance, grads

    nothing = lambda params: (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))  # noqa: E731
    return jax.lax.cond(step >= config.start_step, learn, nothing, params)
