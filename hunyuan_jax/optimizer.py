"""Optimizers and learning-rate schedules from configuration: one optax chain, which groups of parameters pass in ways of their own.

gradients -> clipped by their global norm -> the rule (AdamW, Adafactor, Lion or Muon) at each group's rate and decay -> updates
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.sharding import path_of
from hunyuan_jax.settings import build

Kind = Literal["adamw", "adafactor", "lion", "muon"]
Decay = Literal["cosine", "linear"]

MUON_RMS = 0.2  # size of Muon's updates relative to the learning rate, about that of AdamW's, so that rates carry over
ADAFACTOR_CLIP, ADAFACTOR_LEAST = 1.0, 1e-3  # root mean squares: the most of an update, the least of a parameter (the paper's d, epsilon_2)

# Ranges of OptimizerConfig's numbers: what is expected, whether a number is that, which numbers.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("above 0", lambda x: x > 0, ("learning_rate", "eps", "adam_rate", "clip_norm")),
    ("at least 0", lambda x: x >= 0, ("warmup_steps", "decay_steps", "final_fraction", "weight_decay", "skip_above")),
    ("a whole number of at least 1", lambda x: x >= 1 and x % 1 == 0, ("newton_schulz_steps", "accumulate", "skip_window")),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("b1", "b2", "momentum")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters in whose path the regular expression `pattern` is found. Raises `UserError` for what cannot be.

    `learning_rate` multiplies the rate, and 0 keeps the parameters as they are; `weight_decay` takes the place of the optimizer's.
    """

    pattern: str
    learning_rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"optimizer.groups: the pattern {self.pattern!r} is no regular expression: {error}.") from error
        if not (self.learning_rate >= 0 and (self.weight_decay is None or self.weight_decay >= 0)):
            raise UserError(
                f"optimizer.groups: learning_rate and weight_decay of {self.pattern!r} must be at least 0, "
                f"not {self.learning_rate} and {self.weight_decay}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """A rule, its rate with linear warm-up and, over `decay_steps` (0: none), a decay to `final_fraction` of the peak, and groups.

    adamw      Loshchilov & Hutter 2019; `b1`, `b2` are the decays of its moments.
    adafactor  Shazeer & Stern 2018, without momentum: of a matrix's second moments it keeps the means of rows and of columns. With
               `relative`, as in the paper, rates are fractions of a matrix's root mean square, such as 1e-2; without, as AdamW's.
    lion       Chen et al. 2023: the sign of a momentum. Theirs is `b1` 0.9, `b2` 0.99, rates 3 to 10 times lower than AdamW's.
    muon       optax.contrib's: it orthogonalises the momentum, with decay `momentum`, of every kernel by `newton_schulz_steps`
               iterations, as a matrix of its own in every layer of a scanned stack. Biases, norms and kernels whose path contains
               one of `not_muon`, for a DiT ("mod", "adaLN", "_in/", "embedder", "final_layer") for modulation, all that comes before
               the blocks, and the last layer, are trained beside it by AdamW with Nesterov's momentum, at `adam_rate` times the
               learning rate. Only what Muon trains is decayed then; with the others, every kernel.

    Each of `groups` (see `Group`) has the parameters that its pattern finds and that of no group before it does. In a DiT

    `(mod|modulation)/`                            finds modulation, also that of the refiner and of the last layer
    `^(img|time|vector|guidance)_in/|embedder/`    embeddings of patches, times, pooled text, guidance and text tokens
    `individual_token_refiner/`                    the blocks that refine text tokens
    `^final_layer/`                                the last layer

    A step's gradient is the mean of those of `accumulate` parts of its batch, taken one after another. Where its norm lies more than
    `skip_above` (0: never) times their median distance above the median of the last `skip_window` norms, the step changes nothing.
    With `offload` what the rule keeps of the parameters lies in the memory of the hosts, and comes to the devices for the update.
    """

    kind: Kind = "adamw"
    learning_rate: float
    warmup_steps: int = 0
    decay: Decay = "cosine"
    decay_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    relative: bool = True
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    not_muon: tuple[str, ...] = ()
    adam_rate: float = 1.0
    weight_decay: float = 0.0
    groups: tuple[Group, ...] = ()
    clip_norm: float = 1.0
    accumulate: int = 1
    skip_above: float = 0.0
    skip_window: int = 100
    offload: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "not_muon", tuple(self.not_muon))
        groups = (build(Group, g, where=f"optimizer.groups[{i}]") if isinstance(g, Mapping) else g for i, g in enumerate(self.groups))
        object.__setattr__(self, "groups", tuple(groups))
        for name, known in (("kind", get_args(Kind)), ("decay", get_args(Decay))):
            if getattr(self, name) not in known:
                raise UserError(f"optimizer: {name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        for expected, is_that, names in _RANGES:
            for name in names:
                if not is_that(getattr(self, name)):
                    raise UserError(f"optimizer: {name} must be {expected}, not {getattr(self, name)}.")
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise UserError(f"optimizer: decay_steps={self.decay_steps} must be above warmup_steps={self.warmup_steps}, or 0 for no decay.")

    @property
    def spike_window(self) -> int:
        """How many norms the training state keeps: none where no step is skipped for its own."""
        return self.skip_window if self.skip_above else 0


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of a step, of what is in no group."""
    peak, steps = config.learning_rate, config.decay_steps - config.warmup_steps
    warmup = optax.linear_schedule(0.0 if config.warmup_steps else peak, peak, config.warmup_steps)
    if not config.decay_steps:
        after = optax.constant_schedule(peak)
    elif config.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, steps, config.final_fraction)
    else:
        after = optax.linear_schedule(peak, peak * config.final_fraction, steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then the rule. Its `init` refuses names and patterns that no parameter has, with a `UserError`."""
    rest = Group(pattern="")
    chosen = _rule(config, rest)
    if config.groups:
        rules = {str(n): _rule(config, group) for n, group in enumerate((*config.groups, rest))}
        chosen = optax.partition(rules, lambda tree: _map(lambda path, _: str(_group_of(path, config)), tree))
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)

    def init(params: optax.Params) -> optax.OptState:
        _check_names(params, config)
        _check_groups(params, config)
        return optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def _rule(config: OptimizerConfig, group: Group) -> optax.GradientTransformation:
    """From clipped gradients to the updates of a group's parameters."""
    schedule = make_schedule(config)
    rate = lambda count: group.learning_rate * schedule(count)  # noqa: E731
    decay = config.weight_decay if group.weight_decay is None else group.weight_decay
    kernels = lambda tree: _map(_is_kernel, tree)  # noqa: E731
    if config.kind == "adamw":
        return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay, mask=kernels)
    if config.kind == "lion":
        return optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=decay, mask=kernels)
    if config.kind == "adafactor":
        # As optax.adafactor, but for each layer of a scanned stack, and with a decay that goes with the rate, as the others' does.
        return optax.chain(
            optax.scale_by_factored_rms(),
            _each_layer(optax.clip_by_block_rms(ADAFACTOR_CLIP)),
            _each_layer(optax.scale_by_param_block_rms(ADAFACTOR_LEAST)) if config.relative else optax.identity(),
            optax.add_decayed_weights(decay, kernels),
            optax.scale_by_learning_rate(rate),
        )
    return muon(
        rate,
        beta=config.momentum,
        ns_steps=config.newton_schulz_steps,
        eps=config.eps,
        weight_decay=decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=lambda count: config.adam_rate * rate(count),
        muon_weight_dimension_numbers=lambda tree: _map(lambda path, p: _matrix_axes(path, p, config), tree),
        consistent_rms=MUON_RMS,
    )


def _each_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule for arrays that keeps no state, applied to every layer of a scanned stack alone."""

    def update(path: str, change: Any, param: Any) -> Any:
        alone = lambda change, param: rule.update(change, optax.EmptyState(), param)[0]  # noqa: E731
        is_stack = param.ndim == (3 if _is_kernel(path, param) else 2)
        return (jax.vmap(alone) if is_stack else alone)(change, param)

    return optax.stateless(lambda changes, params: _map(update, changes, params))


def _group_of(path: str, config: OptimizerConfig) -> int:
    """The number of the first group whose pattern is found in a path, their count where none is."""
    return next((n for n, group in enumerate(config.groups) if re.search(group.pattern, path)), len(config.groups))


def _check_names(params: optax.Params, config: OptimizerConfig) -> None:
    """Raises `UserError` where a name of `not_muon` is part of no parameter's path."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unknown = [name for name in config.not_muon if not any(name in path for path in paths)]
    if unknown:
        said = f"optimizer: not_muon names {', '.join(map(repr, unknown))}, which is part of no parameter's path"
        raise UserError(f"{said}; {_some(paths)}")


def _check_groups(params: optax.Params, config: OptimizerConfig) -> None:
    """Raises `UserError` where a group has no parameters, or decays none of them."""
    leaves = [(path_of(path), param) for path, param in jax.tree_util.tree_leaves_with_path(params)]
    paths = [path for path, _ in leaves]
    for n, group in enumerate(config.groups):
        said = f"optimizer: the pattern {group.pattern!r} of groups[{n}]"
        if not any(re.search(group.pattern, path) for path in paths):
            raise UserError(f"{said} is found in no parameter's path; {_some(paths)}")
        mine = [(path, param) for path, param in leaves if _group_of(path, config) == n]
        if not mine:
            raise UserError(f"{said} finds only parameters of groups before it; the first that finds one has it.")
        if group.weight_decay and not any(_is_decayed(path, param, config) for path, param in mine):
            who = "kernels that Muon trains are" if config.kind == "muon" else "kernels are"
            raise UserError(f"{said} finds nothing that weight_decay={group.weight_decay} could change: only {who} decayed.")


def _some(paths: list[str]) -> str:
    """The end of an error about names: a few paths, from all over the model."""
    return f"paths are such as {', '.join(paths[:: -(-len(paths) // 4)])} (parameters.txt of a run lists them)."


def _map(function: Callable[..., Any], tree: optax.Params, *trees: optax.Params) -> Any:
    """`function` of the path, such as `img_in/proj/kernel`, and the array of each parameter, and of other trees like the first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_of(path), *leaves), tree, *trees)


def _is_kernel(path: str, param: Any) -> bool:
    """By name, since the bias of scanned layers has two axes too."""
    return path.split("/")[-1] == "kernel"


def _is_decayed(path: str, param: Any, config: OptimizerConfig) -> bool:
    return _is_kernel(path, param) if config.kind != "muon" else _matrix_axes(path, param, config) is not None


def _matrix_axes(path: str, param: Any, config: OptimizerConfig) -> MuonDimensionNumbers | None:
    """How a kernel is a matrix: [in, out], with an axis of scanned layers [layer, in, out], or a convolution's [t, y, x, in, out]."""
    if not _is_kernel(path, param) or any(name in path for name in config.not_muon):
        return None
    inputs = {2: 0, 3: 1, 5: (0, 1, 2, 3)}[param.ndim]
    return MuonDimensionNumbers(reduction_axis=inputs, output_axis=param.ndim - 1)
