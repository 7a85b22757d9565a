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
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import vae as recipe
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.models import critics
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding
from hunyuan_jax.settings import build
from hunyuan_jax.tasks import VAETask
from hunyuan_jax.train import abstract_state
from hunyuan_jax.train_step import EmaConfig, make_step

QUICKLY = {"exec_time_optimization_effort": -1.0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vae_tpu_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="tiling", choices=recipe.STAGES)
    parser.add_argument("--bucket", default="", help="one bucket alone, by its name")
    parser.add_argument("--topology", default="v5p:4x4x8", help="such as v5p:4x4x8, v5e:8x16 or v6e:8x16")
    parser.add_argument("--per-group", type=int, default=1, help="clips on each group of devices that share their rows")
    parser.add_argument("--quick", action="store_true", help="compile without costly optimizations")
    return parser.parse_args()


def compiled_step(config: ConfigDict, bucket: Bucket, mesh: Mesh, *, clips: int, quick: bool = False) -> Any:
    """The step of a config of the recipe on `clips` clips of the bucket, compiled for the mesh's devices."""
    lpips = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), critics.lpips_shapes())
    task = dataclasses.replace(VAETask.from_config(config, None), lpips=lpips)  # type: ignore[arg-type]
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, where="optimizer"))
    whole = batch_sharding(mesh)
    frames = jax.ShapeDtypeStruct((clips, *bucket.shape, 3), jnp.float32, sharding=whole)
    batch = VideoBatch(sample_id=jax.ShapeDtypeStruct((clips,), jnp.uint32, sharding=whole), frames=frames, tiled=bucket.tiled)
    step = make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(0))
    state = abstract_state(task, optimizer, mesh)  # outside the mesh, whose devices can compute nothing
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile(QUICKLY if quick else None)


def main() -> None:
    args = parse()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about
    devices = topologies.get_topology_desc(args.topology, platform="tpu").devices
    config = recipe.get_config(args.part)
    mesh = make_mesh(build(MeshConfig, config.mesh, where="mesh"), devices)
    groups = len(devices) // mesh.shape["sequence"]
    print(f"{args.part} on {len(devices)} devices of {args.topology}, {args.per_group} clips on each {mesh.shape['sequence']}")
    print("| bucket | compiled in | state and batch | temporaries |\n|---|---|---|---|")
    for section in config.data.buckets:
        bucket = build(Bucket, section, where="bucket")
        if args.bucket not in ("", bucket.name):
            continue
        start = time.perf_counter()
        try:
            step = compiled_step(config, bucket, mesh, clips=args.per_group * groups, quick=args.quick)
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
