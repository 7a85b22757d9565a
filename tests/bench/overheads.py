"""What watching and guarding a training cost, as shares of its steps: the quickstart's DiT, on this machine.

    python -m tests.bench.overheads

What is part of the compiled step is measured by steps with and without it, taken in turns; the rest by what it takes each time, over the
steps between two times. Medians; of the clock, and of all cores, which is the figure to read where others use the machine too.
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import quickstart
from hunyuan_jax import convert, metrics, train_step
from hunyuan_jax.codec import Codec
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.goodput import Ledger
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.settings import build
from hunyuan_jax.tasks import planned_task
from hunyuan_jax.tasks.t2v import T2VTask
from hunyuan_jax.train_step import EmaConfig, TrainState, init_state, make_step
from tests.bench.checkpoint_cost import Taken, cost_of_checkpoints, seconds_of

Step = Callable[[TrainState, VideoBatch], tuple[TrainState, dict[str, jax.Array]]]


def random_batch(config: ConfigDict, bucket: Bucket, task: T2VTask, *, samples: int) -> VideoBatch:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(samples, *shape)), jnp.float32)  # noqa: E731
    latent, length = task.codec.vae.latent_shape(*bucket.shape), config.data.text_length
    return VideoBatch(
        sample_id=jnp.arange(samples, dtype=jnp.uint32),
        mean=normal(*latent),
        logvar=normal(*latent) - 5,
        txt=normal(length, task.model.text_dim),
        txt_mask=jnp.ones((samples, length), bool),
        pooled=normal(task.model.pooled_dim),
    )


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """A step that is made and traced here lacks a part that it always has."""
    patches: dict[str, Any] = {
        "guard": mock.patch.object(train_step, "_choose", lambda condition, new, old: new),
        "statistics": mock.patch.object(VideoBatch, "statistics", return_value={}),
    }
    with patches.get(part, contextlib.nullcontext()):
        yield


def compiled_steps(task: T2VTask, optimizer: Any, batch: VideoBatch) -> dict[str, tuple[Step, TrainState]]:
    """The bare step, with one part each, and as trainings have it; each with a state of its own."""
    window = 100
    parts: dict[str, tuple[set[str], dict[str, Any]]] = {  # what is left out, and what is asked for
        "bare": ({"guard", "statistics"}, {}),
        "guard": ({"statistics"}, {}),
        "statistics": ({"guard"}, {}),
        "norms": ({"guard", "statistics"}, {"block_norms": True}),
        "trained": (set(), {"block_norms": True}),
        "spikes": (set(), {"block_norms": True, "skip_above": 6.0}),
    }
    steps = {}
    for name, (left_out, asked) in parts.items():
        begin = lambda asked=asked: init_state(  # noqa: E731
            task.init(jax.random.key(0)), optimizer, spike_window=window if "skip_above" in asked else 0
        )
        state = jax.jit(begin)()
        with contextlib.ExitStack() as stack:
            for part in left_out:
                stack.enter_context(without(part))
            step = make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(1), **asked)
            steps[name] = jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state
    return steps


def median(taken: list[Taken]) -> Taken:
    return Taken(*np.median([dataclasses.astuple(row) for row in taken], axis=0))


def in_turns(steps: dict[str, tuple[Step, TrainState]], batch: VideoBatch, count: int) -> tuple[dict[str, list[Taken]], TrainState]:
    """What `count` steps of each kind take, and a state after them; the first round does not count."""
    states = {name: state for name, (_, state) in steps.items()}
    taken: dict[str, list[Taken]] = {name: [] for name in steps}
    for turn in range(count + 1):
        for name, (step, _) in steps.items():
            one, (states[name], _) = seconds_of(lambda step=step, name=name: step(states[name], batch))
            taken[name] += [one] if turn else []
    return taken, states["trained"]


def cost_of_line(bucket: Bucket, values: dict[str, jax.Array], steps: int, folder: Path) -> Taken:
    """A line of the log over so many steps."""
    writer, ledger = metrics.MetricWriter(folder), Ledger()

    def write() -> None:
        log, throughput = metrics.MetricLog([bucket]), metrics.Throughput()
        for _ in range(steps):
            log.add(0, values)
            throughput.add(samples=bucket.batch)
        writer.write_scalars(1, log.take() | throughput.take() | ledger.scalars() | metrics.memory())

    taken = median([seconds_of(write)[0] for _ in range(5)])
    writer.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overheads", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind")
    parser.add_argument("--heads", type=int, default=4, help="of 32 values; the quickstart's model has 4")
    options = parser.parse_args()
    config = quickstart.get_config("t2v")
    config.model.update({"width": 32 * options.heads, "num_heads": options.heads})
    every = config.train
    bucket = build(Bucket, config.data.buckets[0], where="data.buckets[0]")
    task = planned_task(config)
    vae, params = convert.load("configs/shapes_vae", "vae")
    task = dataclasses.replace(task, codec=Codec(vae=vae, vae_params=params, text=task.codec.text))
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, where="optimizer"))
    batch = random_batch(config, bucket, task, samples=bucket.batch)

    steps = compiled_steps(task, optimizer, batch)
    taken, state = in_turns(steps, batch, options.steps)
    values = steps["trained"][0](jax.tree.map(jnp.copy, state), batch)[1]
    with tempfile.TemporaryDirectory() as folder:
        line = cost_of_line(bucket, values, every.log_every, Path(folder))
        costs, _ = cost_of_checkpoints(state, Path(folder))
    shown = random_batch(config, bucket, task, samples=8)
    show = lambda: [task.preview(weights, shown, key=jax.random.key(2)) for weights in (state.ema, state.params)]  # noqa: E731
    show()
    preview, _ = seconds_of(show)

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    bare, whole = median(taken["bare"]), median(taken["trained"])
    print(f"{count:.1f}M parameters, bucket {bucket.name}, batch {bucket.batch}, {options.steps} steps, {jax.devices()[0].device_kind}")
    print(f"a step: {whole.clock:.4f} s by the clock, {whole.cores:.4f} s of the cores\n")
    print("| what | every | by the clock | of the cores |\n|---|---|---|---|")

    def row(what: str, often: str, clock: float, cores: float) -> None:
        print(f"| {what} | {often} | {clock:+.2%} | {cores:+.2%} |")

    def compare(what: str, of: str, against: Taken) -> None:
        found = median(taken[of])
        row(what, "step", found.clock / against.clock - 1, found.cores / against.cores - 1)

    def spread(what: str, cost: Taken, steps: int) -> None:
        row(what, f"{steps} steps", cost.clock / steps / whole.clock, cost.cores / steps / whole.cores)

    compare("is the step finite?", "guard", bare)
    compare("what the batch is like", "statistics", bare)
    compare("norms of blocks", "norms", bare)
    compare("all three", "trained", bare)
    compare("skipping spikes, besides", "spikes", whole)
    spread("a line of the log", line, every.log_every)
    spread("a checkpoint, as far as it holds steps up", costs["held"], every.checkpoint_every)
    spread("of which: is the state finite?", costs["finite"], every.checkpoint_every)
    spread("a preview of averaged and raw weights", preview, every.preview_every)


if __name__ == "__main__":
    main()
