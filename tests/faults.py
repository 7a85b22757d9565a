"""Does to tiny trainings and to their checkpoints what happens to real ones, and compares with what nobody disturbed.

    python -m tests.faults --kills 100 --processes 1 2    trainings, killed by signals at random moments and started again until they end
    python -m tests.faults --nans 200 --tasks linear          trainings with values that are not finite in their data
    python -m tests.faults --flips 1000                   bits of a checkpoint flipped, files cut short or deleted, and what is restored
    python -m tests.faults --hangs 8 --processes 1 2      trainings in one of whose processes something never ends, and how soon they end

Exit code 1 where a bit of the parameters, the optimizer, the averages, the position in the data or the logged values differs, or where
a process ends in a way that was not asked for.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from hunyuan_jax import bad_steps
from hunyuan_jax import train as training
from hunyuan_jax.checkpoint import Checkpoints, Keep, load_params
from hunyuan_jax.data import loader
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.parallel import distributed
from hunyuan_jax.parallel.lifeline import LOST
from hunyuan_jax.stops import HUNG
from hunyuan_jax.train_step import TrainState
from launch import local
from tests.commands import ROOT
from tests.tiny_trainings import STEPS, TASKS, Left, arrays_of, tiny_config, write_data

MINUTES = 10.0  # that one process may take
END_SECONDS = 60.0  # that processes have to end after the kill of one of them
OF_LOST = {LOST, -signal.SIGABRT}  # the second where JAX's own service was faster


# --- Kills ---------------------------------------------------------------------------------------------------------------------

# What may be sent, and the exit codes that may follow: before training begins, a signal ends Python as it always does.
KINDS: dict[str, tuple[tuple[int, ...], set[int]]] = {
    "SIGKILL": ((signal.SIGKILL,), {-signal.SIGKILL}),
    "SIGTERM": ((signal.SIGTERM,), {0, -signal.SIGTERM}),
    "SIGINT": ((signal.SIGINT,), {130, 1, -signal.SIGINT}),
    "SIGINT twice": ((signal.SIGINT, signal.SIGINT), {130, 1, -signal.SIGINT}),
}
Changes = Mapping[str, Any]
POINTS = ("by time", "restore", "save", "delete", "step")


class Starter:
    """Starts processes that train: forks of one that has imported all there is to import and has touched no device."""

    def __init__(self, compiled: Path) -> None:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "tests.faults", "--serve"]
        self._server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate(timeout=60)


def serve() -> dict[str, Any] | None:
    """Forks and answers with the number of the process, or says with which code one has ended; in a fork returns what it is to train."""
    for line in sys.stdin:
        order = json.loads(line)
        if "ended" in order:
            number, status = os.waitpid(order["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if number else None
        else:
            answer = os.fork()
            if not answer:
                return order
        print(json.dumps(answer), flush=True)
    return None


def train_as(
    task: str, data: str, workdir: str, batch: int, environment: dict[str, str], log: str, loop: dict[str, Any], hang: dict[str, Any] | None
) -> None:
    """What a fork does: it becomes a process of `hunyuan_jax.train`, whose outputs go to `log`; it may be one that is to `hang`."""
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has switched off for what it runs in the background
    for output, number in ((os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), (os.open(os.devnull, os.O_RDONLY), 0)):
        os.dup2(output, number)
    os.dup2(1, 2)
    training.make_task = TASKS[task]
    if hang and hang["process"] == int(environment.get("JAX_PROCESS_ID", "0")):
        hang_at(hang["place"], hang["step"], told=Path(workdir).parent / "hangs")

    def main(_: list[str]) -> None:
        distributed.initialize()
        training.train(tiny_config(task, Path(data), batch=batch, **loop), Path(workdir))

    run_command(main)


class Processes:
    """The processes of one training, with changes to its section `train`, one of which may be to `hang`."""

    def __init__(
        self, starter: Starter, task: str, count: int, folder: Path, *, data: Path, loop: Changes | None = None, hang: Changes | None = None
    ) -> None:
        self._starter, port = starter, local.free_port()
        self._codes: list[int | None] = [None] * count
        self._before, self._folder = _trace("restore", folder / "run"), folder / "run"
        told = [local.variables(n, processes=count, port=port) if count > 1 else {} for n in range(count)]
        what = {"task": task, "data": str(data), "workdir": str(folder / "run"), "batch": max(2, count), "log": str(folder / "log.txt")}
        what |= {"loop": loop or {}, "hang": hang}
        self._numbers = [starter.ask(**what, environment=environment) for environment in told]

    def codes(self) -> list[int | None]:
        """The exit code of each; None while it runs."""
        for n, number in enumerate(self._numbers):
            if self._codes[n] is None:
                self._codes[n] = self._starter.ask(ended=number)
        return self._codes

    @property
    def run(self) -> bool:
        """Whether none has ended."""
        return all(code is None for code in self.codes())

    @property
    def together(self) -> bool:
        """Whether they have found each other: before that they wait for one that is lost, as for a host that is yet to come."""
        return _trace("restore", self._folder) != self._before

    def wait(self, seconds: float) -> list[int | None]:
        """The codes, when all have ended or so much time has passed; what still runs then is killed."""
        until = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < until:
            time.sleep(0.005)
        codes = list(self.codes())
        self.send((signal.SIGKILL,), range(len(codes)))
        while None in self.codes():
            time.sleep(0.005)
        return codes

    def send(self, signals: Sequence[int], to: Iterable[int], *, between: Callable[[], float] = lambda: 0.0) -> None:
        """Sends signals to those of the processes `to` that run."""
        for number in signals:
            for n in to:
                if self.codes()[n] is None:
                    os.kill(self._numbers[n], number)
            time.sleep(between())


def wait_for(point: str, workdir: Path, processes: Processes, *, draw: random.Random, seconds: float) -> None:
    """Returns at a random moment at that point of the processes' life, or when one has ended."""
    if point == "by time":
        until = time.monotonic() + draw.uniform(0, seconds)
        while processes.run and time.monotonic() < until:
            time.sleep(0.005)
        return
    seen, times = _trace(point, workdir), 1 if point == "restore" else draw.randint(1, 3)
    while processes.run and times:
        now = _trace(point, workdir)
        times, seen = times - (now != seen and bool(now)), now
        time.sleep(0.001)
    if processes.run:
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
    """What one kind of kill came to in trainings of one task by so many processes."""

    task: str
    processes: int
    kind: str
    points: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    runs: int = 0
    bits: int = 0
    values: int = 0
    seconds: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.points.total()


def disturb(
    tally: Tally, kills: int, starter: Starter, folder: Path, reference: Left, *, data: Path, draw: random.Random, longest: float
) -> None:
    """Trainings to their end, killed `kills` times in all, once in each start while kills are left; each is compared at its end.

    A kill "by time" comes within `longest` seconds of a start, or within what a training took that ended before it.
    """
    began = time.monotonic()
    while (tally.kills < kills or not tally.runs) and not tally.wrong:
        shutil.rmtree(folder / "run", ignore_errors=True)
        while True:
            started, processes = time.monotonic(), Processes(starter, tally.task, tally.processes, folder, data=data)
            if tally.kills == kills or not kill(tally, processes, folder / "run", draw=draw, longest=longest):
                codes = processes.wait(60 * MINUTES)
                longest = min(longest, time.monotonic() - started)
                if any(codes):
                    tally.wrong.append(f"ended in {codes}")
                break
            if tally.wrong:
                break
        if not tally.wrong:
            compare(tally, folder / "run", reference)
    tally.wrong = [f"{tally.task}, {tally.processes} processes, {tally.kind}: {said}; see {folder}" for said in tally.wrong]
    tally.seconds = time.monotonic() - began


def kill(tally: Tally, processes: Processes, workdir: Path, *, draw: random.Random, longest: float) -> bool:
    """Kills one of the processes or all, whose others must then end too; False where they had come to their end before that."""
    point = draw.choice(POINTS)
    wait_for(point, workdir, processes, draw=draw, seconds=longest)
    if not processes.run:
        return False
    signals, expected = KINDS[tally.kind]
    everyone = range(tally.processes)
    one = processes.together and (not tally.kills or draw.random() < 0.5)
    victims = (draw.choice(everyone),) if one else everyone
    processes.send(signals, victims, between=lambda: draw.uniform(0.0, 0.05))
    sent = time.monotonic()
    codes = processes.wait(60 * MINUTES if tally.processes == 1 else END_SECONDS)
    tally.points[point] += 1
    tally.codes.update(f"{code}" if n in victims else f"({code})" for n, code in enumerate(codes))
    if None in codes:
        tally.wrong.append(f"{codes.count(None)} processes were still there {time.monotonic() - sent:.0f} s after the kill during {point}")
    if bad := set(codes) - {None, 0} - expected - (OF_LOST if tally.processes > 1 else set()):
        tally.wrong.append(f"the kill during {point} ended in {bad}")
    return True


def uninterrupted(start: Callable[[Path], Processes], task: str, folder: Path) -> Left:
    """What a training of the task leaves that nobody disturbs."""
    folder.mkdir()
    codes = start(folder).wait(60 * MINUTES)
    if any(codes):
        raise RuntimeError(f"The uninterrupted run ended in {codes}; see {folder / 'log.txt'}")
    return Left.by(folder / "run", STEPS[task])


def differing(reference: Left, workdir: Path, task: str) -> tuple[int, int]:
    """The bits, and the logged values, in which a run differs from the one that nobody disturbed."""
    found = Left.by(workdir, STEPS[task])
    return reference.differing_bits(found), reference.differing_values(found)


def compare(tally: Tally, workdir: Path, reference: Left) -> None:
    """Counts what differs from the run that nobody disturbed."""
    bits, values = differing(reference, workdir, tally.task)
    tally.runs, tally.bits, tally.values = tally.runs + 1, tally.bits + bits, tally.values + values
    if bits or values:
        tally.wrong.append(f"{bits} bits and {values} logged values differ")
    unused = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
    if unused:
        tally.wrong.append(f"{unused} was left behind")


def kill_and_compare(
    folder: Path, *, tasks: Sequence[str], kills: int, seed: int, say: Callable[[str], None], processes: Sequence[int] = (1,)
) -> list[Tally]:
    """Kills trainings `kills` times in all, each task by each number of processes in each way, and compares with uninterrupted ones."""
    draw, starter = random.Random(seed), Starter(folder / "compiled")
    write_data(folder / "data", tasks)
    tallies = [Tally(task, count, kind) for task in tasks for count in processes for kind in KINDS]
    share = [kills // len(tallies) + (n < kills % len(tallies)) for n in range(len(tallies))]
    references: dict[str, tuple[Left, float]] = {}
    try:
        for tally, mine in zip(tallies, share, strict=True):
            if not mine:
                continue
            name = f"{tally.task}-{tally.processes}"
            if name not in references:
                began, start = time.monotonic(), functools.partial(Processes, starter, tally.task, tally.processes, data=folder / "data")
                whole = uninterrupted(start, tally.task, folder / name)
                seconds = time.monotonic() - began
                references[name] = whole, seconds / 2
                say(f"{name}: {STEPS[tally.task]} steps take {seconds:.1f} s, with what is compiled")
            place = folder / f"{name} {tally.kind}"
            place.mkdir()
            reference, longest = references[name]
            disturb(tally, mine, starter, place, reference, data=folder / "data", draw=draw, longest=longest)
            say(f"{place.name}: {tally.kills} kills, {tally.bits} differing bits, {tally.seconds / max(1, tally.kills):.1f} s a kill")
    finally:
        starter.close()
    return [tally for tally in tallies if tally.kills]


def table_of(tallies: Sequence[Tally]) -> str:
    """A row for each way to be killed, in Markdown; exit codes in brackets are those of processes that the signal was not sent to."""
    head = ["task", "processes", "signal", "kills", *POINTS, "exit codes", "trainings", "differing bits", "differing values", "s a kill"]
    rows = [head, ["---"] * len(head)]
    for tally in tallies:
        codes = ", ".join(f"{code} x {n}" for code, n in sorted(tally.codes.items()))
        results = [codes, tally.runs, tally.bits, tally.values, f"{tally.seconds / tally.kills:.1f}"]
        rows.append([tally.task, tally.processes, tally.kind, tally.kills, *(tally.points[point] for point in POINTS), *results])
    kills, runs, bits, values = (sum(getattr(tally, name) for tally in tallies) for name in ("kills", "runs", "bits", "values"))
    seconds = sum(tally.seconds for tally in tallies) / max(1, kills)
    points = (sum(tally.points[point] for tally in tallies) for point in POINTS)
    rows.append(["all", "", "", kills, *points, "", runs, bits, values, f"{seconds:.1f}"])
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in rows] + [said for tally in tallies for said in tally.wrong])


# --- Hangs ---------------------------------------------------------------------------------------------------------------------

# Steps (from 1) at which a process may come to stand still: by then it has done the same before, so that nothing is to be compiled.
PLACES = {"loader": range(8, 24), "start of a step": range(8, 24), "devices": range(8, 24), "saving": (12, 16, 20)}
ALONE = ("devices",)  # what only one process of a run can be made to do
HANG_SECONDS = 60.0  # that all processes have to end in


def hang_at(place: str, step: int, *, told: Path) -> None:
    """Makes this process stand still at a place in a step (from 1); when it does, `told` is written."""

    def forever() -> None:
        told.touch()
        threading.Event().wait()

    def before(owner: type, name: str, wanted: Callable[..., bool]) -> None:
        method = getattr(owner, name)

        def hanging(*args: Any, **how: Any) -> Any:
            if wanted(*args):
                forever()
            return method(*args, **how)

        setattr(owner, name, hanging)

    if place == "loader":
        before(loader.ReadStep, "__call__", lambda _, number: number == step - 1)
    elif place == "saving":
        before(Checkpoints, "save", lambda _, number, *rest: number == step)
    elif place == "start of a step":
        before(training.BadSteps, "add", lambda _, number, *rest: number == step - 1)  # the last thing that the loop does in a step
    else:
        configured = training.configured_step

        def wait_in(number: np.ndarray, loss: np.ndarray) -> np.ndarray:
            if number == step:
                forever()
            return loss

        def hanging_step(*args: Any, **how: Any) -> Any:
            inner = configured(*args, **how)

            def run(state: TrainState, batch: Any) -> Any:
                new, values = inner(state, batch)
                return new, values | {"loss": jax.pure_callback(wait_in, values["loss"], new.step, values["loss"])}

            return run

        training.configured_step = hanging_step


@dataclasses.dataclass
class HangTally:
    """What came of trainings in one of whose so many processes something never ended at a place."""

    processes: int
    place: str
    hangs: int = 0
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    longest: float = 0.0
    bits: int = 0
    values: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def hang_and_compare(
    folder: Path, *, hangs: int, seed: int, say: Callable[[str], None], processes: Sequence[int] = (1,), loop: Changes | None = None
) -> list[HangTally]:
    """Lets trainings hang `hangs` times in all, each place by each number of processes in turn, and compares what they then go on to."""
    draw, starter, task = random.Random(seed), Starter(folder / "compiled"), "linear"
    write_data(folder / "data", [task])
    tallies = [HangTally(count, place) for place in PLACES for count in processes if count == 1 or place not in ALONE]
    references: dict[int, Left] = {}
    try:
        for number in range(hangs):
            tally = tallies[number % len(tallies)]
            count, place = tally.processes, folder / f"hang-{number}"
            start = functools.partial(Processes, starter, task, count, data=folder / "data", loop=loop)
            if count not in references:
                references[count] = uninterrupted(start, task, folder / f"whole-{count}")
            place.mkdir()
            hang = {"place": tally.place, "step": draw.choice(PLACES[tally.place]), "process": draw.randrange(count)}
            hanging = start(place, hang=hang)
            while hanging.run and not (place / "hangs").exists():
                time.sleep(0.01)
            began = time.monotonic()
            codes = hanging.wait(2 * HANG_SECONDS)
            took = time.monotonic() - began
            tally.hangs, tally.longest = tally.hangs + 1, max(tally.longest, took)
            tally.codes.update(map(str, codes))
            if HUNG not in codes or set(codes) - {HUNG} - (OF_LOST if count > 1 else set()) or took > HANG_SECONDS:
                tally.wrong.append(f"{hang} in {place}: ended in {codes} after {took:.0f} s")
            elif any(codes := start(place).wait(60 * MINUTES)):
                tally.wrong.append(f"{hang} in {place}: the next start ended in {codes}")
            else:
                bits, values = differing(references[count], place / "run", task)
                tally.bits, tally.values = tally.bits + bits, tally.values + values
                tally.wrong += [f"{hang} in {place}: {bits} bits and {values} logged values differ"] if bits or values else []
            say(f"{count} processes, {hang}: all had ended after {took:.1f} s")
    finally:
        starter.close()
    return [tally for tally in tallies if tally.hangs]


def table_of_hangs(tallies: Sequence[HangTally]) -> str:
    """A row for each place and number of processes, in Markdown."""
    rows: list[list[Any]] = [["hangs", "processes", "times", "exit codes", "longest until the end", "differing bits", "differing values"]]
    rows.append(["---"] * len(rows[0]))
    for t in tallies:
        codes = ", ".join(f"{code} x {n}" for code, n in sorted(t.codes.items()))
        rows.append([t.place, t.processes, t.hangs, codes, f"{t.longest:.1f} s", t.bits, t.values])
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in rows] + [said for tally in tallies for said in tally.wrong])


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
FINE = ("detected", "harmless")


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
    """For each damage to the newest checkpoint, and at times to older ones: what it was, and one of FINE or what went wrong."""
    draw = random.Random(seed)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(0))
    for _ in range(flips):
        workdir = folder / "damaged"
        shutil.copytree(whole, workdir)
        hit = SMALL_STEPS[-draw.choice((1, 1, 1, 1, 1, 1, 1, 2, 2, 3)) :]
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
    return "harmless" if step in hit else "detected"


def table_of_damage(outcomes: Mapping[tuple[str, str], int]) -> str:
    """A row for each way to be damaged, in Markdown."""
    columns, ways = (*FINE, "WRONG"), sorted({way for way, _ in outcomes})
    rows = [["a file was", "times", *columns], ["---"] * 5]
    counts = [[way, *(outcomes.get((way, column), 0) for column in columns)] for way in ways]
    rows += [[way, str(sum(found)), *map(str, found)] for way, *found in counts]
    rows.append(["all", *(str(sum(int(row[n]) for row in rows[2:])) for n in range(1, 5))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --- Numbers that are not finite -----------------------------------------------------------------------------------------------

LENGTHS = {"linear": (96, 112, 128), "t2v": (40, 48)}  # steps
LEARNING_RATE = {"linear": 0.2, "t2v": 7e-3}
# How far the last loss may lie from that of the run without them, relative. Of the DiT, which sees but a few clips of noise, the distance
# is told and not judged.
NEAR = {"linear": 0.01, "t2v": math.inf}
VALUES = (np.nan, np.inf, -np.inf, 1e30)  # the last has a loss, whose gradient is too large for a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoilt:
    """A training in whose data some steps of the plan have a value that spoils their loss or gradient."""

    task: str
    steps: int
    every: int  # steps between checkpoints
    after: int  # bad steps in a row before it goes back
    where: frozenset[int]  # steps of the plan
    value: float

    @classmethod
    def draw(cls, task: str, steps: int, draw: random.Random) -> "Spoilt":
        """One to three bursts of one to five steps anywhere."""
        bursts = [range(start, start + draw.randint(1, 5)) for start in draw.sample(range(steps), draw.randint(1, 3))]
        where = frozenset(step for burst in bursts for step in burst)
        return cls(task=task, steps=steps, every=draw.randint(4, 20), after=draw.randint(1, 4), where=where, value=draw.choice(VALUES))

    def config(self, data: Path) -> ConfigDict:
        """All checkpoints stay. It learns so fast that the last quarter of the steps changes little."""
        often = {"log_every": 8, "measure_every": 0, "checkpoint_every": self.every, "keep": self.steps}
        config = tiny_config(self.task, data, **often, steps=self.steps, rollback_after=self.after, rollbacks=20)
        rate, last = LEARNING_RATE[self.task], 3 * self.steps // 4
        config.optimizer.update({"learning_rate": rate, "warmup_steps": 4, "decay_steps": last, "final_fraction": 0.01})
        config.ema.decay = 0.9
        if self.task == "linear":
            config.loss.kl_weight = 0.3  # without a price for large latents there is always a little to be gained
        return config

    def train(self, data: Path, workdir: Path) -> None:
        """In this process, from its beginning to its end."""
        read, make_task = loader.ReadStep.__call__, training.make_task

        def spoil(step: loader.ReadStep, number: int) -> loader.Read:
            found = read(step, number)
            batch = found.batch
            if number + step.schedule.left_out not in self.where or batch is None:
                return found
            name = "mean" if batch.frames is None else "frames"
            values = getattr(batch, name).copy()
            values.flat[number % values.size] = self.value
            return dataclasses.replace(found, batch=batch.replace(**{name: values}))

        loader.ReadStep.__call__ = spoil
        training.make_task = TASKS[self.task]
        try:
            with (workdir.parent / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
                training.train(self.config(data), workdir)
        finally:
            loader.ReadStep.__call__, training.make_task = read, make_task


def judge_of(task: str, data: Path) -> Callable[[Path], float]:
    """A function that says what the averaged weights of a run are worth: their loss on held-out samples, with the same noise for all."""
    config = Spoilt.draw(task, 8, random.Random(0)).config(data)
    setup = training.Setup.from_config(config)
    model = TASKS[task](config, setup.dataset)
    how = {"limit": 16, "encode": model.encode_prompts, "shapes": model.batch_shapes}
    batches = loader.held_out_batches(setup.data, setup.dataset, setup.schedule.buckets[0], **how)
    loss = jax.jit(lambda params, batch: model.loss(params, batch, key=jax.random.key(7))[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def judge(workdir: Path) -> float:
        params, _ = load_params(workdir, shapes)
        return float(np.mean([loss(params, batch) for batch in batches]))

    return judge


@dataclasses.dataclass
class NanTally:
    """What came of spoilt trainings of one task."""

    task: str
    runs: int = 0
    spoilt: int = 0
    back: int = 0
    checkpoints: int = 0
    not_finite: int = 0
    far: float = 0.0
    seconds: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)


def spoil_and_compare(folder: Path, *, task: str, runs: int, seed: int, say: Callable[[str], None]) -> NanTally:
    """Spoilt trainings; of each all checkpoints are read, and the last loss is compared with that of a run that nothing spoilt."""
    draw, tally, data = random.Random(seed), NanTally(task), folder / "data"
    write_data(data, [task])
    judge, clean = judge_of(task, data), {}
    began, workdir = time.monotonic(), folder / "spoilt"
    for number in range(runs):
        one = Spoilt.draw(task, draw.choice(LENGTHS[task]), draw)
        if one.steps not in clean:
            plain = dataclasses.replace(one, where=frozenset())
            plain.train(data, folder / "clean")
            clean[one.steps] = judge(folder / "clean")
            shutil.rmtree(folder / "clean")
            say(f"{task}: with nothing spoilt the loss after {one.steps} steps is {clean[one.steps]:.4f}")
        one.train(data, workdir)
        back = workdir / bad_steps.FILE
        tally.back += len(json.loads(back.read_text())) if back.exists() else 0
        tally.runs, tally.spoilt = tally.runs + 1, tally.spoilt + len(one.where)
        for checkpoint in (workdir / "checkpoints").iterdir():
            tally.checkpoints += 1
            broken = [name for name, array in arrays_of(checkpoint).items() if not np.all(np.isfinite(array))]
            if broken:
                tally.not_finite += 1
                tally.wrong.append(f"{one}: checkpoint {checkpoint.name} has {broken}")
        far = abs(judge(workdir) / clean[one.steps] - 1)
        tally.far = max(tally.far, far)
        if not far <= NEAR[task]:
            tally.wrong.append(f"{one}: the last loss lies {100 * far:.1f} % from the clean run's")
        shutil.rmtree(workdir)
        if number % 20 == 19:
            jax.clear_caches()
            say(f"{task}: {number + 1} runs, {(time.monotonic() - began) / (number + 1):.1f} s each")
    tally.seconds = time.monotonic() - began
    return tally


def table_of_nans(tallies: Sequence[NanTally]) -> str:
    """A row for each task, in Markdown."""
    head = ["task", "spoilt runs", "spoilt steps", "went back", "checkpoints read", "not finite", "farthest last loss", "s a run"]
    rows = [head, ["---"] * len(head)]
    for t in tallies:
        rows.append([t.task, t.runs, t.spoilt, t.back, t.checkpoints, t.not_finite, f"{100 * t.far:.2f} %", f"{t.seconds / t.runs:.1f}"])
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in rows] + [said for tally in tallies for said in tally.wrong])


# --- The command ---------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--nans", type=int, default=0, help="spoilt trainings of each task")
    parser.add_argument("--hangs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=sorted(STEPS), choices=sorted(STEPS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1], metavar="N", help="of each training that is killed or hangs")
    parser.add_argument("--keep", type=Path, help="folder in which all stays (default: a temporary one)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)  # Orbax says of each folder that it reads what it lacks
    if options.serve:
        order = serve()
        if order is not None:
            train_as(**order)
        return 0
    folder = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    wrong, began = 0, time.monotonic()
    if options.kills:
        how = {"tasks": options.tasks, "processes": options.processes, "kills": options.kills, "seed": options.seed}
        tallies = kill_and_compare(folder, **how, say=functools.partial(print, flush=True))
        print(table_of(tallies), flush=True)
        wrong += sum(len(tally.wrong) for tally in tallies)
    if options.hangs:
        how = {"hangs": options.hangs, "seed": options.seed, "processes": options.processes}
        hung = hang_and_compare(folder, **how, say=functools.partial(print, flush=True))
        print(table_of_hangs(hung), flush=True)
        wrong += sum(len(tally.wrong) for tally in hung)
    if options.flips:
        write_small_run(folder / "small")
        outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        for said, outcome in flip_and_restore(folder / "small", folder, flips=options.flips, seed=options.seed):
            outcomes[said.split()[-1], outcome if outcome in FINE else "WRONG"] += 1
            if outcome not in FINE:
                print(f"{said}: {outcome}")
                wrong += 1
        print(table_of_damage(outcomes))
    if options.nans:
        if unknown := set(options.tasks) - set(LENGTHS):
            parser.error(f"--nans knows the tasks {', '.join(LENGTHS)}, not {', '.join(unknown)}")
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        how = {"runs": options.nans, "seed": options.seed, "say": functools.partial(print, flush=True)}
        spoilt = [spoil_and_compare(folder / "nans" / task, task=task, **how) for task in options.tasks]
        print(table_of_nans(spoilt))
        wrong += sum(len(tally.wrong) for tally in spoilt)
    print(f"{time.monotonic() - began:.0f} s")
    if wrong or options.keep:
        print(f"all is in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
