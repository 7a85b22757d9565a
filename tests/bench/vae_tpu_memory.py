"""What a TPU holds in the VAE's whole training step (VAE, critic, LPIPS, both optimizers), by its own compiler, without a TPU.

    pip install libtpu==0.0.42.1
    python -m tests.bench.vae_tpu_memory [--part tiling] [--topology v5p:4x4x2] [--per-device 1]

The step of `configs/vae.py:PART` is compiled for every bucket of the part and every device of the topology, parameters split as
the config says, with `--per-device` clips on each device. Arguments are the training state and the batch; temporaries come on top.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from configs import vae as recipe
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.models import critics
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import AXES
from hunyuan_jax.parallel.sharding import batch_sharding
from hunyuan_jax.settings import build
from hunyuan_jax.tasks import VAETask
from hunyuan_jax.train import abstract_state
from hunyuan_jax.train_step import EmaConfig, make_step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vae_tpu_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="tiling", choices=recipe.STAGES)
    parser.add_argument("--topology", default="v5p:4x4x2", help="such as v5p:4x4x2, v5e:4x8 or v6e:4x8")
    parser.add_argument("--per-device", type=int, default=1, help="clips on each device")
    return parser.parse_args()


def compiled_step(task: VAETask, bucket: Bucket, mesh: Mesh, *, optimizer: Any, clips: int) -> Any:
    """The step on `clips` clips of the bucket, compiled for the mesh's devices."""
    whole = batch_sharding(mesh)
    frames = jax.ShapeDtypeStruct((clips, *bucket.shape, 3), jnp.float32, sharding=whole)
    batch = VideoBatch(sample_id=jax.ShapeDtypeStruct((clips,), jnp.uint32, sharding=whole), frames=frames, tiled=bucket.tiled)
    step = make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(0))
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(abstract_state(task, optimizer, mesh), batch).compile()


def main() -> None:
    args = parse()
    devices = topologies.get_topology_desc(args.topology, platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config = recipe.get_config(args.part)
    lpips = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), critics.lpips_shapes())
    task = dataclasses.replace(VAETask.from_config(config, None), lpips=lpips)  # type: ignore[arg-type]
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, where="optimizer"))
    print(f"{args.part} on {len(devices)} devices of {args.topology}, {args.per_device} clips on each")
    print("| bucket | compiled in | state and batch | temporaries |\n|---|---|---|---|")
    for section in config.data.buckets:
        bucket = build(Bucket, section, where="bucket")
        start = time.perf_counter()
        try:
            step = compiled_step(task, bucket, mesh, optimizer=optimizer, clips=args.per_device * len(devices))
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
