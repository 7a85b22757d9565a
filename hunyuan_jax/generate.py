"""Prompts to videos: `python -m hunyuan_jax.generate --checkpoint DIR --prompt "a red circle moving left" --output DIR`.

Reads the averaged weights, the codec and the sampling settings from the folder of a training run. `--prompts FILE` takes a text
file with a prompt a line, or a `.jsonl` file with `{"prompt": ...}` or a structured `{"caption": {...}}` a line, whose other fields are
kept in the index. The noise of a video comes from the seed and the prompt's number alone, so any part of a list gives the same
videos as the whole. The text encoders are those that the run's codec names; flags say where they lie on this machine.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from hunyuan_jax.checkpoint import Kept, load_params, read_model
from hunyuan_jax.codec import load_codec
from hunyuan_jax.data.captions import Caption, clean_text
from hunyuan_jax.data.dataset import write_json
from hunyuan_jax.data.prompts import full_prompt
from hunyuan_jax.data.transforms import pad_texts, to_uint8
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.vae_tiling import Tiling
from hunyuan_jax.sampling import SamplingConfig
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.tasks.t2v import T2VLossConfig, T2VTask, Text, encode_texts
from hunyuan_jax.text_towers import PLACES
from hunyuan_jax.video_io import write_video

MAX_PROMPT_CHARACTERS = 4000
MAX_PROMPTS = 100_000


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model as generation needs it."""

    task: T2VTask
    params: Any
    step: int
    video: dict[str, Any]  # frames, height, width and fps it was trained on


def load_model(workdir: Path, *, weights: Kept = "ema", places: Mapping[str, str] | None = None, kept_states: Path | None = None) -> Model:
    """The model in a training run's folder; `places` says where text encoders lie that are not where they were.

    `kept_states` is a folder where their states are kept, and found again without them.
    Raises `UserError` where there is none, or where it is of another task.
    """
    said = read_model(workdir)
    if said.get("task") != "t2v":
        raise UserError(f"{workdir} is a run of task {said.get('task')!r}; generation needs a run of task 't2v'.")
    codec = load_codec(workdir / "codec")
    fingerprint = codec.fingerprint(workdir / "codec")
    if fingerprint != said["codec"]:
        raise UserError(f"The codec in {workdir / 'codec'} is not the one the model was trained with; copy it from the latents again.")
    codec = dataclasses.replace(codec, text=codec.text.at(places or {}), kept_states=kept_states)
    task = T2VTask(
        model=build(DiTConfig, said["model"], where="model"),
        prediction=said.get("prediction", "velocity"),  # what runs predicted before they said so
        loss_config=T2VLossConfig(),
        sampling=build(SamplingConfig, said["sampling"], where="sampling"),
        codec=codec,
        codec_fingerprint=fingerprint,
        null=encode_texts(codec, [""], length=said["text_length"]),
        video=said["video"],
    )
    params, step = load_params(workdir, jax.eval_shape(lambda: task.init(jax.random.key(0))), weights=weights)
    return Model(task, params, step, said["video"])


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts from a file, as dicts with "prompt". Raises `UserError` naming the line that cannot be used."""
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"The prompt file {path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_read_prompt(line, where=f"{path}, line {number}", as_json=path.suffix == ".jsonl"))
    if not rows or len(rows) > MAX_PROMPTS:
        raise UserError(f"The prompt file {path} holds {len(rows)} prompts; between 1 and {MAX_PROMPTS} are expected.")
    return rows


def _read_prompt(line: str, *, where: str, as_json: bool) -> dict[str, Any]:
    row: Any = {"prompt": line}
    if as_json:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: a JSON object was expected ({error}).") from error
    if isinstance(row, dict) and "prompt" not in row and "caption" in row:
        try:
            caption = Caption.from_json(row["caption"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        row["prompt"] = full_prompt(caption)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: an object with a "prompt" text or a "caption" object was expected.')
    if len(row["prompt"]) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"{where}: the prompt has {len(row['prompt'])} characters; at most {MAX_PROMPT_CHARACTERS} are allowed.")
    return {**row, "prompt": clean_text(row["prompt"])}


def check_guidance(model: DiTConfig, asked: Collection[str], sampling: SamplingConfig, *, twice: bool) -> None:
    """Raises `UserError` where a model would be guided in a way that it was not trained for."""
    if model.guidance_embed and sampling.cfg_scale != 1.0 and not twice:
        raise UserError(
            f"The model is guidance-distilled: guidance is built in, and cfg_scale {sampling.cfg_scale} would guide it a second time, at "
            "twice the cost. Leave --cfg_scale at 1 and set the scale with --guidance, or add --guide_twice if that is what you want."
        )
    if "guidance" in asked and not model.guidance_embed:
        raise UserError("The model takes no guidance scale as an input (it is not guidance-distilled). Use --cfg_scale.")


def noise_for(numbers: Sequence[int], shape: tuple[int, ...], *, seed: int) -> jax.Array:
    """Standard normal noise for prompts by their numbers."""
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(jnp.asarray(numbers, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig,
    seed: int,
    batch: int,
    size: tuple[int, int, int],
    tiling: Tiling | None = None,
) -> Any:
    """Yields uint8 frames [T, H, W, 3] for each prompt, in order.

    `size` is frames, height, width. Latents are decoded in tiles where `tiling` says how, at once where it is None.
    """
    task = model.task
    made = task.sample if tiling is None else task.sample_latents
    shape = task.codec.vae.latent_shape(*size)
    texts = task.codec.encode_prompts(prompts)
    sample = jax.jit(lambda params, text, noise: made(params, Text(*text), noise, sampling=sampling))
    for start in range(0, len(prompts), batch):
        numbers = list(range(start, min(start + batch, len(prompts))))
        filled = numbers + [numbers[-1]] * (batch - len(numbers))  # one shape, one compilation
        text = pad_texts([texts[n] for n in filled], length=task.null.txt.shape[1])
        drawn = sample(model.params, text, noise_for(filled, shape, seed=seed))
        frames = drawn if tiling is None else task.codec.decode_tiled(drawn[: len(numbers)], tiling)
        yield from to_uint8(np.asarray(frames))[: len(numbers)]


def file_name(number: int, prompt: str) -> str:
    """A plain file name: the prompt's number and its letters and digits."""
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in prompt.lower())
    return f"{number:04d}-{'-'.join(word for word in words.split('-') if word)[:60] or 'empty'}.mp4"


def main(argv: list[str]) -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a training run (its --workdir).")
    flags.DEFINE_string("prompt", None, "One prompt.")
    flags.DEFINE_string("prompts", None, "A file of prompts: text, or .jsonl with a prompt field.")
    flags.DEFINE_string("output", None, "Folder for the videos and index.json.")
    flags.DEFINE_enum("weights", "ema", get_args(Kept), "The averaged weights, or the last ones.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_integer("batch", 16, "Prompts sampled at once.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Euler steps; the run's own where not given.")
    flags.DEFINE_float("shift", None, "Shift of the sampling times.")
    flags.DEFINE_float("cfg_scale", None, "Strength of two-pass guidance; 1 is a single pass.")
    flags.DEFINE_float("guidance", None, "The scale that a guidance-distilled model takes as an input.")
    flags.DEFINE_bool("guide_twice", False, "Allow two-pass guidance of a guidance-distilled model.")
    flags.DEFINE_float("vae_memory_gib", None, "Decode in the largest tiles that need no more of a device's memory.", lower_bound=0.0)
    flags.DEFINE_string("text_cache", _text_cache(), "Folder where states of prompts are kept; empty keeps none.")
    for place in PLACES:
        flags.DEFINE_string(place, None, "Where it lies, if not where it was when clips were encoded.")
    flags.DEFINE_list("size", None, "frames,height,width; those of training where not given.")
    parse_flags(argv, required=("checkpoint", "output"))
    f = flags.FLAGS
    if (f.prompt is None) == (f.prompts is None):
        raise UserError("Give either --prompt or --prompts.")
    rows = read_prompts(Path(f.prompts)) if f.prompts else [_read_prompt(f.prompt, where="--prompt", as_json=False)]
    places = {name: getattr(f, name) for name in PLACES if getattr(f, name) is not None}
    model = load_model(Path(f.checkpoint), weights=f.weights, places=places, kept_states=Path(f.text_cache) if f.text_cache else None)
    changed = {name: getattr(f, name) for name in ("steps", "shift", "cfg_scale", "guidance") if getattr(f, name) is not None}
    sampling = dataclasses.replace(model.task.sampling, **changed)
    check_guidance(model.task.model, changed, sampling, twice=f.guide_twice)
    size = _parse_size(f.size) if f.size else (model.video["frames"], model.video["height"], model.video["width"])

    tiling = None
    if f.vae_memory_gib is not None:
        tiling = Tiling.within(int(f.vae_memory_gib * 2**30), model.task.codec.vae)
        print(f"generate: decoding in tiles of {tiling.tile[0]} frames, {tiling.tile[1]} x {tiling.tile[2]}")

    output = Path(f.output)
    output.mkdir(parents=True, exist_ok=True)
    print(f"generate: {len(rows)} videos of {size[0]} frames, {size[1]} x {size[2]}, from step {model.step}, {sampling.steps} Euler steps")
    how: dict[str, Any] = {"sampling": sampling, "seed": f.seed, "batch": min(f.batch, len(rows)), "size": size, "tiling": tiling}
    videos = generate(model, [row["prompt"] for row in rows], **how)
    index = []
    for number, (row, frames) in enumerate(zip(rows, tqdm(videos, total=len(rows), unit="video", dynamic_ncols=True), strict=True)):
        name = file_name(number, row["prompt"])
        write_video(output / name, frames, fps=model.video["fps"], crf=12)
        index.append({**row, "file": name})
    write_json(output / "index.json", index)


def _text_cache() -> str:
    """Where programs of a user keep what can be made again."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hunyuan_jax" / "text_states")


def _parse_size(given: Sequence[str]) -> tuple[int, int, int]:
    try:
        frames, height, width = (int(part) for part in given)
    except ValueError:
        raise UserError(f"--size needs frames,height,width, such as 9,64,64, not {','.join(given)}.") from None
    return frames, height, width


if __name__ == "__main__":
    run_command(main)
