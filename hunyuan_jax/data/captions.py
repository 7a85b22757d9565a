"""Structured captions and the prompts made of them.

A caption is a JSON object of text fields (paper section 3.2): short, dense, background, style, shot_type, lighting, atmosphere,
camera_motion. Captions come from models and files nobody vouches for, so whatever is read is checked here first.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.errors import UserError

FIELDS = ("short", "dense", "background", "style", "shot_type", "lighting", "atmosphere", "camera_motion")
MAX_CHARACTERS = 4000


def clean_text(text: str) -> str:
    """One line of text: control characters and line breaks become single spaces."""
    return " ".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).split())


def make_prompt(caption: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The named fields of a caption as one prompt, joined by commas; fields that are missing or empty are left out.

    Raises `UserError` for a field name that no caption has, and for a value that is no text or is too long.
    """
    parts = []
    for name in fields:
        if name not in FIELDS:
            raise UserError(f"Captions have no field {name!r}; they have {', '.join(FIELDS)}.")
        value = caption.get(name) or ""
        if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
            raise UserError(f"Caption field {name!r} must be text of at most {MAX_CHARACTERS} characters, not {type(value).__name__}.")
        parts.append(clean_text(value))
    return ", ".join(part for part in parts if part)
