"""A text tower of random weights, made from a seed: what conditions the small models, which are trained without any download.

prompt -> template -> bytes -> random language model -> a state for each byte or word     txt [L, D]
                                                     -> the last one, or the mean of all   pooled [D]
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import ml_dtypes
import numpy as np

from hunyuan_jax.data.records import TextStates
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.text_encoders import TextTower, TextTowerConfig
from hunyuan_jax.settings import build

BOS, EOS, PAD = 256, 257, 258  # the byte tokenizer's ids above the 256 bytes
PROMPTS_AT_ONCE = 64
Tokens = Literal["bytes", "words"]
Pooled = Literal["last", "mean"]
STATISTICS = ("txt_mean", "txt_std", "pooled_mean", "pooled_std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTowerConfig:
    """How a prompt is encoded: `template` with one `{}` for the prompt, tokenised as bytes, through a tower.

    The tower reads the whole template and at most `max_bytes` from where the prompt begins, the end-of-text token included where it
    fits; the states of what stands before the prompt are cut off. With `tokens` "words" a token is the mean of the states of a word
    and the space after it, as a trained tokenizer would cut the text, and not of every byte; at most `max_tokens` are kept. `pooled`
    is the state of the last byte or the mean of all: a random tower mixes what words say in its last state, a trained one sums it up
    there. Weights are random, by `seed`.

    `statistics`, by channel, are what states are normalised by: those of a random tower are nearly the same for all prompts, and
    a model would spend its first hundreds of steps on learning to tell them apart. Empty leaves states as the tower gives them.
    """

    tower: Mapping[str, Any]
    template: str
    max_bytes: int
    max_tokens: int
    tokens: Tokens = "bytes"
    pooled: Pooled = "last"
    seed: int = 0
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of STATISTICS, a float per channel

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1 or self.max_bytes < 1 or self.max_tokens < 1:
            raise UserError(
                "text: the template needs exactly one {} and max_bytes and max_tokens at least 1, "
                f"not {self.template!r}, {self.max_bytes}, {self.max_tokens}."
            )
        for name, value, allowed in (("tokens", self.tokens, get_args(Tokens)), ("pooled", self.pooled, get_args(Pooled))):
            if value not in allowed:
                raise UserError(f"text: {name} must be one of {', '.join(allowed)}, not {value!r}.")
        if self.statistics and {name: len(values) for name, values in self.statistics.items()} != dict.fromkeys(STATISTICS, self.width):
            raise UserError(f"text: statistics needs {', '.join(STATISTICS)}, of {self.width} values each.")
        if self.tower_config.vocab_size <= PAD:
            raise UserError(f"text: the byte tokenizer needs a vocabulary of {PAD + 1}, not {self.tower_config.vocab_size}.")

    @property
    def tower_config(self) -> TextTowerConfig:
        return build(TextTowerConfig, self.tower, where="text.tower")

    @property
    def width(self) -> int:
        return self.tower_config.width

    @property
    def pooled_width(self) -> int:
        return self.width

    @property
    def kept_tokens(self) -> int:
        """The most tokens that are kept of a prompt."""
        return self.max_tokens

    def identity(self) -> dict[str, Any]:
        """What decides the states of a prompt."""
        return self.said()

    def said(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return dataclasses.asdict(self) | {"tower": dict(self.tower)}

    def resolved(self) -> "RandomTowerConfig":
        """As it is: nothing that it needs lies elsewhere."""
        return self

    @property
    def places(self) -> dict[str, str]:
        """Where parts of it lie: nowhere."""
        return {}

    def at(self, places: Mapping[str, str]) -> "RandomTowerConfig":
        """As it is, for no places. Raises `UserError` for any."""
        if places:
            raise UserError(f"The model's text tower is made from a seed; there is no {', '.join(places)} to name a folder for.")
        return self

    def load(self, *, kept: Path | None = None) -> "RandomTower":
        """The tower; it is made in a moment, and nothing of it is kept."""
        return RandomTower(self)

    def with_statistics(self, prompts: Sequence[str]) -> "RandomTowerConfig":
        """With the statistics of its states over `prompts`, which must not all be alike."""
        return dataclasses.replace(self, statistics=self.load().measure(prompts))

    @property
    def crop_start(self) -> int:
        """Tokens that stand before the prompt."""
        return 1 + len(self.template.split("{}")[0].encode())

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [B, L] and their mask, padded on the right to what crop and `max_bytes` take, and cut there."""
        length = self.crop_start + self.max_bytes
        tokens, mask = np.full((len(prompts), length), PAD, np.int32), np.zeros((len(prompts), length), bool)
        before, after = self.template.split("{}")
        for row, prompt in enumerate(prompts):
            ids = [BOS, *(before + prompt + after).encode(errors="replace"), EOS][:length]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return tokens, mask


@dataclasses.dataclass(frozen=True)
class RandomTower:
    """The tower of a config, ready to use."""

    config: RandomTowerConfig

    @functools.cached_property
    def params(self) -> Any:
        tokens, mask = self.config.tokenize(["a"])
        return jax.jit(TextTower(self.config.tower_config).init)(jax.random.key(self.config.seed), tokens, mask)["params"]

    @functools.cached_property
    def _run(self) -> Any:
        tower = TextTower(self.config.tower_config)
        return jax.jit(lambda params, tokens, mask: tower.apply({"params": params}, tokens, mask))

    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """The text states of prompts: the valid tokens after the crop, and the pooled vector."""
        normal = {name: np.asarray(values, np.float32) for name, values in self.config.statistics.items()}
        out = []
        for prompt, txt, pooled in self.states(prompts):
            if normal:
                txt = (txt - normal["txt_mean"]) / normal["txt_std"]
                pooled = (pooled - normal["pooled_mean"]) / normal["pooled_std"]
            out.append(TextStates(prompt=prompt, txt=txt.astype(ml_dtypes.bfloat16), pooled=pooled.astype(ml_dtypes.bfloat16)))
        return out

    def states(self, prompts: Sequence[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each prompt with its tokens [L, D] and its pooled vector [D], in float32, not normalised."""
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            group = list(prompts[start : start + PROMPTS_AT_ONCE])
            tokens, mask = self.config.tokenize(group + [""] * (PROMPTS_AT_ONCE - len(group)))  # one shape, one compilation
            states = np.asarray(self._run(self.params, tokens, mask), np.float32)
            for prompt, ids, row, valid in zip(group, tokens, states, mask.sum(axis=1), strict=False):
                kept, ids = row[self.config.crop_start : valid], ids[self.config.crop_start : valid]
                starts = word_starts(ids) if self.config.tokens == "words" else np.arange(len(ids))
                sizes = np.diff(starts, append=len(ids))
                txt = np.add.reduceat(kept, starts, axis=0) / sizes[:, None]
                yield prompt, txt[: self.config.max_tokens], kept[-1] if self.config.pooled == "last" else kept.mean(axis=0)

    def measure(self, prompts: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """The statistics of the states of `prompts`, before they are normalised. Raises `UserError` where these do not vary."""
        _, txts, pooled = zip(*self.states(prompts), strict=True)
        arrays = {"txt": np.concatenate(txts), "pooled": np.stack(pooled)}
        measured = {f"{name}_{what}": getattr(x, what)(axis=0) for name, x in arrays.items() for what in ("mean", "std")}
        if not all(np.all(np.isfinite(v)) and (v.min() > 0 or "mean" in name) for name, v in measured.items()):
            raise UserError(f"text: the states of {len(set(prompts))} different prompts do not vary; more captions are needed.")
        return {name: tuple(round(float(v), 6) for v in values) for name, values in measured.items()}


def word_starts(ids: np.ndarray) -> np.ndarray:
    """Where words begin in the byte tokens of a text: at its start, after spaces, and at the end-of-text token."""
    space = ids == ord(" ")
    return np.flatnonzero((~space & np.concatenate([[True], space[:-1]])) | (ids == EOS) | (np.arange(len(ids)) == 0))
