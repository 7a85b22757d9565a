"""What a TPU holds in the VAE's whole training step (VAE, critic, LPIPS, both optimizers), by its own compiler, without a TPU.

    pip install libtpu==0.0.42.1
    python -m tests.bench.vae_tpu_memory [--part tiling] [--bucket 65x512x512] [--topology v5p:4x4x8] [--per-group 1]

The step of `configs/vae.py:PART` is compiled for the buckets of the part and every device of the topology, on the config's mesh, with
`--per-group` clips on each group of devices that share a clip's rows. Arguments are the training state and the batch; temporaries
come on top. A bucket in tiles has a program of each of their shapes: compiling `65x512x512-tiled` takes more than 20 GiB of host memory.
`--quick` compiles in a fraction of the time, without the passes that save memory: an upper bound. LPIPS has weights of 0.
"""

import argparse
import dataclasses
import time

import jax

from configs import vae as recipe
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.parallel.mesh import MeshConfig, axis_sizes
from hunyuan_jax.plan import QUICKLY, compile_step, target
from hunyuan_jax.settings import build


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vae_tpu_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="tiling", choices=recipe.STAGES)
    parser.add_argument("--bucket", default="", help="one bucket alone, by its name")
    parser.add_argument("--topology", default="v5p:4x4x8", help="such as v5p:4x4x8, v5e:8x16 or v6e:8x16")
    parser.add_argument("--per-group", type=int, default=1, help="clips on each group of devices that share their rows")
    parser.add_argument("--quick", action="store_true", help="compile without costly optimizations")
    return parser.parse_args()


def main() -> None:
    args = parse()
    jax.config.update("jax_platforms", "cpu")
    _, devices = target(args.topology)
    config = recipe.get_config(args.part)
    sequence = axis_sizes(build(MeshConfig, config.mesh, where="mesh"), len(devices))["sequence"]
    groups = len(devices) // sequence
    print(f"{args.part} on {len(devices)} devices of {args.topology}, {args.per_group} clips on each {sequence}")
    print("| bucket | compiled in | state and batch | temporaries |\n|---|---|---|---|")
    for section in config.data.buckets:
        bucket = build(Bucket, section, where="bucket")
        if args.bucket not in ("", bucket.name):
            continue
        start = time.perf_counter()
        try:
            step = compile_step(
                config, dataclasses.replace(bucket, batch=args.per_group * groups), devices, more=QUICKLY if args.quick else {}
            )
        except jax.errors.JaxRuntimeError as error:
            print(
                f"| {bucket.name} | {time.perf_counter() - start:.0f} s | does not fit: {str(error).splitlines()[0][:200]} | |", flush=True
            )
            continue
        memory = step.memory_analysis()
        sizes = " | ".join(f"{size / 2**30:.2f} GiB" for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        print(f"| {bucket.name} | {time.perf_counter() - start:.0f} s | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
