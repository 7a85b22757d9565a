"""Prompts made of structured captions.

    Caption --assemble_prompt--> one line of text, another one each epoch

Prompts are assembled from a caption's fields with random drop, permutation and combination, so that the model meets prompts of all
lengths and patterns (paper section 3.2). A draw depends on the seed, the sample and the epoch alone, and is the same on every host.
"""

import bisect
import dataclasses
import hashlib
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.data.captions import MAX_CHARACTERS, PROMPT_FIELDS, Caption
from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.settings import build

_DESCRIPTIONS = ("short", "dense")
_SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")  # the last three are those of Chinese
_DRAWS_PER_VARIANT = 32
_MAX_WEIGHT = 1_000_000


def make_prompt(caption: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The named fields of a caption as one prompt, joined by commas; fields that are missing or empty are left out.

    After a sentence follows a space instead of a comma. Only the named fields are checked. Raises `UserError` for a field name that
    no caption has, and for a value that `Caption` refuses.
    """
    _check_names(fields, where="A prompt")
    named: dict[str, Any] = {name: caption.get(name) for name in fields}
    return _joined(Caption(**named), fields)


def full_prompt(caption: Caption) -> str:
    """All that a caption says, its dense description or, without one, the short one first."""
    described = "dense" if caption.dense else "short"
    return _joined(caption, [described, *(name for name in PROMPT_FIELDS if name not in _DESCRIPTIONS)])


def _joined(caption: Caption, names: Sequence[str]) -> str:
    prompt = ""
    for part in filter(None, (caption.words(name) for name in names)):
        between = "" if not prompt else " " if prompt.endswith(_SENTENCE_ENDS) else ", "
        prompt += between + part
    return prompt


def _check_names(names: Sequence[str], *, where: str) -> None:
    for name in names:
        if name not in PROMPT_FIELDS:
            raise UserError(f"{where}: captions have no field {name!r}. {nearest(str(name), list(PROMPT_FIELDS))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """One pattern of prompts: all of `fields`, and some of `extras`, drawn evenly from those that the caption has.

    `extra_count` is the least and the most extras, each number equally likely. `weight` is relative to other lengths.
    """

    weight: float
    fields: tuple[str, ...]
    extras: tuple[str, ...] = ()
    extra_count: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name in ("fields", "extras", "extra_count"):
            if not isinstance(getattr(self, name), list | tuple):
                raise UserError(f"The lengths of prompts need a list as {name}, not {getattr(self, name)!r}.")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = (*self.fields, *self.extras)
        _check_names(names, where="The lengths of prompts")
        if not self.fields or len(set(names)) != len(names):
            raise UserError(f"The lengths of prompts need at least one of fields, and each field once, not {names}.")
        if not _is_number(self.weight) or not 0 <= self.weight <= _MAX_WEIGHT:
            raise UserError(f"The lengths of prompts need a weight between 0 and {_MAX_WEIGHT}, not {self.weight!r}.")
        whole = len(self.extra_count) == 2 and all(type(n) is int for n in self.extra_count)
        if not whole or not 0 <= self.extra_count[0] <= self.extra_count[1] <= len(self.extras):
            raise UserError(f"extra_count must be (least, most), at most the {len(self.extras)} extras, not {self.extra_count}.")
        if self.extras and not self.extra_count[1]:
            raise UserError(f"The extras {self.extras} are never drawn; set extra_count to (least, most).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How prompts are assembled from captions.

    `lengths` names the patterns, each a `Length` or a section of one. `keep` is the probability that a drawn field stays, 1 where
    it says nothing. `permute` puts the fields in random order. A prompt longer than `max_characters` ends at the last whole word.
    `text_dropout` is the probability that the whole prompt is empty, for classifier-free guidance.
    """

    lengths: Mapping[str, Any]
    keep: Mapping[str, float] = dataclasses.field(default_factory=dict)
    permute: bool = False
    max_characters: int = MAX_CHARACTERS
    text_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lengths", "keep"):
            if not isinstance(getattr(self, name), Mapping):
                raise UserError(f"Prompts need a section as {name}, not {getattr(self, name)!r}.")
        # In the order of their names: a config gives the same draws in whatever order it is written.
        object.__setattr__(self, "lengths", {name: _length(name, self.lengths[name]) for name in sorted(self.lengths)})
        if not any(length.weight for length in self.lengths.values()):
            raise UserError(f"Prompts need a length with a weight above 0; the lengths are {list(self.lengths) or 'none'}.")
        _check_names(list(self.keep), where="The keep probabilities of prompts")
        for name, value in {**{f"keep.{name}": value for name, value in self.keep.items()}, "text_dropout": self.text_dropout}.items():
            if not _is_number(value) or not 0 <= value <= 1:
                raise UserError(f"Prompts need {name} between 0 and 1, not {value!r}.")
        if not isinstance(self.permute, bool):
            raise UserError(f"Prompts need permute to be True or False, not {self.permute!r}.")
        if type(self.max_characters) is not int or self.max_characters < 1:
            raise UserError(f"Prompts need max_characters of at least 1, not {self.max_characters!r}.")


def _length(name: str, section: Any) -> Length:
    if isinstance(section, Length):
        return section
    if not isinstance(section, Mapping):
        raise UserError(f"Prompts need a section as lengths.{name}, not {section!r}.")
    return build(Length, section, where=f"lengths.{name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Draw(NamedTuple):
    """Uniform numbers in [0, 1), each for one decision, so that changing one option changes nothing about the others."""

    dropout: float
    length: float
    extra_count: float
    extra: Mapping[str, float]  # the extras with the smallest numbers are taken
    keep: Mapping[str, float]
    order: Mapping[str, float]


def _draw(seed: int, sample_id: str | int, epoch: int) -> _Draw:
    named = sample_id if isinstance(sample_id, str) else operator.index(sample_id)
    digest = hashlib.sha256(f"{operator.index(seed)}/{operator.index(epoch)}/{named!a}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    dropout, length, extra_count = rng.random(3).tolist()
    extra, keep, order = (dict(zip(PROMPT_FIELDS, row, strict=True)) for row in rng.random((3, len(PROMPT_FIELDS))).tolist())
    return _Draw(dropout, length, extra_count, extra, keep, order)


def assemble_prompt(caption: Caption, config: PromptConfig, *, seed: int, sample_id: str | int, epoch: int) -> str:
    """The prompt of a sample in an epoch.

    Of the two descriptions, short and dense, one that the caption lacks is replaced by the other. Where no field is left, the
    prompt is the first field drawn that the caption has, else the first of `PROMPT_FIELDS` that it has. So the prompt is empty only
    when it was dropped or the caption says nothing.
    """
    draw = _draw(seed, sample_id, epoch)
    if draw.dropout < config.text_dropout:
        return ""
    return _cut(_joined(caption, _drawn_fields(caption, config, draw)), config.max_characters)


def prompt_variants(caption: Caption, config: PromptConfig, *, seed: int, sample_id: str | int, count: int) -> tuple[str, ...]:
    """The first `count` different prompts of a sample over epochs 0, 1, ..., none of them dropped.

    They are fewer where the caption and the config give fewer, or rarely give another: the search ends after 32 epochs for each
    that was asked for. A smaller `count` gives the beginning of what a larger one gives.
    """
    if count < 1:
        raise UserError(f"At least 1 prompt variant is needed, not {count}.")
    kept = dataclasses.replace(config, text_dropout=0.0)
    variants: dict[str, None] = {}
    for epoch in range(_DRAWS_PER_VARIANT * count):
        variants[assemble_prompt(caption, kept, seed=seed, sample_id=sample_id, epoch=epoch)] = None
        if len(variants) == count:
            break
    return tuple(variants)


def _drawn_fields(caption: Caption, config: PromptConfig, draw: _Draw) -> list[str]:
    """The fields of a prompt, in order: those of the drawn length that the caption has and that are kept."""
    lengths = list(config.lengths.values())
    sums = list(itertools.accumulate(length.weight for length in lengths))
    length = lengths[bisect.bisect_right(sums, draw.length * sums[-1])]

    present = [name for name in PROMPT_FIELDS if getattr(caption, name)]
    fields = dict.fromkeys(_standing_in(name, present) for name in length.fields)
    extras = [name for name in length.extras if name in present and name not in fields]
    least, most = length.extra_count
    count = least + int(draw.extra_count * (most - least + 1))
    chosen = sorted(extras, key=draw.extra.__getitem__)[:count]

    drawn = [name for name in (*fields, *(name for name in extras if name in chosen)) if name in present]
    kept = [name for name in drawn if draw.keep[name] < config.keep.get(name, 1.0)]
    names = kept or (drawn or present)[:1]
    return sorted(names, key=draw.order.__getitem__) if config.permute else names


def _standing_in(name: str, present: Sequence[str]) -> str:
    """The field itself, or the other description for one that is not present."""
    if name in _DESCRIPTIONS and name not in present:
        return next(other for other in _DESCRIPTIONS if other != name)
    return name


def _cut(prompt: str, limit: int) -> str:
    """The prompt, or as many whole words of it as fit; of a single word that is longer, its beginning."""
    if len(prompt) <= limit:
        return prompt
    begun = prompt[:limit]
    whole = begun if prompt[limit] in " ," else begun.rpartition(" ")[0] or begun
    return whole.rstrip(" ,") or whole.rstrip()
