"""Prompts to text states through encoders with weights of their own: a language model for tokens, CLIP for one vector of the whole.

    template with the prompt -> tokens, the tail cut off -> language model -> states after the instruction's tokens   txt [L, D]
    the prompt alone -> at most 77 tokens -> CLIP -> the state at the end of the text                                 pooled [P]

Cropping and cutting are the released pipeline's. Only valid tokens are kept, so that what a prompt gives does not depend on padding.
Models and tokenizers are folders as transformers saves them; no code in them is run. Paper section 4.2 ("Text encoder").
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from hunyuan_jax.data.dataset import sha256_of
from hunyuan_jax.data.records import TextStates
from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.models.text_encoders import CLIPText, CLIPTextConfig, Dtype, TextTower, TextTowerConfig, abstract_params
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings, replicated
from hunyuan_jax.templates import RELEASED, Template, released_template
from hunyuan_jax.tensor_files import open_tensors, write_safetensors
from hunyuan_jax.text_weights import clip_text_config, load_clip_text, load_text_tower, text_tower_config

LENGTH_STEP = 64  # tokens are padded to a multiple of this many, so that few programs are compiled
FINGERPRINTED = ("*.safetensors", "*.bin", "*.pt", "*.json", "*.txt", "*.model")  # what decides a folder's states


# The fields of `TowersConfig` that say where something lies; they decide nothing about the states.
PLACES = ("language", "clip", "language_tokenizer", "clip_tokenizer", "template_file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Which encoders, and what the language model is told.

    `language` and `clip` are folders with weights, `language_tokenizer` and `clip_tokenizer` those of their tokenizers, the same where
    empty. `template` is the name of a released one (templates.py), read from `template_file` where that names a file, or a text of your
    own with one `{}` for the prompt. Of a prompt at most `max_tokens` are kept; a released template has its own number, and 0 takes it.
    The last `skip_layers` layers of the language model are left out.

    `width`, `pooled_width` and `fingerprints`, of what the folders hold, are filled in by `resolved`; a config that has them loads no
    other encoders.
    """

    language: str
    clip: str
    language_tokenizer: str = ""
    clip_tokenizer: str = ""
    template: str = "t2v_video"
    template_file: str = ""
    max_tokens: int = 0
    skip_layers: int = 2
    dtype: Dtype = "bfloat16"
    prompts_at_once: int = 16
    width: int = 0
    pooled_width: int = 0
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.language or not self.clip:
            raise UserError("text: language and clip must name the folders of a language model and of CLIP, as transformers saves them.")
        released = self.template in RELEASED
        if not released and (self.template.count("{}") != 1 or self.max_tokens < 1):
            raise UserError(
                f"text: template must be one of {', '.join(RELEASED)}, or a text with exactly one {{}} and max_tokens of at least 1; it is "
                f"{self.template[:200]!r} with {self.max_tokens}."
            )
        if released and self.max_tokens:
            raise UserError(f"text: the template {self.template} has its own number of tokens; leave max_tokens at 0.")
        if self.prompts_at_once < 1:
            raise UserError(f"text: prompts_at_once must be at least 1, not {self.prompts_at_once}.")

    @property
    def kept_tokens(self) -> int:
        """The most tokens that are kept of a prompt."""
        released = RELEASED.get(self.template)
        return self.max_tokens if released is None else released.max_tokens - released.crop_start

    @property
    def folders(self) -> dict[str, Path]:
        """Where each of the four parts lies."""
        return {
            "language": Path(self.language),
            "language_tokenizer": Path(self.language_tokenizer or self.language),
            "clip": Path(self.clip),
            "clip_tokenizer": Path(self.clip_tokenizer or self.clip),
        }

    @property
    def language_config(self) -> TextTowerConfig:
        return text_tower_config(self.language, skip_layers=self.skip_layers, dtype=self.dtype)

    @property
    def clip_config(self) -> CLIPTextConfig:
        return clip_text_config(self.clip, dtype=self.dtype)

    def identity(self) -> dict[str, Any]:
        """What decides the states of a prompt: all but where the parts lie. A released template is checked by hash, so its name will do."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in (*PLACES, "prompts_at_once")}

    def resolved(self) -> "TowersConfig":
        """With sizes and fingerprints of what is there. Raises `UserError` where a folder is missing, or has other contents than before."""
        found = {name: _fingerprint(name, folder) for name, folder in self.folders.items()}
        for name, digest in self.fingerprints.items():
            if found[name] != digest:
                raise UserError(
                    f"text: {self.folders[name]} does not hold the {name.replace('_', ' ')} that was used before (SHA-256 "
                    f"{found[name][:12]}... for {digest[:12]}...). Name the folder with the right one."
                )
        width, pooled_width = self.language_config.width, self.clip_config.width
        return dataclasses.replace(self, fingerprints=found, width=width, pooled_width=pooled_width)

    def said(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return dataclasses.asdict(self)

    @property
    def places(self) -> dict[str, str]:
        """Where the parts lie, by name."""
        return {name: getattr(self, name) for name in PLACES}

    def at(self, places: Mapping[str, str]) -> "TowersConfig":
        """With some of `PLACES` elsewhere. Raises `UserError` for other names."""
        for name in places:
            if name not in PLACES:
                raise UserError(f"text: {name} is no part that lies somewhere. {nearest(name, list(PLACES))}")
        moved: dict[str, Any] = dict(places)
        return dataclasses.replace(self, **moved)

    def with_statistics(self, prompts: Sequence[str]) -> "TowersConfig":
        """Never: raises `UserError`."""
        raise UserError("text: statistics are for random towers; set measure_text to False with encoders that have weights.")

    def load(self, *, kept: Path | None = None) -> "KeptStates | TextTowers":
        """The encoders, on a mesh of this process's devices; with a folder `kept` they are loaded for what is not in it alone.

        Its axes are those of all meshes. Other processes read other prompts, each when it needs them: they have meshes of their own.
        """
        return self._load() if kept is None else KeptStates(self, kept)

    def _load(self) -> "TextTowers":
        return TextTowers(self.resolved(), make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices()))


def _fingerprint(name: str, folder: Path) -> str:
    """A hash of the files that decide what the part in a folder gives."""
    files = sorted({path for pattern in FINGERPRINTED for path in folder.glob(pattern) if path.is_file()}) if folder.is_dir() else [folder]
    if not files or not files[0].exists():
        lacks = f"holds none of {', '.join(FINGERPRINTED)}" if folder.is_dir() else "does not exist"
        raise UserError(
            f"text: the {name.replace('_', ' ')} is missing: {folder.absolute()} {lacks}. "
            "Save it there with save_pretrained of transformers, or name the folder that has it."
        )
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


class TextTowers:
    """Encoders and tokenizers, ready to use on the devices of `mesh`."""

    def __init__(self, config: TowersConfig, mesh: Mesh) -> None:
        self.config, self._mesh = config, mesh
        self._language, self._clip = config.language_config, config.clip_config
        by_path = lambda sizes: traverse_util.flatten_dict(param_shardings(abstract_params(sizes), mesh), sep="/")  # noqa: E731
        how: dict[str, Any] = {"dtype": config.dtype}
        language = load_text_tower(config.language, skip_layers=config.skip_layers, shardings=by_path(self._language), **how)
        self._params = language[1], load_clip_text(config.clip, shardings=by_path(self._clip), **how)[1]
        folders = config.folders
        self._tokenizer = _load_tokenizer(folders["language_tokenizer"])
        self._clip_tokenizer = _load_tokenizer(folders["clip_tokenizer"])
        self.template = self._own_template() if config.template not in RELEASED else self._released_template()

    def _released_template(self) -> Template:
        file = Path(self.config.template_file) if self.config.template_file else None
        return released_template(self.config.template, file=file)

    def _own_template(self) -> Template:
        """What is cut off are the tokens that end before the prompt; a space before it may be a part of its first token."""
        before = self.config.template.split("{}")[0].rstrip()
        offsets = self._tokenizer(self.config.template.replace("{}", "a"), return_offsets_mapping=True)["offset_mapping"]
        crop = next(n for n, (_, end) in enumerate(offsets) if end > len(before))
        return Template(text=self.config.template, crop_start=crop, max_tokens=crop + self.config.max_tokens)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """What the language model reads: the template with each prompt, at most its number of tokens, without padding."""
        before, after = self.template.text.split("{}")
        texts = [before + prompt + after for prompt in prompts]
        return list(self._tokenizer(texts, truncation=True, max_length=self.template.max_tokens)["input_ids"])

    def tokenize_for_clip(self, prompts: Sequence[str]) -> np.ndarray:
        """What CLIP reads: tokens [B, max_positions], padded as its tokenizer pads."""
        length = self._clip.max_positions
        tokens = self._clip_tokenizer(list(prompts), truncation=True, max_length=length, padding="max_length")["input_ids"]
        return np.asarray(tokens, np.int32)

    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """The text states of prompts, in bfloat16: valid tokens after the template's instruction, and CLIP's vector.

        A prompt is padded by its own length alone, so that what it gives does not depend on the prompts beside it.
        """
        out: dict[int, TextStates] = {}
        tokens = self.tokenize(prompts)
        lengths = [-(-len(text) // LENGTH_STEP) * LENGTH_STEP for text in tokens]
        at_once = -(-self.config.prompts_at_once // self._mesh.size) * self._mesh.size  # split over all devices
        for length in sorted(set(lengths)):
            alike = [n for n in range(len(prompts)) if lengths[n] == length]
            for start in range(0, len(alike), at_once):
                numbers = alike[start : start + at_once]
                filled = numbers + [numbers[-1]] * (at_once - len(numbers))  # one number of prompts, one compilation
                txt, pooled = self._states([tokens[n] for n in filled], self.tokenize_for_clip([prompts[n] for n in filled]), length)
                for row, n in enumerate(numbers):
                    kept, vector = txt[row, self.template.crop_start : len(tokens[n])], pooled[row]
                    out[n] = TextStates(prompt=prompts[n], txt=kept.astype(ml_dtypes.bfloat16), pooled=vector.astype(ml_dtypes.bfloat16))
        return [out[n] for n in range(len(prompts))]

    def _states(self, tokens: Sequence[Sequence[int]], clip_tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """States in float32 of tokens padded to `length`, and CLIP's vectors."""
        ids, mask = np.zeros((len(tokens), length), np.int32), np.zeros((len(tokens), length), bool)
        for row, text in enumerate(tokens):
            ids[row, : len(text)], mask[row, : len(text)] = text, True
        with jax.set_mesh(self._mesh):  # whatever mesh the caller works on
            states = self._run(self._params, *jax.device_put((ids, mask, clip_tokens), batch_sharding(self._mesh)))
        return np.asarray(states[0], np.float32), np.asarray(states[1], np.float32)

    @functools.cached_property
    def _run(self) -> Any:
        def run(params: Any, ids: jax.Array, mask: jax.Array, clip_tokens: jax.Array) -> tuple[Any, Any]:
            txt: Any = TextTower(self._language).apply({"params": params[0]}, ids, mask)
            clip: Any = CLIPText(self._clip).apply({"params": params[1]}, clip_tokens)
            return txt, clip[1]

        return jax.jit(run, out_shardings=replicated(self._mesh))


@dataclasses.dataclass(frozen=True)
class KeptStates:
    """The encoders of a resolved config, behind a folder with the states of the prompts that they have seen."""

    config: TowersConfig
    folder: Path

    @functools.cached_property
    def _towers(self) -> TextTowers:
        return self.config._load()

    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """Text states as `TextTowers` gives them. Those that are not in the folder, or cannot be read, are put there."""
        said = json.dumps(self.config.identity(), sort_keys=True)
        files = {p: self.folder / f"{hashlib.sha256(f'{said} {p}'.encode()).hexdigest()}.safetensors" for p in prompts}
        found = {}
        for prompt, file in files.items():
            with contextlib.suppress(UserError):
                found[prompt] = read_states(file, prompt)
        missing = [prompt for prompt in files if prompt not in found]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            for states in self._towers.encode(missing):
                write_states(files[states.prompt], states)
                found[states.prompt] = states
        return [found[prompt] for prompt in prompts]


def write_states(file: Path, states: TextStates) -> None:
    """A prompt's states as safetensors, txt [L, D] and pooled [P], whole or not at all."""
    tensors = {"txt": states.txt, "pooled": states.pooled}
    write_safetensors(file, tensors, tensors.values())


def read_states(file: Path, prompt: str) -> TextStates:
    """What `write_states` wrote. Raises `UserError` for a file that is missing or holds anything else."""
    tensors = open_tensors(file).tensors
    if {name: len(tensor.shape) for name, tensor in tensors.items()} != {"txt": 2, "pooled": 1}:
        raise UserError(f"{file} holds no states of a prompt, txt [L, D] and pooled [P].")
    return TextStates(prompt=prompt, **{name: tensor.read() for name, tensor in tensors.items()})


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # importing it takes seconds, and training needs no tokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"text: no tokenizer can be read from {folder.absolute()} (tokenizer.json and tokenizer_config.json were looked for): "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
