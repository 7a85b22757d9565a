"""The door between configuration files and code: a ConfigDict section becomes one frozen dataclass, or one clear error.

A key that the dataclass does not have is a `UserError` that names the nearest right one; nothing is ignored and nothing is
filled in silently. Below this door no code sees a ConfigDict.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict

from hunyuan_jax.errors import UserError, nearest

Settings = TypeVar("Settings")


def build(kind: type[Settings], section: Mapping[str, Any], *, where: str) -> Settings:
    """`kind(**section)`, where an unknown or a missing key is a `UserError` naming `where`, the key and the nearest right one."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in section:
        if key not in fields:
            raise UserError(f"Configuration {where}.{key} is not known. {nearest(key, list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in section:
            raise UserError(f"Configuration {where}.{name} is missing; set it in the config file.")
    try:
        return kind(**{key: _plain(value) for key, value in section.items()})
    except TypeError as error:
        raise UserError(f"Configuration {where} has a value of the wrong type: {error}.") from error


def _plain(value: Any) -> Any:
    """Lists of a ConfigDict become tuples, nested sections plain dicts."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def parse_flags(argv: list[str], *, required: Sequence[str]) -> None:
    """Reads the command line; what is misspelt there, also inside the config, is a `UserError` with the nearest right name."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        # For an error inside a config file the flag's message is a whole traceback; its last line says what is wrong.
        raise UserError(str(error).strip().splitlines()[-1]) from error
    except (AttributeError, KeyError) as error:
        said = str(error).replace("\\n", " ").replace("\n", " ").replace("\\'", "").strip("'\"")
        raise UserError(f"A --config.KEY=VALUE names a key that the config does not have: {said}") from error
    except (OSError, ImportError, SyntaxError, ValueError) as error:
        raise UserError(f"The config cannot be loaded: {error}") from error
    if len(rest) > 1:
        raise UserError(f"Arguments {rest[1:]} were not understood; options begin with --.")
    for name in required:
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is missing.")
    if "config" in required:
        _check_loaded(flags.FLAGS.config)


def _check_loaded(config: Any) -> None:
    """ml_collections keeps a config file's failure to load until the config is first used; this is where it comes out."""
    try:
        config.keys()
    except OSError as error:
        raise UserError(f"The config cannot be loaded: {error.__cause__ or error}") from error
