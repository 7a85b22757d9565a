"""A run that goes on upon other devices: `python -m tests.mesh_restores [MESH ...]`, on 1 to 8 simulated devices and 1 or 2 processes.

A small DiT is trained on one mesh and saved, and goes on upon the next: parameters, optimizer and averages must be the same to the bit, the
loss of the step after within LIMIT of what it would have been where it was saved, and the samples of the steps after the same ones.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from hunyuan_jax.checkpoint import Checkpoints
from hunyuan_jax.data import loader
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import open_dataset
from hunyuan_jax.errors import run_command
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel import distributed
from hunyuan_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding
from hunyuan_jax.settings import build
from hunyuan_jax.tasks import make_task
from hunyuan_jax.train import abstract_state, make_state
from hunyuan_jax.train_step import EmaConfig, make_step
from tests.commands import ROOT
from tests.tiny_trainings import differing_bits, tiny_config, write_data

LIMIT = 1e-6  # of a loss, relative
BATCH, STEPS, AHEAD = 8, 100, 3
# Data x fsdp x sequence x tensor, and after a slash of how many processes. Each reads what the one before it has saved.
MESHES = (
    "1x1x1x1", "2x1x1x1", "1x2x1x1", "1x1x2x1", "1x1x1x2", "2x2x1x1", "1x1x2x2", "8x1x1x1", "1x8x1x1", "2x2x2x1", "1x2x2x2",
    "1x2x1x1/2", "1x1x1x1", "2x1x1x1/2", "1x2x1x2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """What a mesh made of the checkpoint of the one before it: bits and samples that differ, and the error of the next loss."""

    bits: int = 0
    samples: int = 0
    error: float = 0.0

    @property
    def good(self) -> bool:
        return not self.bits and not self.samples and self.error <= LIMIT


def visit(folder: Path, name: str) -> Found | None:
    """Goes on upon a mesh from the checkpoint in `folder`, compares, and saves two steps later; None where there was none.

    Beside the checkpoint lies what it must be: all arrays as they were on the devices, the samples of the next steps and the next loss.
    """
    sizes = tuple(int(size) for size in name.split("x"))
    config = tiny_config("t2v", folder / "data", batch=BATCH)
    config.model.dtype, config.optimizer.kind = "float32", "adamw"
    dataset = open_dataset(config.data.path, kind="Latent")
    data = build(loader.DataConfig, config.data, where="data")
    buckets = [build(Bucket, bucket, where="data.buckets") for bucket in data.buckets]
    schedule = loader.training_schedule(data, dataset, buckets=buckets, seed=config.seed)
    task, optimizer = make_task(config, dataset), make_optimizer(build(OptimizerConfig, config.optimizer, where="optimizer"))
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))), jax.devices()[: int(np.prod(sizes))])
    step = jax.jit(make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(1)))
    batches = loader.Loader(data, schedule, dataset, sharding=batch_sharding(mesh), steps=STEPS, workdir=folder, shapes=task.batch_shapes)
    checkpoints, found, expected = Checkpoints(folder), None, folder / "expected"
    with jax.set_mesh(mesh):
        newest = checkpoints.newest_sound()
        if newest is None:
            state = make_state(task, optimizer, key=jax.random.key(0), mesh=mesh)
        else:
            state, position = checkpoints.restore(newest, abstract_state(task, optimizer, mesh))
            batches.restore(position)
            arrays, said = np.load(f"{expected}-{newest}.npz"), json.loads(Path(f"{expected}-{newest}.json").read_text())
            bits = differing_bits(dict(arrays), whole(state))
        state, values = step(state, next(batches))
        if newest is not None:
            loss = float(values["loss"])
            error = abs(loss - said["loss"]) / abs(said["loss"])
            found = Found(bits, int(np.sum(np.asarray(said["samples"]) != coming(batches, before=1))), error)
        state, _ = step(state, next(batches))
        saved = int(state.step)
        checkpoints.save(saved, state, data=batches.state())
        checkpoints.close()
        arrays, samples = whole(state), coming(batches, before=0)
        _, values = step(state, next(batches))
        if jax.process_index() == 0:
            np.savez(f"{expected}-{saved}.npz", **arrays)
            Path(f"{expected}-{saved}.json").write_text(json.dumps({"loss": float(values["loss"]), "samples": samples.tolist()}))
    return found


def whole(state: Any) -> dict[str, np.ndarray]:
    """All arrays of a state, by path, gathered from all devices of all processes."""
    gathered = multihost_utils.process_allgather(state, tiled=True)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(gathered)}


def coming(batches: loader.Loader, *, before: int) -> np.ndarray:
    """The ids of the samples of AHEAD steps, from `before` steps back on; the position stays."""
    position = batches.state()
    batches.restore({"next_index": position["next_index"] - before})
    read = [multihost_utils.process_allgather(next(batches).sample_id, tiled=True) for _ in range(AHEAD)]
    batches.restore(position)
    return np.stack(read)


def visit_in_processes(folder: Path, name: str, count: str) -> Found:
    """The same in processes of their own."""
    member = [sys.executable, "-m", "tests.mesh_restores", "--visit", str(folder), name]
    command = [sys.executable, "-m", "launch.local", "--processes", count, "--", *member]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise SystemExit(f"The processes ended in {done.returncode}: {done.stderr[-3000:]}")
    said = {line for line in done.stdout.splitlines() if line.startswith("{")}
    if len(said) != 1:
        raise SystemExit(f"The processes do not agree: {said}")
    return Found(**json.loads(said.pop()))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mesh_restores", description=__doc__.splitlines()[0])
    parser.add_argument("meshes", nargs="*", default=MESHES, metavar="MESH", help="such as 2x1x1x1, or 2x1x1x1/2 in two processes")
    parser.add_argument("--visit", nargs=2, metavar=("DIR", "MESH"), help=argparse.SUPPRESS)
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = parse(argv)
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")
    if args.visit:
        distributed.initialize()
        folder, name = args.visit
        found = visit(Path(folder), name)
        assert found is not None
        print(json.dumps(dataclasses.asdict(found)), flush=True)
        return
    jax.config.update("jax_num_cpu_devices", 8)
    print("Meshes are data x fsdp x sequence x tensor; /2: in two processes.\n")
    print("| saved on | restored on | differing bits | samples that differ | error of the next loss |\n| --- | --- | --- | --- | --- |")
    before, wrong = "", 0
    with tempfile.TemporaryDirectory(prefix="restores-") as temporary:
        folder = Path(temporary)
        write_data(folder / "data", ["t2v"])
        for mesh in args.meshes:
            name, _, count = mesh.partition("/")
            found = visit_in_processes(folder, name, count) if count else visit(folder, name)
            if found is not None:
                wrong += not found.good
                print(f"| {before} | {mesh} | {found.bits} | {found.samples} | {found.error:.1e} |", flush=True)
            before = mesh
    if wrong:
        raise SystemExit(f"{wrong} of {len(args.meshes) - 1} restored runs are not what was saved (a loss may differ by {LIMIT:.0e})")


if __name__ == "__main__":
    run_command(main)
