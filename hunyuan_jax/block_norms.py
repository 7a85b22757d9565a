"""Norms of parameters and of their gradients, block by block: where in a model something grows, vanishes or does not learn.

double_blocks/img_mlp/fc1/kernel [20, ...]    a stack of scanned blocks, its layers along the first axis: one norm for each layer
decoder/up_blocks_1/...                       any other module, by the first two names of its path: one norm
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hunyuan_jax.parallel.sharding import path_of

DEPTH = 2  # names of a path that tell modules apart


def norms_by_block(tree: Any) -> dict[str, Float[Array, "..."]]:
    """The L2 norm of each module in float32: a number, or, of a stack of layers, as many as it has."""
    leaves = [(path_of(path).split("/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    stacks = _stacks(leaves)
    sums: dict[str, list[Array]] = collections.defaultdict(list)
    for names, leaf in leaves:
        stack = next((name for name in _ancestors(names) if name in stacks), None)
        squares = jnp.square(leaf.astype(jnp.float32))
        sums[stack or _module(names)].append(jnp.sum(squares) if stack is None else jnp.sum(squares, axis=tuple(range(1, leaf.ndim))))
    return {name: jnp.sqrt(sum(parts[1:], parts[0])) for name, parts in sums.items()}


def _stacks(leaves: Sequence[tuple[list[str], Any]]) -> set[str]:
    """The modules all of whose arrays have an axis of layers before their own, all as long."""
    layers: dict[str, set[int]] = collections.defaultdict(set)
    for names, leaf in leaves:
        own = 2 if names[-1] == "kernel" else 1
        for module in _ancestors(names):
            layers[module].add(leaf.shape[0] if leaf.ndim == own + 1 else 0)
    return {module for module, lengths in layers.items() if len(lengths) == 1 and lengths != {0}}


def _ancestors(names: Sequence[str]) -> list[str]:
    """The modules that an array lies in, the outermost first."""
    return ["/".join(names[:end]) for end in range(1, len(names))]


def _module(names: Sequence[str]) -> str:
    return "/".join(names[:-1][:DEPTH]) or names[0]
