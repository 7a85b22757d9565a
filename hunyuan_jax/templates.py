"""The prompt templates that the released models were trained with: read where they are installed, and checked, since no copy is kept here.

A template wraps a prompt in an instruction to the language tower; the states of the first `crop_start` tokens, the instruction's, are
cut off. One other character is another conditioning, so what is read must have the length and SHA-256 of the released text.
Those for video stand in the source of diffusers, which is parsed and not run; any of them may come from a UTF-8 text file instead.
"""

import ast
import dataclasses
import hashlib
import importlib.util
from pathlib import Path

from hunyuan_jax.errors import UserError

PIPELINES = "pipelines/hunyuan_video"
CONSTANT = "DEFAULT_PROMPT_TEMPLATE"
MAX_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A text with one `{}` for the prompt, the tokens cut off before it, and how many the whole may have."""

    text: str
    crop_start: int
    max_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """What identifies a released template, and the module of diffusers that has it, "" where none has."""

    sha256: str  # the first 16 digits
    characters: int
    crop_start: int
    max_tokens: int
    module: str = ""


RELEASED = {
    "t2v_video": Released(sha256="a52f68dde3637b12", characters=512, crop_start=95, max_tokens=351, module="pipeline_hunyuan_video.py"),
    "t2v_image": Released(sha256="e6794c248e31c8ef", characters=241, crop_start=36, max_tokens=351),
    "i2v_video": Released(
        sha256="7f45a330cc8fa70b", characters=602, crop_start=103, max_tokens=359, module="pipeline_hunyuan_video_image2video.py"
    ),
    "i2v_image": Released(sha256="d5e508d91078ada4", characters=296, crop_start=36, max_tokens=359),
}


def released_template(name: str, *, file: Path | None = None) -> Template:
    """The released template `name`, from `file` or, without one, from the installed diffusers.

    Raises `UserError` for a name that is none, where it is found nowhere, and where the text is not the released one.
    """
    if name not in RELEASED:
        raise UserError(f"No released template is called {name!r}; there are {', '.join(RELEASED)}.")
    known = RELEASED[name]
    if file is not None:
        where, text = str(file), _read(file)
    else:
        where, text = _from_diffusers(name, known)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(text) != known.characters or not digest.startswith(known.sha256):
        raise UserError(
            f"The template in {where} is not the released {name}: it has {len(text)} characters and SHA-256 {digest[:16]}..., "
            f"not {known.characters} and {known.sha256}... Name a file with the released text, without a line break at its end."
        )
    return Template(text=text, crop_start=known.crop_start, max_tokens=known.max_tokens)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES).decode()
    except OSError as error:
        raise UserError(f"The template file {file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The template file {file} is not UTF-8 text (byte {error.start}).") from None


def _from_diffusers(name: str, known: Released) -> tuple[str, str]:
    """Where it was found, and the text."""
    fix = f"Save the released text in a file and name that as the template's file ({known.characters} characters)."
    if not known.module:
        raise UserError(f"diffusers does not have the template {name}. {fix}")
    found = importlib.util.find_spec("diffusers")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"The template {name} is read from diffusers, which is not installed: pip install diffusers. {fix}")
    source = Path(found.submodule_search_locations[0]) / PIPELINES / known.module
    try:
        for node in ast.parse(_read(source)).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [CONSTANT]:
                return str(source), str(ast.literal_eval(node.value)["template"])
    except (ValueError, KeyError, TypeError, SyntaxError):
        pass
    raise UserError(f"{source} has no {CONSTANT} with a template, as other versions of diffusers do. {fix}")
