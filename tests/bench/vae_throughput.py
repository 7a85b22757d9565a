"""Frames per second through the VAE, encoding and decoding, beside diffusers' on the same device, and a 720p clip in tiles on a GPU.

    python -m tests.bench.vae_throughput [--threads 2] [--repeats 5] [--width 32] [--size 17,64,64]

Both have the same random weights and run untiled, in turn, so that what else the machine does falls on both: float32 on CPUs,
bfloat16 on a GPU, where the released widths are taken and 129 frames of 720 x 1280 are then coded in the released tiles, with the
peak of device memory. `--threads` holds for both; the table gives medians, and theirs over ours in time.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = (129, 720, 1280)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vae_throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=32, help="of the first level, on CPUs; a multiple of 8; 128 is the released one")
    parser.add_argument("--size", default="17,64,64", help="frames, height and width of the clip")
    return parser.parse_args()


def interleaved(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other, `repeats` times; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def make_models(width: int, *, gpu: bool) -> tuple[Any, Any, Any]:
    """diffusers' model with random weights, and our config and parameters, read from its files."""
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    from hunyuan_jax import convert

    torch.manual_seed(0)
    widths = (width, 2 * width, 4 * width, 4 * width)
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=widths, norm_num_groups=min(32, width)).eval()
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config, params = convert.load(Path(folder), component="vae")
    if gpu:
        theirs = theirs.to("cuda", torch.bfloat16)
    config = dataclasses.replace(config, dtype="bfloat16" if gpu else "float32")
    return theirs, config, jax.tree.map(lambda x: jnp.asarray(x, config.dtype), params)


def compare(models: tuple[Any, Any, Any], size: tuple[int, int, int], *, repeats: int, gpu: bool) -> None:
    """Prints a line for each way to encode and decode a clip."""
    import jax
    import numpy as np
    import torch

    from hunyuan_jax.models.vae import VAE

    theirs, config, params = models
    rng = np.random.default_rng(0)
    inputs = {"encode": rng.uniform(-1, 1, (1, *size, 3)), "decode": rng.normal(size=(1, *config.latent_shape(*size)))}
    for method, x in inputs.items():
        here = jax.device_put(x.astype(np.float32))
        there = torch.tensor(x).permute(0, 4, 1, 2, 3).contiguous().to(theirs.device, theirs.dtype)

        def run_theirs(method: str = method, there: Any = there) -> None:
            with torch.no_grad():
                getattr(theirs, method)(there)
                if gpu:
                    torch.cuda.synchronize()

        runs = {"diffusers": run_theirs}
        for convolution in ("volume", "planes"):
            vae = VAE(dataclasses.replace(config, convolution=convolution))
            run = jax.jit(lambda p, x, vae=vae, method=method: vae.apply({"params": p}, x, method=method))
            runs[convolution] = lambda run=run, here=here: jax.block_until_ready(run(params, here))
        seconds = interleaved(runs, repeats)
        for name in ("volume", "planes"):
            print(
                f"{method:8}{name:10}{size[0] / seconds[name]:10.2f}{size[0] / seconds['diffusers']:12.2f}"
                f"{seconds['diffusers'] / seconds[name]:9.2f}",
                flush=True,
            )


def code_in_tiles(config: Any, params: Any) -> None:
    """Prints what a 720p clip takes in the released tiles, piece after piece, on one device."""
    import jax
    import numpy as np

    from hunyuan_jax.models.vae_tiling import Tiling, decode_pieces, encode_pieces

    device = jax.local_devices()[0]
    frames = np.zeros((1, *LONG, 3), np.float32)
    latents = np.zeros((1, *config.latent_shape(*LONG)), np.float32)
    for method, pieces, x in (("encode", encode_pieces, frames), ("decode", decode_pieces, latents)):
        for attempt in ("with compiling", "compiled"):
            start = time.perf_counter()
            for piece in pieces(config, params, x, Tiling(), devices=(device,)):
                jax.block_until_ready(piece)
            seconds = time.perf_counter() - start
            print(f"{method} {LONG} in tiles, {attempt}: {seconds:.1f} s, {LONG[0] / seconds:.2f} frames/s", flush=True)
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        print(f"{method} {LONG} in tiles: peak device memory so far {peak / 2**30:.2f} GiB", flush=True)


def main() -> None:
    args = parse()
    # XLA and OpenMP read these when they are loaded, JAX what it may take of a GPU that PyTorch shares.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    import torch

    torch.set_num_threads(args.threads)
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    size = tuple(int(n) for n in args.size.split(","))
    models = make_models(128 if gpu else args.width, gpu=gpu)
    threads = len(os.sched_getaffinity(0))
    print(f"{jax.devices()[0].device_kind}, {threads} threads, {models[1].dtype}, widths {models[1].block_out_channels}, clip {size}")
    print(f"{'':8}{'ours':10}{'frames/s':>10}{'diffusers':>12}{'ratio':>9}")
    compare(models, (size[0], size[1], size[2]), repeats=args.repeats, gpu=gpu)
    if gpu:
        theirs, config, params = models
        theirs.to("cpu")
        torch.cuda.empty_cache()
        code_in_tiles(config, params)


if __name__ == "__main__":
    main()
