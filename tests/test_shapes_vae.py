"""The VAE that the quickstart starts from: small enough to carry, of the released layout, and as good as its figures say."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from data_prep import shapes_world
from hunyuan_jax import convert
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.transforms import fit_to_bucket
from hunyuan_jax.models.vae import VAE
from hunyuan_jax.tasks.vae import psnr_db
from hunyuan_jax.video_io import read_video

FOLDER = Path(__file__).parents[1] / "configs" / "shapes_vae"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> np.ndarray:
    """64 sound shots of a world whose seed no training used, 13 frames of 64 x 64 each."""
    folder = tmp_path_factory.mktemp("raw")
    shapes_world.main(["shapes_world", "--output", str(folder), "--clips", "80", "--seed", "1000", "--workers", "1"])
    bucket, taken = Bucket(frames=13, height=64, width=64, batch=1), []
    for sidecar in sorted(folder.glob("*.json")):
        said = json.loads(sidecar.read_text())
        if "shots" not in said or said.get("defect") or not sidecar.with_suffix(".mp4").exists():
            continue
        video = read_video(sidecar.with_suffix(".mp4"))
        spans = [(round(s["start_seconds"] * video.fps), round(s["end_seconds"] * video.fps)) for s in said["shots"] if not s.get("defect")]
        taken += [fit_to_bucket(video.frames[start:end], bucket) for start, end in spans]
    assert len(taken) >= 48
    return np.stack(taken[:64])


def test_the_carried_vae_is_as_good_as_its_figures_say(clips):
    config, params = convert.load(FOLDER, component="vae")
    frames = jnp.asarray(clips)
    score = jax.jit(lambda params, part: psnr_db(VAE(config).apply({"params": params}, part), part))
    scores = np.concatenate([np.asarray(score(params, part)) for part in jnp.array_split(frames, 8)])
    figures = json.loads((FOLDER / "figures.json").read_text())
    assert scores.mean() == pytest.approx(figures["unseen_world_psnr_db"], abs=0.05)


def test_the_carried_vae_is_small_and_its_log_ends_with_its_figures():
    assert (FOLDER / convert.VAE_WEIGHTS).stat().st_size <= 4e6
    figures = json.loads((FOLDER / "figures.json").read_text())
    for half, steps in figures["steps"].items():
        lines = (FOLDER / half / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(line) for line in lines if "held_out/psnr/9x64x64_db" in line][-1]
        assert last["step"] == steps
    assert last["held_out/psnr/9x64x64_db"] == pytest.approx(figures["held_out_psnr_db"], abs=0.005)


@pytest.mark.parametrize("half", ["first", "finish"])
def test_the_carried_vae_was_trained_as_the_config_says(half):
    said = json.loads((FOLDER / half / "config.json").read_text())
    config = json.loads(json.dumps(quickstart.get_config(f"vae_{half}").to_dict()))
    said["data"].pop("path"), config["data"].pop("path")
    said.pop("start"), config.pop("start")
    assert said == config
