"""Structured captions: what is said of a clip, checked and cleaned.

A caption is a flat JSON object of texts and lists of tags (paper section 3.2). Captions come from models and files nobody vouches
for, so a `Caption` checks and cleans whatever it is made of. Its text stays plain text: markup in it means nothing here, and whoever
shows it escapes it.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from hunyuan_jax.errors import UserError, nearest

FIELDS = ("short", "dense", "background", "style", "shot_type", "lighting", "atmosphere", "camera_motion")
TAG_FIELDS = ("source_tags", "quality_tags")
PROMPT_FIELDS = (*FIELDS, *TAG_FIELDS)

MAX_CHARACTERS = 4000  # of one text field
MAX_TAGS = 32  # in one list of tags
MAX_TAG_CHARACTERS = 80  # of one tag, and of `source`
MAX_CAPTION_CHARACTERS = 16_000  # of all fields together
MAX_JSON_CHARACTERS = 2**18  # of a caption as JSON: more than 16,000 characters take when each is escaped as a surrogate pair


def clean_text(text: str) -> str:
    """One line of text: control characters and line breaks become single spaces; what only steers how text is shown is left out.

    The latter are format characters (Unicode category Cf), among them zero-width ones and those that turn the reading direction.
    """
    kinds = ((c, unicodedata.category(c)) for c in text)
    return " ".join("".join(" " if kind[0] == "C" else c for c, kind in kinds if kind != "Cf").split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    """What is said of a clip, each field clean and within its limits; a field of which nothing is known is empty.

    `source` says where the caption is from, such as "sidecar", and enters no prompt. Raises `UserError` for a value that is no text
    or list of tags, is too long, or holds half of a surrogate pair. None stands for an empty field.
    """

    short: str = ""
    dense: str = ""
    background: str = ""
    style: str = ""
    shot_type: str = ""
    lighting: str = ""
    atmosphere: str = ""
    camera_motion: str = ""
    source_tags: tuple[str, ...] = ()
    quality_tags: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, _clean_field(name, getattr(self, name), limit=MAX_CHARACTERS))
        for name in TAG_FIELDS:
            object.__setattr__(self, name, _clean_tags(name, getattr(self, name)))
        object.__setattr__(self, "source", _clean_field("source", self.source, limit=MAX_TAG_CHARACTERS))
        total = sum(len("".join(value)) for value in vars(self).values())
        if total > MAX_CAPTION_CHARACTERS:
            raise UserError(f"A caption may have {MAX_CAPTION_CHARACTERS} characters in all its fields together, not {total}.")

    @classmethod
    def from_json(cls, value: Any) -> "Caption":
        """The caption in a JSON value. Raises `UserError` for anything that is none."""
        if not isinstance(value, Mapping):
            raise UserError(f"A caption must be an object of text fields, not {_kind(value)}.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"The fields of a caption have text as names, not {_kind(name)}.")
            if name not in known:
                raise UserError(f"Captions have no field {name[:40]!r}. {nearest(name[:40], known)}")
        return cls(**value)

    def words(self, name: str) -> str:
        """One field as it stands in a prompt; tags are joined by commas."""
        value = getattr(self, name)
        return value if isinstance(value, str) else ", ".join(value)


def parse_caption(text: str) -> Caption:
    """The caption in JSON text. Raises `UserError` for text that is too long, no strict JSON, or no caption."""
    if len(text) > MAX_JSON_CHARACTERS:
        raise UserError(f"A caption's JSON may have {MAX_JSON_CHARACTERS} characters, not {len(text)}.")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise UserError("A caption must be a flat JSON object, not one nested too deeply to be read.") from None
    except ValueError as error:
        raise UserError(f"A caption must be a JSON object, and this is no JSON ({error}).") from error
    return Caption.from_json(value)


def caption_json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of captions, for whatever writes them.

    It says all that `Caption` asks for but what no schema can: the limit of all fields together, and no half surrogate pairs.
    """
    text = {"type": ["string", "null"], "maxLength": MAX_CHARACTERS}
    tag = {"type": "string", "maxLength": MAX_TAG_CHARACTERS}
    tags = {"type": ["array", "null"], "items": tag, "maxItems": MAX_TAGS}
    source = {"type": ["string", "null"], "maxLength": MAX_TAG_CHARACTERS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Caption",
        "type": "object",
        "properties": {**dict.fromkeys(FIELDS, text), **dict.fromkeys(TAG_FIELDS, tags), "source": source},
        "additionalProperties": False,
    }


def _clean_field(name: str, value: Any, *, limit: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"Caption field {name!r} must be text, not {_kind(value)}.")
    if len(value) > limit:
        raise UserError(f"Caption field {name!r} may have {limit} characters, not {len(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"Caption field {name!r} must be text; its character {error.start} is half of a surrogate pair.") from None
    return clean_text(value)


def _clean_tags(name: str, value: Any) -> tuple[str, ...]:
    """Tags in the order given; those that are empty or were there before are left out."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise UserError(f"Caption field {name!r} must be a list of short texts, not {_kind(value)}.")
    if len(value) > MAX_TAGS:
        raise UserError(f"Caption field {name!r} may have {MAX_TAGS} tags, not {len(value)}.")
    for tag in value:
        if not isinstance(tag, str):
            raise UserError(f"Caption field {name!r} must be a list of short texts; it holds {_kind(tag)}.")
    return tuple(dict.fromkeys(tag for tag in (_clean_field(name, tag, limit=MAX_TAG_CHARACTERS) for tag in value) if tag))


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    kinds = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UserError(f"A caption must have each field once; {name[:40]!r} came twice.")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise UserError(f"A caption must be strict JSON, which has no {name}.")
