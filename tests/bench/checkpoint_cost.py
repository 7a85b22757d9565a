"""What checkpoints cost: how long saving holds up training, how long a save takes in all, and what checking adds.

    python -m tests.bench.checkpoint_cost --millions 100

The state is what AdamW keeps for so many millions of parameters in float32 (parameters, average, two moments: 16 bytes each). The step it
is compared with only updates these, without a model: the least that any step of that size takes.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from hunyuan_jax import integrity
from hunyuan_jax.checkpoint import Checkpoints, Keep, not_finite
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.train_step import TrainState, average, init_state

LAYERS = 20
EVERY = 500  # steps between two checkpoints, as in most configs


@dataclasses.dataclass(frozen=True)
class Taken:
    """Seconds by the clock, and of all cores; where others use the machine too, the second is the one to compare."""

    clock: float
    cores: float


def seconds_of(call: Callable[[], Any]) -> tuple[Taken, Any]:
    clock, cores = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(call())
    return Taken(time.perf_counter() - clock, time.process_time() - cores), found


def cost_of_checkpoints(state: TrainState, folder: Path | None) -> tuple[dict[str, Taken], int]:
    """What saving and restoring a state below `folder` take, by name, and the bytes on disk; None is a temporary folder."""
    not_finite(state)
    taken = {"finite": seconds_of(lambda: not_finite(state))[0]}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        checkpoints = Checkpoints(Path(inside), keep=Keep(last=2))
        checkpoints.save(1, state, data={})
        checkpoints.wait()
        taken["held"], _ = seconds_of(lambda: checkpoints.save(2, state, data={}))
        taken["rest"], _ = seconds_of(checkpoints.wait)
        where = Path(inside) / "checkpoints" / "2"
        taken["written"], _ = seconds_of(lambda: integrity.write_manifest(where, {"step": 2, "planned": True, "metrics": {}}))
        taken["verified"], _ = seconds_of(lambda: integrity.verify(where))
        taken["restored"], _ = seconds_of(lambda: checkpoints.restore(2, abstract)[0])
        on_disk = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
        checkpoints.close()
    return taken, on_disk


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.checkpoint_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=100.0, help="parameters, in millions")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    rows = max(1, round(options.millions * 1e6 / LAYERS / 1024))
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = {f"layer_{n}": {"kernel": jax.random.normal(key, (rows, 1024))} for n, key in enumerate(keys)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3))
    state = jax.jit(lambda params: init_state(params, optimizer))(params)

    def update(state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(state.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(
            step=state.step + 1, params=params, ema=average(state.ema, params, step=state.step, decay=0.99), opt_state=opt_state
        )

    step = jax.jit(update, donate_argnums=0)
    state = step(state)
    taken, state = seconds_of(lambda: step(state))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    costs, on_disk = cost_of_checkpoints(state, options.folder)
    print(f"{options.millions:.0f} million parameters, {size / 1e9:.2f} GB of state, {on_disk / 1e9:.2f} GB on disk, {jax.devices()[0]}")
    print(f"{'':32} {'clock':>9} {'cores':>9} {'of the clock':>14}")
    for name, value in (
        ("an update without a model", taken),
        ("is all of it finite?", costs["finite"]),
        ("a save holds training up for", costs["held"]),
        ("and then goes on behind it for", costs["rest"]),
        ("of which the checksums", costs["written"]),
        ("verifying before a restore", costs["verified"]),
        ("the restore itself", costs["restored"]),
    ):
        print(f"{name:32} {value.clock:7.3f} s {value.cores:7.3f} s {size / 1e9 / value.clock:9.2f} GB/s")
    print(f"one save every {EVERY} steps adds {costs['held'].clock / (EVERY * taken.clock):.2%} to such steps by the clock")


if __name__ == "__main__":
    main()
