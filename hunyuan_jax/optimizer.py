"""Optimizers and learning-rate schedules from configuration: one optax chain."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.sharding import path_of

Kind = Literal["adamw", "muon"]

MUON_RMS = 0.2  # size of Muon's updates relative to the learning rate, about that of AdamW's, so that rates carry over


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up and, over `decay_steps` (0: none), a cosine to `final_fraction` of the peak.

    Muon (optax.contrib) orthogonalises the momentum, with decay `momentum`, of every kernel by `newton_schulz_steps` iterations;
    biases, norms and the kernels whose path contains one of `not_muon` are trained beside it by AdamW with Nesterov's momentum,
    at `adam_rate` times the learning rate. Only what Muon trains is decayed then, with AdamW alone every kernel.
    """

    kind: Kind = "adamw"
    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    not_muon: tuple[str, ...] = ()
    adam_rate: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "not_muon", tuple(self.not_muon))
        if self.kind not in get_args(Kind):
            raise UserError(f"optimizer: kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}.")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UserError(f"optimizer: learning_rate and clip_norm must be above 0, not {self.learning_rate} and {self.clip_norm}.")
        if self.newton_schulz_steps < 1 or self.adam_rate <= 0:
            raise UserError(
                "optimizer: newton_schulz_steps must be at least 1 and adam_rate above 0, "
                f"not {self.newton_schulz_steps} and {self.adam_rate}."
            )
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
    """Clipping by the global norm, then the optimizer. Its `init` refuses names in `not_muon` that no parameter has."""
    schedule = make_schedule(config)
    if config.kind == "adamw":
        chosen = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=lambda tree: _map(_is_kernel, tree)
        )
    else:
        chosen = muon(
            schedule,
            beta=config.momentum,
            ns_steps=config.newton_schulz_steps,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=lambda count: config.adam_rate * schedule(count),
            muon_weight_dimension_numbers=lambda tree: _map(lambda path, p: _matrix_axes(path, p, config.not_muon), tree),
            consistent_rms=MUON_RMS,
        )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)

    def init(params: optax.Params) -> optax.OptState:
        _check_names(params, config.not_muon)
        return optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def _check_names(params: optax.Params, not_muon: Sequence[str]) -> None:
    """Raises `UserError` where a name is part of no parameter's path."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unknown = [name for name in not_muon if not any(name in path for path in paths)]
    if unknown:
        raise UserError(
            f"optimizer: not_muon names {', '.join(map(repr, unknown))}, which is part of no parameter's path; "
            f"paths are such as {paths[0]} (parameters.txt of a run lists them)."
        )


def _map(function: Callable[[str, Any], Any], tree: optax.Params) -> Any:
    """`function` of the path, such as `img_in/proj/kernel`, and the array of each parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, p: function(path_of(path), p), tree)


def _is_kernel(path: str, param: Any) -> bool:
    """By name, since the bias of scanned layers has two axes too."""
    return path.split("/")[-1] == "kernel"


def _matrix_axes(path: str, param: Any, not_muon: Sequence[str]) -> MuonDimensionNumbers | None:
    """How a kernel is a matrix: [in, out], with an axis of scanned layers [layer, in, out], or a convolution's [t, y, x, in, out]."""
    if not _is_kernel(path, param) or any(name in path for name in not_muon):
        return None
    inputs = {2: 0, 3: 1, 5: (0, 1, 2, 3)}[param.ndim]
    return MuonDimensionNumbers(reduction_axis=inputs, output_axis=param.ndim - 1)
