"""How many floating-point operations a model takes; chips.py says how many a device can do in a second: the two halves of MFU.

Counted are matrix products and convolutions, a multiplication and an addition being two operations; what else there is (norms, softmax,
rope) is a few per cent. `product_flops` counts them in the trace of any function; of a DiT there is a closed form. Of a model with tokens
L = image and S = text, M = L + S, and width D:

    linear layers     2 x inputs x outputs for each token, or for each sample where a layer sees the condition vector alone
    attention         4 M^2 D in each block: scores, and their sums of values

A training step takes three times the forward pass, since each product has two gradients. What is computed is more: products of blocks
that are computed again, scores again for their gradients (five products for four), and tokens that fill up blocks.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from hunyuan_jax.models.dit import REFINER_MLP_RATIO, DiTConfig
from hunyuan_jax.models.layers import SINUSOID_FEATURES
from hunyuan_jax.models.vae import CAUSAL


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of a training step of one sample: what the model takes, what is computed, and how much of that in attention's products."""

    model: float
    hardware: float
    hardware_attention: float


def dit_forward_flops(config: DiTConfig, num_img: int, num_txt: int, *, segments: int = 1) -> int:
    """FLOPs of the forward pass of one sample of `num_img` image and `num_txt` text tokens, padding included.

    `segments` is 2 where the first frames are given as clean, whose condition vector is computed beside the other.
    """
    c = config
    width, features = c.width, SINUSOID_FEATURES
    patch = math.prod(c.patch_size)
    tokens = num_img + num_txt

    embedder = width * (features + width)
    vectors = segments * embedder + width * (c.pooled_dim + width) + (embedder if c.guidance_embed else 0)

    refiner = 2 * width * width + num_txt * _layer(width, round(width * REFINER_MLP_RATIO)) + 2 * num_txt**2 * width
    text = embedder + width * (c.text_dim + width) + num_txt * c.text_dim * width + c.num_refiner_blocks * refiner

    attention = 2 * tokens**2 * width
    double = (segments + 1) * 6 * width * width + tokens * _layer(width, c.mlp_hidden) + attention
    single = segments * 3 * width * width + tokens * _layer(width, c.mlp_hidden) + attention

    ends = num_img * patch * (c.in_channels + c.out_channels) * width + 2 * width * width
    return 2 * (vectors + text + c.num_double_blocks * double + c.num_single_blocks * single + ends)


def dit_step_flops(config: DiTConfig, num_img: int, num_txt: int, *, filled: float = 1.0) -> StepFlops:
    """FLOPs of a training step of one sample; attention's kernels see `filled` times as many pairs of tokens as there are."""
    c = config
    forward = dit_forward_flops(c, num_img, num_txt)
    attention = 4 * (num_img + num_txt) ** 2 * c.width * (c.num_double_blocks + c.num_single_blocks)
    again = 0.0 if c.remat == "none" else 1.0
    attention_passes = 1.0 + 2.5 + (1.0 if c.remat == "full" else 0.0)
    hardware_attention = filled * attention_passes * attention
    return StepFlops(3.0 * forward, (3.0 + again) * (forward - attention) + hardware_attention, hardware_attention)


def product_flops(function: Callable[..., Any], *arguments: Any, needed: bool = False) -> float:
    """FLOPs of a function's products and convolutions, those of a loop as often as it repeats them; of arguments the shapes suffice.

    It is traced, not compiled, and what no result depends on is left out. Of a loop that ends when it will, and of a branch, what stands
    there counts once; but blocks of causal attention as often as they are met, or with `needed` the pairs in them that are seen.
    """
    return sum(times * _of_products(equation) for equation, times in equations(function, *arguments, needed=needed))


def equations(function: Callable[..., Any], *arguments: Any, needed: bool = False) -> Iterator[tuple[core.JaxprEqn, float]]:
    """The equations of a function's trace that its results depend on, those of loops and branches too, and how often each is computed."""
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    live, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _within(live, 1.0, needed=needed)


def _within(jaxpr: core.Jaxpr, times: float, *, needed: bool) -> Iterator[tuple[core.JaxprEqn, float]]:
    for equation in jaxpr.eqns:
        yield equation, times
        more = equation.params.get("length", 1) * (_share(equation, needed=needed) if equation.primitive.name == "cond" else 1.0)
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr))
        for program in (p.jaxpr if isinstance(p, core.ClosedJaxpr) else p for p in inner):
            if isinstance(program, core.Jaxpr):
                yield from _within(program, times * more, needed=needed)


def _of_products(equation: core.JaxprEqn) -> int:
    shape_of: Callable[[Any], tuple[int, ...]] = lambda variable: variable.aval.shape  # noqa: E731
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = shape_of(equation.invars[0])
        return 2 * math.prod(shape_of(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        outputs, *_ = equation.params["dimension_numbers"].rhs_spec
        kernel = shape_of(equation.invars[1])
        return 2 * math.prod(shape_of(equation.outvars[0])) * math.prod(kernel) // kernel[outputs]
    return 0


def _share(branch: core.JaxprEqn, *, needed: bool) -> float:
    """How often a branch is taken, or with `needed` how much of it is, where `models.vae.causal_scope` says so; else 1."""
    seen_and_met = re.search(rf"{CAUSAL}_([\d.]+)_([\d.]+)", str(branch.source_info.name_stack))
    return float(seen_and_met[1 if needed else 2]) if seen_and_met else 1.0


def _layer(width: int, hidden: int) -> int:
    """Products of one token with the weights of a transformer layer: queries, keys, values, projection and MLP."""
    return width * (4 * width + 2 * hidden)
