"""Peak memory and time of converting a file of the full model: 13 billion parameters in bfloat16, all zero, 25.6 GB.

python -m tests.bench.convert_memory --folder DIR [--source safetensors|pt] [--to diffusers] [--width 3072]

The source is made first: a safetensors file that is sparse on disk, or the .pt file that `torch.save` writes. DIR needs room for
what is written, and for a .pt file; all is removed at the end. The bound is four times the largest tensor and 2 GiB.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from hunyuan_jax.models.dit import RELEASED, DiTConfig
from hunyuan_jax.models.layouts import LAYOUTS, places

ROOT = Path(__file__).resolve().parents[2]


def full_model(width: int) -> DiTConfig:
    """The released model, or one as deep and of another width."""
    return dataclasses.replace(RELEASED, width=width, num_heads=width // 128)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros under a true header; only the header takes room."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_pt(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    # Zeros that nobody has written to take no memory.
    tensors = {name: torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16) for name, shape in shapes.items()}
    torch.save({"module": tensors}, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.convert_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--source", choices=["safetensors", "pt"], default="safetensors")
    parser.add_argument("--to", choices=LAYOUTS, default="diffusers")
    parser.add_argument("--width", type=int, default=3072)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: place.shape for name, place in places(full_model(args.width)).items()}
    source, target = args.folder / f"model.{args.source}", args.folder / "converted"
    try:
        {"safetensors": write_safetensors, "pt": write_pt}[args.source](source, shapes)
        command = [sys.executable, "-m", "hunyuan_jax.convert", "--src", str(source), "--dst", str(target), "--to", args.to]
        start, peak = time.monotonic(), 0
        process = psutil.Popen(command, cwd=ROOT)
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        if process.wait():
            return 1
        sizes = [2 * math.prod(shape) for shape in shapes.values()]
        seconds, bound = time.monotonic() - start, 4 * max(sizes) + 2 * 2**30
        print(
            f"{args.source} to {args.to}: {len(sizes)} tensors, {sum(sizes) / 1e9:.1f} GB, {seconds:.0f} s, "
            f"{sum(sizes) / 1e6 / seconds:.0f} MB/s; peak memory {peak / 2**30:.2f} GiB, bound {bound / 2**30:.2f} GiB"
        )
        return 0 if peak <= bound else 1
    finally:
        source.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
