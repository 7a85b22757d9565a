"""Files of LoRA adapters: read in any layout, written as safetensors in any other. What is in them is told in models/lora.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.data.dataset import write_json
from hunyuan_jax.errors import UserError
from hunyuan_jax.models import lora
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.lora import Adapter, LoRA
from hunyuan_jax.tensor_files import open_tensors, write_safetensors

SETTINGS = "adapter_config.json"  # beside the file, where PEFT and diffusion-pipe keep rank and alpha


def holds_adapters(path: str | Path, *, key: str | None = None) -> bool:
    """Whether a file is of adapters and not of weights, by the names in it."""
    return any(
        mark in name for name in open_tensors(path, key=key).tensors for mark in (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")
    )


def read(path: str | Path, config: DiTConfig, *, key: str | None = None) -> LoRA:
    """The adapters in a safetensors or `.pt` file or in the folder of one, for a model of this config.

    Raises `UserError` where anything in it is unknown, incomplete or of the wrong shape.
    """
    path = Path(path)
    file = open_tensors(path, key=key)
    settings = lora.settings_in(file.metadata)
    if settings is None:
        settings = _read_settings((path if path.is_dir() else path.parent) / SETTINGS)
    return lora.parse({name: tensor.read() for name, tensor in file.tensors.items()}, config, settings=settings, source=str(path))


def write(
    target: str | Path, adapters: Mapping[str, Adapter], layout: str, config: DiTConfig, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes adapters to a safetensors file, and for diffusion-pipe the settings beside it.

    Raises `UserError` if the settings of another adapter lie there already.
    """
    target = Path(target)
    tensors = lora.tensors_in(adapters, layout, config)
    said = dict(metadata or {}) | lora.metadata_of(adapters, layout, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, settings = target.parent / SETTINGS, lora.settings_of(adapters, layout, config)
    if layout == "diffusion-pipe":
        if not target.exists() and _read_settings(beside) not in (None, settings):
            raise UserError(f"{beside} has the settings of another adapter, and {target.name} needs its own. Choose another folder.")
        write_json(beside, settings)
    write_safetensors(target, tensors, (np.asarray(tensor) for tensor in tensors.values()), metadata=said)


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        given = json.loads(path.read_text()) if path.exists() else None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}), and it has the alpha of the adapter beside it. Mend or remove it.") from error
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{path} should be a JSON object and is {str(given)[:100]}. Mend or remove it.")
    return given
