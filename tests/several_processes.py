"""One of several processes of a run; `test_distributed.py` starts them with `launch.local`.

python -m tests.several_processes WHAT

`share` adds numbers over all devices and reads batches onto meshes; `equal` computes loss and gradients of a model whose tokens and heads
are split over the processes; `mistake` is a command that fails on process 1 with the others in the middle of a sum. Of `stopped` process 1
stands still there, and of `killed` process 0 ends, without a word.
"""

import dataclasses
import functools
import os
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from hunyuan_jax.data import loader, records
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.parallel import distributed, lifeline
from hunyuan_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding
from tests import context_cases

BUCKETS = (Bucket(frames=1, height=8, width=8, batch=4, share=1.0), Bucket(frames=1, height=8, width=8, batch=8, share=1.0))


DAMAGED = {3, 8, 9, 20}


class Numbered:
    """A dataset whose every record holds the number of its row, but for those that are damaged."""

    rows = tuple({"id": str(row)} for row in range(30))

    def read_each(self, rows):
        return [records.DamagedRecord("it is") if row in DAMAGED else self.record(row) for row in rows]

    def record(self, row):
        state = records.TextStates(prompt="", txt=np.zeros((1, 2), np.float32), pooled=np.zeros(2, np.float32))
        made = {"bucket": (1, 8, 8), "fps": 1.0, "source": "", "logvar": np.zeros((1, 1, 1, 1), np.float32), "texts": (state,)}
        return records.Latent(id=str(row), mean=np.full((1, 1, 1, 1), row, np.float32), **made)


def shapes(bucket: Bucket) -> VideoBatch:
    array = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    return VideoBatch(sample_id=None, mean=array((bucket.batch, 1, 1, 1, 1)), txt=array((1, 1, 2)), pooled=array((1, 2)))


def total() -> float:
    """The number of devices, counted by them."""
    mesh = make_mesh(MeshConfig())
    ones = jax.make_array_from_process_local_data(batch_sharding(mesh), np.ones(jax.local_device_count(), np.float32))
    return float(jax.jit(jnp.sum)(ones))


def say(what: str) -> None:
    """A line, in one piece, since all processes write into one pipe."""
    os.write(sys.stdout.fileno(), f"{what}\n".encode())


def share(folder: str) -> None:
    """Whatever mesh they stand on, devices get the rows that the plan has for their place in the batch, or instead of damaged ones."""
    assert total() == jax.device_count() == 4
    crossed = np.asarray(jax.devices()).reshape(2, 1, 2, 1).transpose(2, 1, 0, 3)  # each process has a device in every share
    meshes = [make_mesh(MeshConfig(data=data, fsdp=fsdp, sequence=4 // data // fsdp)) for data, fsdp in ((4, 1), (1, 4), (2, 1), (1, 1))]
    replaced = 0
    for mesh in [*meshes, Mesh(crossed, AXES, axis_types=(AxisType.Auto,) * 4)]:
        schedule = Schedule(0, BUCKETS, (tuple(range(11)), tuple(range(7, 30))))
        config = loader.DataConfig(path="x", kind="Latent", buckets=(), text_length=1)
        how = {"sharding": batch_sharding(mesh), "steps": 4, "workdir": Path(folder), "shapes": shapes}
        for number, batch in enumerate(loader.Loader(config, schedule, Numbered(), **how)):
            plan = schedule.step(number)
            assert batch.mean.shape[0] == len(plan.rows)
            planned = ((row, *schedule.instead(number, slot)) for slot, row in enumerate(plan.rows))
            expected = np.asarray([next(row for row in rows if row not in DAMAGED) for rows in planned])
            replaced += int((expected != plan.rows).sum())
            for shard in batch.mean.addressable_shards:
                np.testing.assert_array_equal(np.ravel(shard.data), expected[shard.index[0]], str(mesh.shape))
    assert replaced > 0
    odd = Schedule(0, (dataclasses.replace(BUCKETS[0], batch=6),), ((0, 1),))
    with pytest.raises(UserError, match="a batch of 6 is split into 4"):
        loader.Loader(config, odd, Numbered(), **(how | {"sharding": batch_sharding(meshes[0])}))
    say(f"process {jax.process_index()} is content")


def equal() -> None:
    """On four devices: of two processes, a ring between pairs that share heads; of four, two pairs that do, with `tensor` between them."""
    assert jax.device_count() == 4
    seed, sizes = {2: (5, (1, 1, 4, 1)), 4: (6, (1, 1, 2, 2))}[jax.process_count()]
    said, error = context_cases.difference(np.random.default_rng(seed), sizes)
    assert error <= context_cases.LIMIT, (said, error)
    say(f"process {jax.process_index()}: {error:.1e}  {said}")


def main(argv: list[str]) -> None:
    what = argv[1]
    lifeline.SILENT_SECONDS = 60 if what == "equal" else 4
    distributed.initialize()
    if what == "equal":
        return equal()
    if what == "share":
        with tempfile.TemporaryDirectory() as folder:
            return share(folder)
    total()
    if (what, jax.process_index()) == ("mistake", 1):
        raise UserError("this is the mistake")
    if (what, jax.process_index()) in (("stopped", 1), ("killed", 0)):
        os.kill(os.getpid(), {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}[what])
    while True:
        total()


if __name__ == "__main__":
    run_command(main)
