"""What stands between the world and the DiT: the VAE for frames and the text towers for prompts, kept as one folder.

    FOLDER/vae/        config.json and weights in the released layout; its latents, times its scaling_factor, have unit variance
    FOLDER/text.json   a random tower's sizes, seed, template and statistics (`TextConfig`), or which encoders with weights of their
                       own there are, where they lie, and fingerprints of them (`TowersConfig` in text_towers.py)
    FOLDER/empty.safetensors   with such encoders, the states of the empty prompt: training needs no others

Encoding writes the codec beside the latents, training copies it beside its checkpoints, and generation reads it there: a model
is never used with another codec than the one it was trained on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from hunyuan_jax import convert
from hunyuan_jax.data.dataset import sha256_of, write_json
from hunyuan_jax.data.records import TextStates
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.text_encoders import TextTower, TextTowerConfig
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.models.vae_tiling import Tiling, decode_tiled
from hunyuan_jax.settings import build
from hunyuan_jax.tensor_files import open_tensors, write_safetensors
from hunyuan_jax.text_towers import TextTowers, TowersConfig
from hunyuan_jax.weights import weights_of

BOS, EOS, PAD = 256, 257, 258  # the byte tokenizer's ids above the 256 bytes
PROMPTS_AT_ONCE = 64
EMPTY = "empty.safetensors"
Tokens = Literal["bytes", "words"]
Pooled = Literal["last", "mean"]
STATISTICS = ("txt_mean", "txt_std", "pooled_mean", "pooled_std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
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

    def identity(self) -> dict[str, Any]:
        """What decides the states of a prompt."""
        return dataclasses.asdict(self) | {"tower": dict(self.tower)}

    def resolved(self) -> "TextConfig":
        """As it is: nothing that it needs lies elsewhere."""
        return self

    @property
    def kept_tokens(self) -> int:
        """The most tokens that are kept of a prompt."""
        return self.max_tokens

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


def text_config(section: Mapping[str, Any]) -> TextConfig | TowersConfig:
    """The text side that a section describes: encoders with weights of their own where it names a `language` model."""
    if "language" in section:
        return build(TowersConfig, section, where="text")
    return build(TextConfig, section, where="text")


@dataclasses.dataclass(frozen=True)
class Codec:
    """A VAE and text towers, ready to use; towers are loaded when the first prompt needs them. `empty` is the empty prompt's states."""

    vae: VAEConfig
    vae_params: Any
    text: TextConfig | TowersConfig
    empty: TextStates | None = None
    kept_states: Path | None = None  # a folder of states from encoders with weights, by what decides them

    @functools.cached_property
    def _towers(self) -> TextTowers:
        assert isinstance(self.text, TowersConfig)
        return self.text.load()

    @functools.cached_property
    def text_params(self) -> Any:
        assert isinstance(self.text, TextConfig)
        tokens, mask = self.text.tokenize(["a"])
        return jax.jit(TextTower(self.text.tower_config).init)(jax.random.key(self.text.seed), tokens, mask)["params"]

    @functools.cached_property
    def _tower(self) -> Any:
        assert isinstance(self.text, TextConfig)
        tower = TextTower(self.text.tower_config)
        return jax.jit(lambda params, tokens, mask: tower.apply({"params": params}, tokens, mask))

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextStates]:
        """The text states of prompts: the valid tokens after the crop, and the pooled vector."""
        if isinstance(self.text, TowersConfig):
            if self.empty is not None and not any(prompts):
                return [self.empty] * len(prompts)
            if self.kept_states is not None:
                return self._encode_once(prompts, self.kept_states)
            return self._towers.encode(prompts)
        normal = {name: np.asarray(values, np.float32) for name, values in self.text.statistics.items()}
        out = []
        for prompt, txt, pooled in self._states(prompts):
            if normal:
                txt = (txt - normal["txt_mean"]) / normal["txt_std"]
                pooled = (pooled - normal["pooled_mean"]) / normal["pooled_std"]
            out.append(TextStates(prompt=prompt, txt=txt.astype(ml_dtypes.bfloat16), pooled=pooled.astype(ml_dtypes.bfloat16)))
        return out

    def _encode_once(self, prompts: Sequence[str], folder: Path) -> list[TextStates]:
        """States from `folder`, where those that are not there, or cannot be read, are put; encoders are loaded for these alone."""
        said = json.dumps(self.text.identity(), sort_keys=True)
        files = {p: folder / f"{hashlib.sha256(f'{said} {p}'.encode()).hexdigest()}.safetensors" for p in prompts}
        found = {}
        for prompt, file in files.items():
            with contextlib.suppress(UserError):
                found[prompt] = _read_states(file, prompt)
        missing = [prompt for prompt in files if prompt not in found]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            for states in self._towers.encode(missing):
                _write_states(files[states.prompt], states)
                found[states.prompt] = states
        return [found[prompt] for prompt in prompts]

    def _states(self, prompts: Sequence[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each prompt with its tokens [L, D] and its pooled vector [D] of the random tower, in float32, not normalised."""
        assert isinstance(self.text, TextConfig)
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            group = list(prompts[start : start + PROMPTS_AT_ONCE])
            tokens, mask = self.text.tokenize(group + [""] * (PROMPTS_AT_ONCE - len(group)))  # one shape, one compilation
            states = np.asarray(self._tower(self.text_params, tokens, mask), np.float32)
            for prompt, ids, row, valid in zip(group, tokens, states, mask.sum(axis=1), strict=False):
                kept, ids = row[self.text.crop_start : valid], ids[self.text.crop_start : valid]
                starts = word_starts(ids) if self.text.tokens == "words" else np.arange(len(ids))
                sizes = np.diff(starts, append=len(ids))
                txt = np.add.reduceat(kept, starts, axis=0) / sizes[:, None]
                yield prompt, txt[: self.text.max_tokens], kept[-1] if self.text.pooled == "last" else kept.mean(axis=0)

    def with_towers_at(self, places: Mapping[str, str]) -> "Codec":
        """The same codec with the parts of its text side, such as `language` or `clip`, in other folders."""
        if not places:
            return self
        if not isinstance(self.text, TowersConfig):
            raise UserError(f"The model's text tower is made from a seed; there is no {', '.join(places)} to name a folder for.")
        moved: dict[str, Any] = dict(places)
        return dataclasses.replace(self, text=dataclasses.replace(self.text, **moved))

    def with_text_statistics(self, prompts: Sequence[str]) -> "Codec":
        """This codec with the statistics of its states over `prompts`, which must not all be alike."""
        if not isinstance(self.text, TextConfig):
            raise UserError("text: statistics are for random towers; set measure_text to False with encoders that have weights.")
        _, txts, pooled = zip(*self._states(prompts), strict=True)
        arrays = {"txt": np.concatenate(txts), "pooled": np.stack(pooled)}
        measured = {f"{name}_{what}": getattr(x, what)(axis=0) for name, x in arrays.items() for what in ("mean", "std")}
        if not all(np.all(np.isfinite(v)) and (v.min() > 0 or "mean" in name) for name, v in measured.items()):
            raise UserError(f"text: the states of {len(set(prompts))} different prompts do not vary; more captions are needed.")
        statistics = {name: tuple(round(float(v), 6) for v in values) for name, values in measured.items()}
        return dataclasses.replace(self, text=dataclasses.replace(self.text, statistics=statistics))

    def decode(self, latents: Float[Array, "B T Y X C"]) -> Float[Array, "B T2 H W 3"]:
        """Frames in [-1, 1], not clipped, of scaled latents, as the DiT makes them."""
        frames: Any = VAE(self.vae).apply({"params": self.vae_params}, latents / self.vae.scaling_factor, method="decode")
        return frames

    def decode_tiled(self, latents: Float[Array, "B T Y X C"], tiling: Tiling) -> Float[np.ndarray, "B T2 H W 3"]:
        """What `decode` gives, in tiles: for videos too large to be decoded at once."""
        return decode_tiled(self.vae, self.vae_params, latents / self.vae.scaling_factor, tiling)

    def save(self, folder: Path) -> None:
        convert.write(weights_of(self.vae, self.vae_params), folder / "vae", "diffusers")
        if isinstance(self.text, TowersConfig):
            write_json(folder / "text.json", dataclasses.asdict(self.text))
            _write_states(folder / EMPTY, *self.encode_prompts([""]))
        else:
            write_json(folder / "text.json", self.text.identity())

    def fingerprint(self, folder: Path) -> dict[str, str]:
        """What identifies the codec saved in `folder`, wherever its towers lie."""
        text = sha256_of(folder / "text.json")
        if isinstance(self.text, TowersConfig):
            text = hashlib.sha256(json.dumps(self.text.identity(), sort_keys=True).encode()).hexdigest()
        return {"vae": sha256_of(folder / "vae" / convert.VAE_WEIGHTS), "text": text}


def _write_states(file: Path, states: TextStates) -> None:
    tensors = {"txt": states.txt, "pooled": states.pooled}
    write_safetensors(file, tensors, tensors.values())


def _read_states(file: Path, prompt: str) -> TextStates:
    """Raises `UserError` for a file that is missing or holds anything else."""
    tensors = open_tensors(file).tensors
    if {name: len(tensor.shape) for name, tensor in tensors.items()} != {"txt": 2, "pooled": 1}:
        raise UserError(f"{file} holds no states of a prompt, txt [L, D] and pooled [P].")
    return TextStates(prompt=prompt, **{name: tensor.read() for name, tensor in tensors.items()})


def word_starts(ids: np.ndarray) -> np.ndarray:
    """Where words begin in the byte tokens of a text: at its start, after spaces, and at the end-of-text token."""
    space = ids == ord(" ")
    return np.flatnonzero((~space & np.concatenate([[True], space[:-1]])) | (ids == EOS) | (np.arange(len(ids)) == 0))


def load_codec(folder: Path) -> Codec:
    """The codec in `folder`. Raises `UserError` where there is none or it cannot be read."""
    try:
        text = json.loads((folder / "text.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no codec: text.json is missing. Run data_prep.encode, or give the folder it wrote.") from None
    except ValueError as error:
        raise UserError(f"{folder / 'text.json'} cannot be read: {error}.") from error
    vae, params = convert.load(folder / "vae", component="vae")
    side, empty = text_config(text), None
    if isinstance(side, TowersConfig):
        empty = _read_states(folder / EMPTY, "")
    return Codec(vae, jax.tree.map(jnp.asarray, params), side, empty)
