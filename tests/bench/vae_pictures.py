"""What a VAE makes of held-out clips: PSNR and SSIM by source file, and a picture of originals above reconstructions.

    python -m tests.bench.vae_pictures --vae DIR --clips DIR --output FILE.webp [--held-out 0.4] [--sources flower,friday]

Whole frames, 9 of a clip at most `--side` pixels high, through the posterior's mean. `--vae` is a training run or a folder of weights.
The picture shows a clip of each source whose name contains one of `--sources`, its first, middle and last frame.
"""

import argparse
import collections
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data_prep.encode import load_vae
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import is_held_out, open_dataset
from hunyuan_jax.data.transforms import fit_to_bucket, to_uint8
from hunyuan_jax.models.vae import VAE
from hunyuan_jax.tasks.vae import psnr_db, ssim
from hunyuan_jax.video_io import read_video

FRAMES = 9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vae_pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--vae", required=True, type=Path)
    parser.add_argument("--clips", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--held-out", type=float, default=0.4, help="fraction of source files that training did not see")
    parser.add_argument("--side", type=int, default=144, help="height, a multiple of 8; widths follow from the clips")
    parser.add_argument("--sources", default="", help="parts of names of the sources to show, separated by commas; all where empty")
    return parser.parse_args()


def main() -> None:
    args = parse()
    config, params = load_vae(args.vae)
    reconstruct = jax.jit(lambda params, frames: VAE(config).apply({"params": params}, frames))
    clips = open_dataset(args.clips, kind="Clip")
    rows = [n for n, row in enumerate(clips.rows) if is_held_out(row["source"], fraction=args.held_out) and row["num_frames"] >= FRAMES]
    measured = collections.defaultdict(list)
    shown = {}
    for n, clip in zip(rows, clips.read(rows), strict=True):
        row = clips.rows[n]
        width = round(args.side * row["width"] / row["height"] / 8) * 8
        bucket = Bucket(frames=FRAMES, height=args.side, width=width, batch=1)
        frames = jnp.asarray(fit_to_bucket(read_video(clip.video, max_frames=FRAMES).frames, bucket))[None]
        made = reconstruct(params, frames)
        measured[row["source"]].append((float(psnr_db(made, frames)[0]), float(ssim(made, frames)[0])))
        wanted = any(part in row["source"] for part in args.sources.split(","))
        if wanted and row["source"] not in shown:
            picked = [0, FRAMES // 2, FRAMES - 1]
            shown[row["source"]] = [np.concatenate(list(to_uint8(x[0])[picked]), axis=1) for x in (frames, made)]
    print("| held-out source | clips | PSNR | SSIM |\n|---|---|---|---|")
    for source, values in [*sorted(measured.items()), ("all", [v for found in measured.values() for v in found])]:
        psnr, similar = np.mean(values, axis=0)
        print(f"| {source} | {len(values)} | {psnr:.2f} dB | {similar:.3f} |")
    wide = max(line.shape[1] for lines in shown.values() for line in lines)
    lines = [np.pad(line, ((0, 4), (0, wide - line.shape[1]), (0, 0)), constant_values=255) for pair in shown.values() for line in pair]
    Image.fromarray(np.concatenate(lines)).save(args.output, quality=85)


if __name__ == "__main__":
    main()
