"""What a trained model is worth: held-out flow loss by time, VAE PSNR, and what a detector reads in generated videos.

    python -m hunyuan_jax.evaluate --checkpoint T2V --latents DIR --clips DIR --videos DIR --output FILE

The detector (`detect_shape`) reads colour, shape and on-screen direction back from frames of the shapes world; a reading counts
as right where it equals the field of the prompt's entry in the videos' index. Prompts are told apart by `seen`: whether their
combination of colour, shape and direction occurs in training at all.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import open_dataset, write_json
from hunyuan_jax.data.loader import DataConfig, held_out_batches
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.generate import Model, load_model
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.settings import parse_flags
from hunyuan_jax.shape_detector import detect_shape
from hunyuan_jax.tasks.vae import psnr_db
from hunyuan_jax.video_io import read_video

TIMES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
READINGS = ("colour", "shape", "direction")


def vae_psnr(vae: tuple[VAEConfig, Any], clips_folder: Path, *, video: Mapping[str, Any], held_out: float, limit: int) -> float:
    """Mean PSNR in dB of held-out clips through the posterior's mean and the decoder, in the shape that `video` names."""
    bucket = Bucket(frames=video["frames"], height=video["height"], width=video["width"], batch=8, intervals=(video["interval"],))
    clips = open_dataset(clips_folder, kind="Clip")
    config = DataConfig(path=str(clips_folder), kind="Clip", buckets=(), held_out=held_out)

    @jax.jit
    def score(params: Any, frames: jax.Array) -> jax.Array:
        copy: Any = VAE(vae[0]).apply({"params": params}, frames)
        return psnr_db(copy, frames)

    batches = held_out_batches(config, clips, bucket, limit=limit)
    if not batches:
        raise UserError(f"No held-out clip in {clips_folder} fits {bucket.name}; curate more clips, or raise --held_out.")
    return float(np.mean(np.concatenate([np.asarray(score(vae[1], batch.frames)) for batch in batches])))


def flow_loss_by_time(model: Model, latents_folder: Path, *, held_out: float, limit: int) -> list[dict[str, float]]:
    """The flow loss of held-out video latents at fixed times, with fixed noise."""
    video = model.video
    bucket = Bucket(frames=video["frames"], height=video["height"], width=video["width"], batch=16)
    latents = open_dataset(latents_folder, kind="Latent")
    config = DataConfig(path=str(latents_folder), kind="Latent", buckets=(), held_out=held_out, text_length=model.task.null.txt.shape[1])
    batches = held_out_batches(config, latents, bucket, limit=limit, encode=model.task.encode_prompts, shapes=model.task.batch_shapes)
    if not batches:
        raise UserError(f"No held-out latents in {latents_folder} of {bucket.name}.")
    score = jax.jit(lambda params, batch, t: model.task.flow_loss_at(params, batch, t, key=jax.random.key(0)))
    rows = []
    for t in tqdm(TIMES, unit="time", desc="flow loss", dynamic_ncols=True):
        losses = np.concatenate([np.asarray(score(model.params, batch, t)) for batch in batches])
        rows.append({"t": t, "loss": float(np.mean(losses))})
    return rows


def read_videos(folder: Path) -> list[dict[str, Any]]:
    """What the detector reads in each video of a folder that `generate` wrote, beside what its prompt asked for."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no generated videos: index.json cannot be read ({error}). Run hunyuan_jax.generate first."
        ) from error
    rows = []
    for entry in tqdm(index, unit="video", desc="detect", dynamic_ncols=True):
        reading = detect_shape(read_video(folder / Path(entry["file"]).name).frames)
        rows.append(
            {
                "file": entry["file"],
                "prompt": entry["prompt"],
                "seen": bool(entry.get("seen", True)),
                "expected": {name: entry.get(name) for name in READINGS},
                "read": {name: getattr(reading, name) for name in READINGS},
            }
        )
    return rows


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The fraction of videos in which each reading is what the prompt asked for."""
    return {name: float(np.mean([row["read"][name] == row["expected"][name] for row in rows])) for name in READINGS}


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy over all videos, over combinations seen in training and over unseen ones; an empty group is left out."""
    groups = {"all": list(rows), "seen": [r for r in rows if r["seen"]], "unseen": [r for r in rows if not r["seen"]]}
    return {name: accuracy(group) for name, group in groups.items() if group}


def main(argv: list[str]) -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a t2v training run.")
    flags.DEFINE_string("latents", None, "Its latents.")
    flags.DEFINE_string("clips", None, "The clips they were encoded from.")
    flags.DEFINE_string("videos", None, "Videos that generate wrote for prompts of the shapes world; left out, none are read.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_float("held_out", 0.05, "The fraction of source files that training kept out (data.held_out).")
    flags.DEFINE_integer("limit", 64, "Held-out clips at the most.", lower_bound=1)
    parse_flags(argv, required=("checkpoint", "latents", "clips", "output"))
    f = flags.FLAGS
    model = load_model(Path(f.checkpoint))
    vae = (model.task.codec.vae, model.task.codec.vae_params)
    figures: dict[str, Any] = {
        "vae_psnr_db": vae_psnr(vae, Path(f.clips), video=model.video, held_out=f.held_out, limit=f.limit),
        "flow_loss_by_time": flow_loss_by_time(model, Path(f.latents), held_out=f.held_out, limit=f.limit),
    }
    if f.videos:
        rows = read_videos(Path(f.videos))
        figures |= {"accuracy": accuracy_table(rows), "videos": rows}
    write_json(Path(f.output), figures)
    print(f"VAE on held-out clips: {figures['vae_psnr_db']:.2f} dB")
    print("flow loss by time: " + "  ".join(f"{row['t']:.2f}: {row['loss']:.3f}" for row in figures["flow_loss_by_time"]))
    for name, values in figures.get("accuracy", {}).items():
        print(f"{name:7s}" + "  ".join(f"{reading} {100 * value:.1f} %" for reading, value in values.items()))


if __name__ == "__main__":
    run_command(main)
