"""Does to tiny trainings and to their checkpoints what happens to real ones, and compares with what nobody disturbed.

    python -m tests.faults --kills 100    trainings of both tasks, killed by signals at random moments and started again until they end
    python -m tests.faults --flips 1000   single bits of a checkpoint flipped, its files cut short or deleted, and what is then restored

Exit code 1 where a bit of the parameters, the optimizer, the averages, the position in the data or the logged values differs, or where
a process ends in a way that was not asked for.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs import quickstart
from configs import vae as vae_recipe
from data_prep.encode import EncodeConfig, encode
from hunyuan_jax import train as training
from hunyuan_jax.checkpoint import Checkpoints, Keep
from hunyuan_jax.data import records
from hunyuan_jax.data.dataset import open_dataset, write_index, write_shard
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.metrics import read_metrics
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.task import normal_like, sample_keys
from hunyuan_jax.tasks.vae import VAETask
from hunyuan_jax.train_step import TrainState
from hunyuan_jax.video_io import encode_mp4
from tests.commands import ROOT

TINY_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
BUCKET = {"frames": 5, "height": 16, "width": 16, "batch": 2}
EVERY = {"log_every": 3, "checkpoint_every": 4, "measure_every": 8, "measure_samples": 2, "preview_every": 0, "watchdog_seconds": 300}
STEPS = {"t2v": 24, "vae": 24, "linear": 24}
MINUTES = 10.0  # that one process may take


class Linear(VAETask):
    """The task of the VAE with a linear model in its place, which compiles in a moment. A batch with a sample of `poison` has no loss."""

    poison: tuple[int, ...] = ()

    def init(self, key):
        encoder, decoder = 0.5 * jax.random.normal(key, (2, 3, 3))
        return {"fc1": {"kernel": encoder}, "fc2": {"kernel": decoder}}

    def draw(self, params, batch, key):
        latents = batch.frames @ params["fc1"]["kernel"] + 0.1 * normal_like(sample_keys(key, batch), batch.frames)
        return latents @ params["fc2"]["kernel"], jnp.mean(jnp.square(latents))

    def reconstruct(self, params, frames, *, tiled=False):
        return frames @ params["fc1"]["kernel"] @ params["fc2"]["kernel"]

    def loss(self, params, batch, *, key):
        loss, values = super().loss(params, batch, key=key)
        bad = jnp.isin(batch.sample_id, jnp.array(self.poison, jnp.uint32)).any() if self.poison else False
        return jnp.where(bad, jnp.nan, loss), values


# --- Tiny trainings ------------------------------------------------------------------------------------------------------------


def write_clips(folder: Path) -> None:
    """Twelve clips of noise."""
    items = []
    for n in range(12):
        frames = np.random.default_rng(n).integers(0, 255, (5, 16, 16, 3), np.uint8)
        items.append(
            records.Clip(
                id=f"clip-{n}", video=encode_mp4(frames, fps=8), fps=8.0, num_frames=5, height=16, width=16, camera="",
                caption={"short": f"noise {n}"}, source=f"{n}.mp4", start_seconds=0.0, end_seconds=1.0, scores={},
            )
        )  # fmt: skip
    folder.mkdir(parents=True)
    shard = write_shard(folder / "clips-0.array_record", [records.to_bytes(item) for item in items])
    rows = [
        {"id": x.id, "shard": shard["name"], "index": i, "source": x.source, "num_frames": 5, "caption": json.dumps(x.caption)}
        for i, x in enumerate(items)
    ]
    write_index(folder, kind="Clip", rows=rows, shards=[shard], made_from={})


def write_latents(folder: Path) -> None:
    """The latents of the clips beside them, by a random VAE."""
    section = quickstart.get_config("encode")
    section.buckets, section.whitening_ridge = (BUCKET,), 0.0
    params = jax.jit(lambda key: VAE(TINY_VAE).init(key, np.zeros((1, 5, 16, 16, 3), np.float32)))(jax.random.key(0))["params"]
    clips = open_dataset(folder.parent / "clips", kind="Clip")
    encode(clips, (TINY_VAE, params), folder, config=build(EncodeConfig, section, where="encode"))


def tiny_config(task: str, data: Path, **loop: Any) -> ConfigDict:
    """A training of `task` that compiles in seconds; `loop` changes its section `train`."""
    if task == "t2v":
        config = quickstart.get_config("t2v")
        config.model.update({"width": 32, "num_heads": 2, "num_double_blocks": 1, "num_single_blocks": 1, "rope_axes": (4, 6, 6)})
        config.model.patch_size = (1, 1, 1)
        config.video.update({"frames": 5, "height": 16, "width": 16})
        config.data.update({"path": str(data / "latents"), "buckets": (BUCKET,)})
    else:
        config = vae_recipe.get_config("shapes")
        config.start = ""
        config.model = ConfigDict(
            {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2, "spatial_compression": 1,
             "temporal_compression": 1}
        )  # fmt: skip
        config.critic.model = ConfigDict({"widths": (2, 4), "time_halvings": 1, "power_steps": 1})
        config.critic.update({"start_step": 6, "lead_steps": 6})
        config.critic = config.critic if task == "vae" else None
        config.data.update({"path": str(data / "clips"), "buckets": ({**BUCKET, "frames": 3, "intervals": (1, 2)},)})
    config.data.held_out = 0.3
    config.train.update({"steps": STEPS[task], **EVERY, **loop})
    return config


@dataclasses.dataclass(frozen=True)
class Left:
    """What a run left: arrays by their paths, its position, and its logged values without times."""

    arrays: dict[str, np.ndarray]
    position: dict[str, Any]
    logged: list[dict[str, Any]]

    @classmethod
    def by(cls, workdir: Path, step: int) -> "Left":
        folder, arrays = workdir.absolute() / "checkpoints" / str(step), {}
        with ocp.StandardCheckpointer() as checkpointer:
            for part in ("params", "ema", "rest"):
                leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(folder / part))
                arrays |= {f"{part}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
        lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(workdir / "metrics.jsonl")]
        return cls(arrays, json.loads((folder / "data" / "metadata").read_text()), lines)

    def differing_bits(self, other: "Left") -> int:
        """Bits of all arrays that differ; an array that one of them lacks differs in all its bits."""
        count = 0
        for name in self.arrays.keys() | other.arrays.keys():
            one, two = self.arrays.get(name), other.arrays.get(name)
            if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
                count += 8 * max(0 if x is None else x.nbytes for x in (one, two))
            else:
                different = np.bitwise_xor(*(np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8) for x in (one, two)))
                count += int(np.unpackbits(different).sum())
        return count

    def differing_values(self, other: "Left") -> int:
        """Logged lines that differ, and 1 more if the positions do."""
        longest = max(len(self.logged), len(other.logged))
        rows = [(x.logged + [None] * longest)[:longest] for x in (self, other)]
        return sum(one != two for one, two in zip(*rows, strict=True)) + (self.position != other.position)


# --- Kills ---------------------------------------------------------------------------------------------------------------------

# What may be sent, and the exit codes that may follow: before training begins, a signal ends Python as it always does.
KINDS: dict[str, tuple[tuple[int, ...], set[int]]] = {
    "SIGKILL": ((signal.SIGKILL,), {-signal.SIGKILL}),
    "SIGTERM": ((signal.SIGTERM,), {0, -signal.SIGTERM}),
    "SIGINT": ((signal.SIGINT,), {130, 1, -signal.SIGINT}),
    "SIGINT twice": ((signal.SIGINT, signal.SIGINT), {130, 1, -signal.SIGINT}),
}
POINTS = ("by time", "restore", "save", "delete", "step")


def start(task: str, data: Path, workdir: Path, compiled: Path, log: Path) -> subprocess.Popen[bytes]:
    """A training in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("ab") as output:
        command = [sys.executable, "-m", "tests.faults", "--train", task, str(data), str(workdir)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def wait_for(point: str, workdir: Path, process: subprocess.Popen[bytes], *, draw: random.Random, seconds: float) -> None:
    """Returns at a random moment at that point of the process's life, or when it has ended."""
    if point == "by time":
        until = time.monotonic() + draw.uniform(0, seconds)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        return
    seen, times = _trace(point, workdir), draw.randint(1, 3)
    while process.poll() is None and times:
        now = _trace(point, workdir)
        times, seen = times - (now != seen and bool(now)), now
        if point == "restore" and times and now and now != seen:
            times = 0
        time.sleep(0.001)
    if process.poll() is None:
        time.sleep(draw.uniform(0, 1.0 if point == "restore" else 0.1))


def _trace(point: str, workdir: Path) -> Any:
    """What is seen on disk of a process at a point; it changes when the process gets there once more."""
    if point == "restore":
        path = workdir / "environment.json"  # the last thing that is written before a checkpoint is looked for
        return path.stat().st_mtime_ns if path.exists() else 0
    if point == "step":
        path = workdir / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0
    ending = {"save": ".saving", "delete": ".deleting"}[point]
    try:
        return tuple(sorted(path.name for path in (workdir / "checkpoints").iterdir() if ending in path.name))
    except FileNotFoundError:
        return ()


@dataclasses.dataclass
class Tally:
    """What the kills came to."""

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    points: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    starts: int = 0
    runs: int = 0
    bits: int = 0
    values: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def disturb(
    task: str, data: Path, folder: Path, compiled: Path, reference: Left, *, kinds: Sequence[str], draw: random.Random, tally: Tally,
    seconds: float,
) -> None:  # fmt: skip
    """One training of `task` to its end, killed once in each of its processes while `kinds` are left; then compared."""
    workdir, log, left = folder / "run", folder / "log.txt", collections.deque(kinds)
    tally.runs += 1
    while True:
        process = start(task, data, workdir, compiled, log)
        tally.starts += 1
        if left:
            point = draw.choice(POINTS)
            wait_for(point, workdir, process, draw=draw, seconds=seconds)
            if process.poll() is None:
                kind = left.popleft()
                signals, codes = KINDS[kind]
                for number in signals:
                    process.send_signal(number)
                    time.sleep(draw.uniform(0.0, 0.05))
                code = process.wait(timeout=60 * MINUTES)
                tally.kills[kind] += 1
                tally.points[f"{kind}, {point}"] += 1
                tally.codes[f"{kind} -> {code}"] += 1
                if code not in codes:
                    tally.wrong.append(f"{task}: {kind} during {point} ended in {code}; see {log}")
                    return
                continue
        code = process.wait(timeout=60 * MINUTES)
        if code:
            tally.wrong.append(f"{task}: ended in {code}; see {log}")
            return
        break
    found = Left.by(workdir, STEPS[task])
    bits, values = reference.differing_bits(found), reference.differing_values(found)
    tally.bits, tally.values = tally.bits + bits, tally.values + values
    if bits or values:
        tally.wrong.append(f"{task}: {bits} bits and {values} logged values differ; see {log}")
    unused = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
    if unused:
        tally.wrong.append(f"{task}: {unused} was left behind")
    if left and not tally.wrong:  # it ended before it could be killed so often
        shutil.rmtree(workdir)
        disturb(task, data, folder, compiled, reference, kinds=list(left), draw=draw, tally=tally, seconds=seconds)


def kill_and_compare(folder: Path, *, tasks: Sequence[str], kills: int, seed: int, say: Callable[[str], None]) -> Tally:
    """Kills trainings `kills` times in all and compares each with an uninterrupted one."""
    draw, tally = random.Random(seed), Tally()
    write_clips(folder / "data" / "clips")
    if "t2v" in tasks:
        write_latents(folder / "data" / "latents")
    order = [kind for _ in range(kills // len(KINDS) + 1) for kind in KINDS][:kills]
    for number, task in enumerate(tasks):
        whole = folder / f"{task}-uninterrupted"
        began = time.monotonic()
        if start(task, folder / "data", whole, folder / "compiled", folder / "log.txt").wait(timeout=60 * MINUTES):
            raise RuntimeError(f"The uninterrupted run failed; see {folder / 'log.txt'}")
        seconds, reference = time.monotonic() - began, Left.by(whole, STEPS[task])
        say(f"{task}: a run of {STEPS[task]} steps takes {seconds:.1f} s, with what it compiles")
        mine = order[number :: len(tasks)]
        draw.shuffle(mine)
        (folder / task).mkdir(exist_ok=True)
        disturb(task, folder / "data", folder / task, folder / "compiled", reference, kinds=mine, draw=draw, tally=tally, seconds=seconds)
    return tally


def table_of(tally: Tally) -> str:
    rows = [f"{'kill':14}" + "".join(f"{point:>10}" for point in POINTS) + f"{'all':>8}   exit codes"]
    for kind in KINDS:
        codes = ", ".join(f"{name.split(' -> ')[1]} x {n}" for name, n in sorted(tally.codes.items()) if name.startswith(f"{kind} ->"))
        counts = [tally.points[f"{kind}, {point}"] for point in POINTS]
        rows.append(f"{kind:14}" + "".join(f"{n:>10}" for n in counts) + f"{tally.kills[kind]:>8}   {codes}")
    rows.append(f"{sum(tally.kills.values())} kills, {tally.runs} trainings to their end, {tally.starts} processes")
    rows.append(f"differing bits {tally.bits}, differing logged values {tally.values}")
    return "\n".join([*rows, *tally.wrong])


# --- Flips ---------------------------------------------------------------------------------------------------------------------


def small_state(step: int) -> TrainState:
    """A state of a few thousand numbers."""
    rng = np.random.default_rng(step)
    params = {
        "layer": {"kernel": jnp.asarray(rng.normal(size=(32, 33)), jnp.float32), "bias": jnp.asarray(rng.normal(size=33), jnp.float32)}
    }
    count = jnp.asarray(step, jnp.int32)
    scaled = lambda factor: jax.tree.map(lambda x: factor * x, params)  # noqa: E731
    return TrainState(step=count, skipped=count - count, params=params, ema=scaled(0.5), opt_state={"mu": scaled(0.1), "nu": scaled(0.2)})


SMALL_STEPS = (10, 20, 30)
FINE = ("detected", "harmless", "never read")


def write_small_run(workdir: Path) -> None:
    """A run with three checkpoints of `small_state`."""
    checkpoints = Checkpoints(workdir, keep=Keep(last=len(SMALL_STEPS)))
    for step in SMALL_STEPS:
        checkpoints.save(step, small_state(step), data={"next_index": step})
    checkpoints.close()


def damage(folder: Path, draw: random.Random) -> str:
    """Flips one bit of a random file, cuts a file short, empties it or deletes it; says which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    what = draw.choice(("flip", "flip", "flip", "truncate", "delete")) if content else "delete"
    if what == "delete":
        path.unlink()
        return f"{path.name} deleted"
    if what == "truncate":
        path.write_bytes(content[: draw.randrange(len(content))])
        return f"{path.name} truncated"
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"{path.name} bit {bit} flipped"


def flip_and_restore(whole: Path, folder: Path, *, flips: int, seed: int) -> Iterator[tuple[str, str]]:
    """For each damage: what it was, and one of FINE (a damaged checkpoint older than the newest is never read) or what went wrong."""
    draw = random.Random(seed)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(0))
    for _ in range(flips):
        workdir = folder / "damaged"
        shutil.copytree(whole, workdir)
        hit = SMALL_STEPS if draw.random() < 0.1 else draw.choices(SMALL_STEPS, weights=(1, 1, 3))
        said = "; ".join(f"{step}: {damage(workdir / 'checkpoints' / str(step), draw)}" for step in hit)
        yield said, _outcome(workdir, abstract, hit)
        shutil.rmtree(workdir)


def _outcome(workdir: Path, abstract: TrainState, hit: Sequence[int]) -> str:
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.newest_sound()
        assert step is not None
        state, data = checkpoints.restore(step, abstract)
    except UserError as error:
        named = all(f"step {step}:" in str(error) for step in SMALL_STEPS)
        return "detected" if len(hit) == len(SMALL_STEPS) and named else f"not restored: {error}"
    except Exception as error:  # any other error is what this looks for
        return f"crashed: {type(error).__name__}: {error}"
    finally:
        checkpoints.close()
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), state, small_state(step))
    if not all(jax.tree.leaves(same)) or data != {"next_index": step}:
        return f"step {step} was restored with other bits"
    newest_whole = max(set(SMALL_STEPS) - set(hit), default=0)
    if step < newest_whole:
        return f"step {step} was restored, though {newest_whole} is whole"
    if step in hit:
        return "harmless"
    return "detected" if max(hit) > step else "never read"


# --- The command ---------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["t2v", "vae"], choices=sorted(STEPS))
    parser.add_argument("--keep", type=Path, help="folder in which all stays (default: a temporary one)")
    parser.add_argument("--train", nargs=3, metavar=("TASK", "DATA", "WORKDIR"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.train:
        task, data, workdir = options.train
        if task == "linear":
            training.make_task = Linear.from_config
        run_command(lambda _: training.train(tiny_config(task, Path(data)), Path(workdir)))
        return 0
    folder = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    wrong, began = 0, time.monotonic()
    if options.kills:
        tally = kill_and_compare(folder, tasks=options.tasks, kills=options.kills, seed=options.seed, say=print)
        print(table_of(tally))
        wrong += len(tally.wrong)
    if options.flips:
        write_small_run(folder / "small")
        outcomes: collections.Counter[str] = collections.Counter()
        for said, outcome in flip_and_restore(folder / "small", folder, flips=options.flips, seed=options.seed):
            outcomes[outcome if outcome in FINE else "WRONG"] += 1
            if outcome not in FINE:
                print(f"{said}: {outcome}")
                wrong += 1
        print(", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))
    print(f"{time.monotonic() - began:.0f} s")
    if wrong or options.keep:
        print(f"all is in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
