"""What stands between the world and the DiT: the VAE for frames and the text towers for prompts, kept as one folder.

    FOLDER/vae/        config.json and weights in the released layout; its latents, times its scaling_factor, have unit variance
    FOLDER/text.json   a random tower's sizes, seed, template and statistics (random_tower.py), or which encoders with weights of
                       their own there are, where they lie, and fingerprints of them (text_towers.py)
    FOLDER/empty.safetensors   the states of the empty prompt: training needs no others

Encoding writes the codec beside the latents, training copies it beside its checkpoints, and generation reads it there: a model
is never used with another codec than the one it was trained on.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hunyuan_jax import convert
from hunyuan_jax.data.dataset import sha256_of, write_json
from hunyuan_jax.data.records import TextStates
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.models.vae_tiling import Tiling, decode_tiled
from hunyuan_jax.random_tower import RandomTowerConfig
from hunyuan_jax.settings import build
from hunyuan_jax.text_towers import TowersConfig, read_states, write_states
from hunyuan_jax.weights import weights_of

EMPTY = "empty.safetensors"


class TextEncoder(Protocol):
    """What turns prompts into text states; the configs of both kinds `load` one."""

    def encode(self, prompts: Sequence[str]) -> list[TextStates]: ...


def text_config(section: Mapping[str, Any]) -> RandomTowerConfig | TowersConfig:
    """The text side that a section describes: encoders with weights of their own where it names a `language` model."""
    if "language" in section:
        return build(TowersConfig, section, where="text")
    return build(RandomTowerConfig, section, where="text")


@dataclasses.dataclass(frozen=True)
class Codec:
    """A VAE and a text side, ready to use; text encoders are loaded when the first prompt needs them.

    `empty` has the states of the empty prompt, where they are known. `kept_states` is a folder where states are kept that take long.
    """

    vae: VAEConfig
    vae_params: Any
    text: RandomTowerConfig | TowersConfig
    empty: TextStates | None = None
    kept_states: Path | None = None

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return self.text.load(kept=self.kept_states)

    def load_encoder(self) -> None:
        """Loads what encodes prompts. Raises `UserError` where it is missing."""
        _ = self._encoder

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextStates]:
        """The text states of prompts: the valid tokens after the crop, and the pooled vector."""
        if self.empty is not None and not any(prompts):
            return [self.empty] * len(prompts)
        return self._encoder.encode(prompts)

    def with_text(self, text: RandomTowerConfig | TowersConfig) -> "Codec":
        """This codec with another text side."""
        return dataclasses.replace(self, text=text, empty=self.empty if text.identity() == self.text.identity() else None)

    def decode(self, latents: Float[Array, "B T Y X C"]) -> Float[Array, "B T2 H W 3"]:
        """Frames in [-1, 1], not clipped, of scaled latents, as the DiT makes them."""
        frames: Any = VAE(self.vae).apply({"params": self.vae_params}, latents / self.vae.scaling_factor, method="decode")
        return frames

    def decode_tiled(self, latents: Float[Array, "B T Y X C"], tiling: Tiling) -> Float[np.ndarray, "B T2 H W 3"]:
        """What `decode` gives, in tiles: for videos too large to be decoded at once."""
        return decode_tiled(self.vae, self.vae_params, latents / self.vae.scaling_factor, tiling)

    def save(self, folder: Path) -> None:
        convert.write(weights_of(self.vae, self.vae_params), folder / "vae", "diffusers")
        write_states(folder / EMPTY, *self.encode_prompts([""]))
        write_json(folder / "text.json", self.text.said())

    def fingerprint(self, folder: Path) -> dict[str, str]:
        """What identifies the codec saved in `folder`, wherever its text encoders lie."""
        text = hashlib.sha256((json.dumps(self.text.identity(), indent=2, sort_keys=True) + "\n").encode()).hexdigest()
        return {"vae": sha256_of(folder / "vae" / convert.VAE_WEIGHTS), "text": text}


def load_codec(folder: Path) -> Codec:
    """The codec in `folder`. Raises `UserError` where there is none or it cannot be read."""
    try:
        text = json.loads((folder / "text.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no codec: text.json is missing. Run data_prep.encode, or give the folder it wrote.") from None
    except ValueError as error:
        raise UserError(f"{folder / 'text.json'} cannot be read: {error}.") from error
    vae, params = convert.load(folder / "vae", component="vae")
    empty = read_states(folder / EMPTY, "") if (folder / EMPTY).exists() else None
    return Codec(vae, jax.tree.map(jnp.asarray, params), text_config(text), empty)
