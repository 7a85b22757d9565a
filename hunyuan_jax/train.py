"""Trains any task: `python -m hunyuan_jax.train --config=configs/quickstart.py:vae --workdir DIR`.

The recipe in time order: setup (configuration, mesh, data, task), state or checkpoint, loop. Run again with the same arguments it continues
from the newest sound checkpoint, with the same samples and the same noise as if it had never stopped; a finished run says so. How it is
stopped: `stops.py`; what it does about steps that are not finite: `bad_steps.py`; what it keeps: `checkpoint.py`; what is watched
meanwhile: `metrics.py`, `block_norms.py`, `goodput.py`, `held_out.py`, `profiling.py`.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from clu import parameter_overview
from ml_collections import ConfigDict, config_flags

from hunyuan_jax import bad_steps, errors, metrics, stops
from hunyuan_jax.bad_steps import BadStep, BadSteps
from hunyuan_jax.checkpoint import Checkpoints, Keep, newest_step, write_model
from hunyuan_jax.data import loader
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, open_dataset, sha256_of, write_json
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.goodput import Ledger
from hunyuan_jax.held_out import HeldOut
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from hunyuan_jax.parallel import distributed
from hunyuan_jax.parallel.compiler_options import step_options
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding
from hunyuan_jax.profiling import Profiler
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.state import abstract_state, make_state
from hunyuan_jax.tasks import make_task
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.train_step import EmaConfig, TrainState, check_accumulation, configured_step
from hunyuan_jax.weights import LICENCE, LICENCE_KEY, differences, open_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long the loop runs and how often it does what; 0 means never.

    Kept are the `keep` newest checkpoints, those of every `keep_every` steps, and the best one by the held-out metric `keep_best`, such
    as "held_out/flow_loss/13x64x64"; `keep_best_most` says that more of it is better. After SIGTERM a run has `grace_seconds` to save. One
    in which nothing moves is ended: after `stall_seconds`, or ten times the longest so far, in what it has done before, and after
    `watchdog_seconds` in what it may have to compile. After `rollback_after` bad steps in a row it goes back to a checkpoint, and
    on with the data after them, up to `rollbacks` times. `tuned_compiler` compiles with all options of parallel/compiler_options.py.
    `block_norms` logs the norms of gradients and parameters block by block. The steps `profile_steps`, first and last, are profiled,
    and `profile_signal_steps` of them after SIGUSR1 (`profiling.py`).
    """

    steps: int
    log_every: int = 10
    checkpoint_every: int = 500
    measure_every: int = 0
    measure_samples: int = 64
    preview_every: int = 0
    preview_samples: int = 8
    preview_fps: float = 6.0
    keep: int = 2
    keep_every: int = 0
    keep_best: str = ""
    keep_best_most: bool = False
    grace_seconds: float = 60.0
    watchdog_seconds: float = 1800.0
    stall_seconds: float = 50.0
    rollback_after: int = 10
    rollbacks: int = 3
    tuned_compiler: bool = False
    block_norms: bool = True
    profile_steps: tuple[int, int] = (0, 0)
    profile_signal_steps: int = 5

    def __post_init__(self) -> None:
        if min(self.steps, self.checkpoint_every, self.log_every, self.keep) < 1:
            raise UserError("train: steps, log_every, checkpoint_every and keep must be at least 1.")
        not_negative = ("keep_every", "grace_seconds", "watchdog_seconds", "stall_seconds", "rollback_after", "rollbacks")
        if below := [f"{name}={getattr(self, name)}" for name in not_negative if getattr(self, name) < 0]:
            raise UserError(f"train: {', '.join(below)} must be at least 0.")
        if len(self.profile_steps) != 2 or not 0 <= self.profile_steps[0] <= self.profile_steps[1] or self.profile_signal_steps < 1:
            raise UserError(
                f"train: profile_steps are the first and the last step of a profile, (0, 0) for none, not {self.profile_steps}, and "
                f"profile_signal_steps must be at least 1, not {self.profile_signal_steps}."
            )
        if self.keep_best and (self.measure_every < 1 or self.checkpoint_every % self.measure_every):
            raise UserError("train: with keep_best every checkpoint needs measures; set checkpoint_every to a multiple of measure_every.")

    @property
    def kept(self) -> Keep:
        return Keep(last=self.keep, every=self.keep_every, best=self.keep_best, most=self.keep_best_most)


SECTIONS = ("task", "seed", "start", "data", "optimizer", "ema", "mesh", "train")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a configuration describes, built and checked; nothing is compiled or written yet."""

    loop: LoopConfig
    optimizer: OptimizerConfig
    ema: EmaConfig
    data: loader.DataConfig
    mesh: jax.sharding.Mesh
    dataset: Dataset
    schedule: Schedule
    task: Task

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Setup":
        for section in SECTIONS:
            if section not in config:
                raise UserError(f"The configuration has no section {section!r}; every training config has {', '.join(SECTIONS)}.")
        loop = build(LoopConfig, config.train, where="train")
        optimizer = build(OptimizerConfig, config.optimizer, where="optimizer")
        ema = build(EmaConfig, config.ema, where="ema")
        data = build(loader.DataConfig, config.data, where="data")
        buckets = [build(Bucket, bucket, where=f"data.buckets[{i}]") for i, bucket in enumerate(data.buckets)]
        mesh = make_mesh(build(MeshConfig, config.mesh, where="mesh"))
        dataset = open_dataset(data.path, kind=data.kind)
        schedule = loader.training_schedule(data, dataset, buckets=buckets, seed=config.seed)
        task = make_task(config, dataset)
        check_accumulation(optimizer.accumulate, task=task, buckets=buckets, mesh=mesh)
        return cls(loop, optimizer, ema, data, mesh, dataset, schedule, task)

    def held_out(self, workdir: Path, *, key: jax.Array) -> HeldOut:
        loop = self.loop
        return HeldOut(
            self.task, self.data, self.dataset, self.schedule.buckets,
            measured=loop.measure_samples if loop.measure_every else 0, shown=loop.preview_samples if loop.preview_every else 0,
            fps=loop.preview_fps, key=key, folder=workdir / "previews",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """What the loop knows beside the training state; each checkpoint has it, as JSON.

    `data` is the loader's position, None at the start; `left_out` how many steps of the data plan were passed over by going back, which
    was done `rollbacks` times; `unlogged` what the next line of the log averages; `lines` how many lines the metrics have; `owed` says
    that a stop came before what is due after this step was measured; `ledger` where the time went so far (`goodput.py`).
    """

    seed: int
    data: dict[str, Any] | None = None
    left_out: int = 0
    rollbacks: int = 0
    in_a_row: tuple[BadStep, ...] = ()
    unlogged: tuple[tuple[int, dict[str, Any]], ...] = ()
    lines: int | None = None
    owed: bool = False
    ledger: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, said: dict[str, Any], *, seed: int) -> "Position":
        """Raises `UserError` where the run began with another seed."""
        if "data" not in said:  # of a run from before there was more to know
            return cls(seed=seed, data=said)
        if said["seed"] != seed:
            raise UserError(
                f"This run was begun with seed {said['seed']}, not {seed} as the config says. Set it back, or choose a new --workdir."
            )
        rows = tuple(BadStep(**row) for row in said["in_a_row"])
        return cls(**{**said, "in_a_row": rows, "unlogged": tuple((bucket, values) for bucket, values in said["unlogged"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a training has from its first step to its last, whatever happens between."""

    setup: Setup
    workdir: Path
    make_state: Callable[[], TrainState]
    abstract: TrainState
    step_fn: Callable[[TrainState, VideoBatch], tuple[TrainState, dict[str, jax.Array]]]
    held_out: HeldOut
    checkpoints: Checkpoints
    stop: stops.Stop
    agreement: stops.Agreement
    watchdog: stops.Watchdog
    profiler: Profiler
    ledger: Ledger
    work: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)  # of a step, by the buckets whose steps are compiled

    @contextlib.contextmanager
    def at(self, phase: str, what: str, *, kind: Hashable = None, **how: Callable[[], bool]) -> Iterator[None]:
        """The time of what is done in this context belongs to a phase of the ledger, and the watchdog knows what it is, and its kind."""
        self.watchdog.doing(what, kind)
        with self.ledger.spending(phase, **how):
            yield

    def state_at(self, step: int | None) -> tuple[TrainState, Position]:
        """The checkpoint of `step`, or the beginning."""
        seed = self.setup.schedule.seed
        if step is None:
            return self.make_state(), Position(seed=seed)
        state, said = self.checkpoints.restore(step, self.abstract)
        return state, Position.from_json(said, seed=seed)


def train(config: ConfigDict, workdir: Path, *, stopped_code: int = 0) -> None:
    """Runs the training that `config` describes in `workdir`, from its newest sound checkpoint if there is one.

    Returns when all steps are done, or after SIGTERM with the step at hand saved, where a `stopped_code` other than 0 ends the process
    with it; after SIGINT likewise, by `KeyboardInterrupt`.
    Raises `UserError` for what a user can mend: a config, the disk, damaged checkpoints, numbers that do not stay finite.
    """
    ledger, last_sign = Ledger(), metrics.last_written(workdir)
    setup = Setup.from_config(config)
    loop = setup.loop
    open_folder(workdir, setup, config)

    with (
        stops.Stop(grace_seconds=loop.grace_seconds, code=stopped_code) as stop,
        stops.Watchdog(workdir, seconds=loop.watchdog_seconds, stall_seconds=loop.stall_seconds) as watchdog,
        Profiler(workdir, steps=loop.profile_steps, signal_steps=loop.profile_signal_steps) as profiler,
        jax.set_mesh(setup.mesh),
        contextlib.closing(Checkpoints(workdir, keep=loop.kept)) as checkpoints,
    ):
        stop.saved = lambda: checkpoints.committed
        run = make_run(config, setup, workdir, checkpoints=checkpoints, stop=stop, watchdog=watchdog, profiler=profiler, ledger=ledger)
        with run.at("restoring", "the restoring of a checkpoint, or the making of the first state"):
            state, position = run.state_at(checkpoints.newest_sound())
        if position.ledger is not None:
            ledger.resume(position.ledger, last_sign=last_sign)
        if int(state.step) >= loop.steps and not position.owed and not position.in_a_row:
            logging.info("%s: all %d steps are done", workdir, loop.steps)
            return
        if int(state.step) == 0:
            write_overview(workdir, state)
        while bad := take_steps(run, state, position, config=config):
            state, position = go_back(run, position, bad)
    if stop.done < loop.steps:
        logging.info("%s: stopped after step %d; the same command continues", workdir, stop.done)
        if stop.interrupted:
            raise KeyboardInterrupt
        if stopped_code:
            errors.leave(stopped_code)
    else:
        logging.info("%s: trained to step %d", workdir, loop.steps)


def make_run(config: ConfigDict, setup: Setup, workdir: Path, *, stop: stops.Stop, **rest: Any) -> Run:
    """The run, with its step yet to be compiled and its first state yet to be made; `rest` are fields of it that are at work already."""
    loop, settings, mesh, key = setup.loop, setup.optimizer, setup.mesh, jax.random.key(config.seed)
    what = {"task": setup.task, "optimizer": make_optimizer(settings), "mesh": mesh}
    what |= {"spike_window": settings.spike_window, "offload": settings.offload}
    agreement, abstract = stops.Agreement(stop, mesh), abstract_state(**what)
    step = configured_step(setup.task, settings, ema=setup.ema, key=key, block_norms=loop.block_norms)
    options = step_options(mesh.devices.flat[0].device_kind, tuned=loop.tuned_compiler)
    run = Run(
        setup=setup,
        workdir=workdir,
        make_state=functools.partial(make_state, **what, key=key, start=config.start),
        abstract=abstract,
        step_fn=agreement.jit(step, state=abstract, options=options),
        held_out=setup.held_out(workdir, key=key),
        stop=stop,
        agreement=agreement,
        **rest,
    )
    if loop.keep_best:
        run.held_out.check(loop.keep_best, abstract)
    return run


def open_folder(workdir: Path, setup: Setup, config: ConfigDict) -> None:
    """Makes the run's folder, or finds that it is of the same model, and says in it what is run and on what."""
    task, dataset = setup.task, setup.dataset
    if config.start and newest_step(workdir) is None:
        check_start(task, config.start)
    workdir.mkdir(parents=True, exist_ok=True)
    write_model(workdir, task.describe())
    task.keep_beside(workdir)
    if jax.process_index() == 0:  # a mounted bucket takes a file from one process at a time
        write_json(workdir / "config.json", config.to_dict())
        data = {"index": sha256_of(dataset.folder / "dataset.json"), "records": len(dataset.rows)}
        _replace(workdir / "data.json", data, compared=tuple(data), so="from here on other samples are read than would have been")
        _replace(workdir / "environment.json", metrics.environment(), compared=("python", "packages"), so="the same bits are not promised")


def write_overview(workdir: Path, state: TrainState) -> None:
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    logging.info("Parameters:\n%s", overview)
    if jax.process_index() == 0:
        (workdir / "parameters.txt").write_text(overview + "\n")


def take_steps(run: Run, state: TrainState, position: Position, *, config: ConfigDict) -> list[BadStep]:
    """Takes steps until all are done or the run is to stop, and saves them; returns early the bad steps it has to go back for."""
    loop, stop = run.setup.loop, run.stop
    start = stop.done = int(state.step)
    with run.ledger.spending("productive"), Course(run, state, position) as course:
        if course.bad.too_many:
            return course.bad.in_a_row
        if not course.opened(state, config):
            return []  # stopped once more, with nothing new to save
        for number in range(start, loop.steps):
            state = course.step(state, number)
            done = stop.done = number + 1
            if course.bad.too_many:
                return course.bad.in_a_row
            if done % loop.log_every == 0 or done == loop.steps:
                course.write_line(done)
            stopping = run.agreement.reached()
            measured = None if stopping else course.look(state, done)
            stopping = stopping or measured is None
            if stopping:
                stop.heed()
            if stopping or _due(done, loop.checkpoint_every, loop.steps):
                course.bad.look_at_all()
                if course.bad.too_many and not stopping:
                    return course.bad.in_a_row
                course.save(state, done, measured)
            if stopping:
                break
        with run.at("saving", "the saving of the last step"):
            run.checkpoints.wait()
    return []


class Course:
    """The steps from one restored state on: what they read, and what is known of them until it is written. A context manager."""

    def __init__(self, run: Run, state: TrainState, position: Position) -> None:
        setup, self._run, self._position, self._start = run.setup, run, position, int(state.step)
        self._schedule = dataclasses.replace(setup.schedule, left_out=position.left_out)
        self._batches = loader.Loader(
            setup.data, self._schedule, setup.dataset,
            sharding=batch_sharding(setup.mesh), steps=setup.loop.steps, workdir=run.workdir, start=self._start,
            encode=setup.task.encode_prompts, shapes=setup.task.batch_shapes,
        )  # fmt: skip
        if position.data is not None:
            self._batches.restore(position.data)
        self._learning_rate = make_schedule(setup.optimizer)
        self._throughput = metrics.Throughput(peak=metrics.peak_of(list(setup.mesh.devices.flat)))
        self._log = metrics.MetricLog(self._schedule.buckets, position.unlogged)
        self._last: Any = None  # the loss of the last step, to see whether the devices are still at work
        self._logged = (self._start, float(state.skipped))  # the step of the last line, and how many were skipped until then
        spikes = int(state.spikes.skipped) if state.spikes is not None else 0
        self.bad = BadSteps(limit=setup.loop.rollback_after, skipped=int(state.skipped) - spikes, spikes=spikes, in_a_row=position.in_a_row)

    def __enter__(self) -> "Course":
        self._writer = metrics.MetricWriter(self._run.workdir, start_step=self._start, lines=self._position.lines)
        self._bar = metrics.progress(self._run.setup.loop.steps, self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._writer.close()

    def opened(self, state: TrainState, config: ConfigDict) -> bool:
        """Writes what is due before the next step; False where a stop kept it from that."""
        loop, held_out = self._run.setup.loop, self._run.held_out
        self._writer.write_texts(self._start, {"config": f"```\n{config}\n```"})
        if self._position.owed and self.look(state, self._start) is None:
            return False
        if self._start == 0 and config.start and loop.measure_every:
            with self._run.at("measuring", "measuring before the first step"):
                self._writer.write_scalars(0, held_out.measure(state) or {})  # what the weights that were given are worth
        if self._start == 0 and loop.preview_every:
            with self._run.at("measuring", "the preview before the first step"):
                self._writer.write_videos(0, held_out.preview(state, 0), fps=loop.preview_fps)
        return True

    def step(self, state: TrainState, number: int) -> TrainState:
        """Reads the batch of step `number` (from 0) and takes the step."""
        run, step = self._run, number + 1
        bucket = self._schedule.step(number).bucket
        kind = ("batch", bucket) if number > self._start else None  # before the first nothing is read ahead
        with run.at("data", f"the reading of the batch of step {step}", kind=kind, hidden=self._at_work):
            batch = read_batch(self._batches, self._schedule, run.setup.dataset, number)
        if run.profiler.begins(step):
            with run.at("profiling", f"the beginning of a profile of step {step}"):
                run.profiler.begin(step, state)
        phase = "productive" if bucket in run.work else "compiling"
        with run.at(phase, f"the start of step {step}", kind=("step", bucket)), run.profiler.step(step):
            if bucket not in run.work:
                run.work[bucket] = run.setup.task.work(batch)
            state, values = run.step_fn(state, batch)
        if run.profiler.ends(step):
            with run.at("profiling", f"the writing of a profile up to step {step}"):
                run.profiler.end(state)
        self._last = values["loss"]
        run.watchdog.started(f"step {step}", bucket, self._last.is_ready)
        self._log.add(bucket, values)
        self._throughput.add(samples=len(batch.sample_id), **run.work[bucket])
        self._bar.update()
        self.bad.add(step, values)
        return state

    def _at_work(self) -> bool:
        """Whether the devices have not yet done the last step."""
        return self._last is not None and not self._last.is_ready()

    def write_line(self, done: int) -> None:
        """The averages of the steps since the last line, and what the machine says."""
        self._run.watchdog.doing(f"the line of the log after step {done}", "line")
        self._run.checkpoints.check()
        scalars = self._log.take()
        before, skipped = self._logged
        self._run.ledger.close_interval(steps=done - before, skipped=int(scalars["skipped"] - skipped))
        self._logged = (done, scalars["skipped"])
        scalars |= {"learning_rate": float(self._learning_rate(done - 1)), "quarantined": self._batches.quarantined(done)}
        scalars |= self._throughput.take() | self._run.ledger.scalars() | metrics.memory()
        self._writer.write_scalars(done, scalars)
        shown: dict[str, float] = {name: scalars[name] for name in ("loss", "time/samples_per_second", "time/mfu") if name in scalars}
        self._bar.set_postfix_str(metrics.format_line(done, shown), refresh=False)

    def look(self, state: TrainState, done: int) -> dict[str, float] | None:
        """Measures and shows what is due after step `done`; gives the measures, and None where a stop cut it short with nothing written."""
        run, loop, videos = self._run, self._run.setup.loop, {}
        measured: dict[str, float] | None = {}
        if _due(done, loop.measure_every, loop.steps):
            with run.at("measuring", f"measuring after step {done}", kind="measures"):
                measured = run.held_out.measure(state, stop=run.stop)
        if _due(done, loop.preview_every, loop.steps) and measured is not None and not run.stop.cuts_short:
            with run.at("measuring", f"the preview after step {done}", kind="preview"):
                videos = run.held_out.preview(state, done)
        elif _due(done, loop.preview_every, loop.steps):
            measured = None
        if measured:
            self._writer.write_scalars(done, measured)
            self._bar.write(metrics.format_line(done, measured))
        if videos:
            self._writer.write_videos(done, videos, fps=loop.preview_fps)
        return measured

    def save(self, state: TrainState, done: int, measured: dict[str, float] | None) -> None:
        """Begins to save the state after step `done` and all that going on from it takes; `measured` is None where that is owed."""
        run, loop = self._run, self._run.setup.loop
        with run.at("saving", f"the saving of step {done}", kind="saving"):
            self._writer.flush()
            position = dataclasses.replace(
                self._position,
                data=self._batches.state(),
                in_a_row=tuple(self.bad.in_a_row),
                unlogged=self._log.untaken(),
                lines=self._writer.lines,
                owed=measured is None,
                ledger=run.ledger.to_json(),
            )
            planned = _due(done, loop.checkpoint_every, loop.steps) and not self.bad.in_a_row
            run.checkpoints.save(done, state, data=dataclasses.asdict(position), planned=planned, metrics=measured)


def go_back(run: Run, position: Position, bad: list[BadStep]) -> tuple[TrainState, Position]:
    """The newest planned checkpoint from before the bad steps, or the beginning, and from there on the data after them.

    Raises `UserError` where the run has gone back as often as it may.
    """
    loop, first, last = run.setup.loop, bad[0].step, bad[-1].step
    run.profiler.end()
    with run.at("restoring", "the search for a checkpoint to go back to"):
        step = run.checkpoints.newest_sound(planned_before=first - 1)
    schedule = dataclasses.replace(run.setup.schedule, left_out=position.left_out)
    if jax.process_index() == 0:
        samples = functools.partial(samples_of, schedule, run.setup.dataset)
        bad_steps.write(run.workdir, bad, back_to=step or 0, time=position.rollbacks, samples=samples)
    said = f"The loss or the gradient of steps {first} to {last} was not finite ({run.workdir / bad_steps.FILE})"
    if position.rollbacks == loop.rollbacks:
        raise UserError(
            f"{said}, and the run has gone back {loop.rollbacks} times before. "
            "Look at these samples, lower optimizer.learning_rate, or raise train.rollbacks."
        )
    logging.warning("%s. The run goes back to step %d, and on with the data after them.", said, step or 0)
    run.checkpoints.leave_after(step or 0)
    with run.at("restoring", f"the going back to step {step or 0}"):
        state, saved = run.state_at(step)
    run.ledger.go_back(saved.ledger)
    left_out = position.left_out + last - (step or 0)
    return state, dataclasses.replace(saved, left_out=left_out, rollbacks=position.rollbacks + 1, in_a_row=())


def read_batch(batches: loader.Loader, schedule: Schedule, dataset: Dataset, number: int) -> VideoBatch:
    """The batch of step `number` (from 0); an error says which batch it was."""
    try:
        return next(batches)
    except Exception as error:
        read = samples_of(schedule, dataset, number + 1)
        said = f"The batch of step {number + 1} (bucket {read['bucket']}, samples {', '.join(read['samples'])}) could not be made: {error}"
        raise (UserError if isinstance(error, UserError) else RuntimeError)(said) from error


def samples_of(schedule: Schedule, dataset: Dataset, step: int) -> dict[str, Any]:
    """The bucket, records and epochs that `step` (from 1) reads."""
    read = schedule.step(step - 1)
    samples = [dataset.rows[row]["id"] for row in read.rows]
    return {"bucket": schedule.buckets[read.bucket].name, "samples": samples, "epochs": list(read.epochs)}


def _due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


def _replace(path: Path, value: dict[str, Any], *, compared: Sequence[str], so: str) -> None:
    """Writes what a start of the run found. A warning says where it is not what the start before found."""
    before: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.read_text())
    changed = [f"{name} was {before[name]} and is {value[name]}" for name in compared if before.get(name, value[name]) != value[name]]
    if changed:
        logging.warning("%s: %s; %s.", path.name, "; ".join(changed), so)
    write_json(path, value)


def check_start(task: Task, start: str) -> None:
    """Raises `UserError` where the weights to start from are not of the task's model."""
    weights = open_weights(start, component=task.component)
    there, here = (said.get("prediction", "velocity") for said in (weights.metadata, task.describe()))
    if there != here:
        raise UserError(f"The weights in {start} predict {there}, and the config says prediction={here!r}; set them alike.")
    if LICENCE_KEY in weights.metadata:
        logging.info("%s: %s", start, LICENCE)
    if different := differences(weights.config, task.model):
        raise UserError(f"The weights in {start} are of another model than the config's: {different}. Set the config's model alike.")


def _log_only_ours() -> None:
    """Our lines at INFO on process 0; of libraries only warnings, and no errors with a traceback, which reach us as exceptions too."""
    logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    logging.use_absl_handler()
    package = str(Path(__file__).parent)
    wanted = lambda record: record.pathname.startswith(package) or (record.levelno > 20 and not record.exc_info)  # noqa: E731
    logging.get_absl_handler().addFilter(wanted)


def main(argv: list[str]) -> None:
    config = config_flags.DEFINE_config_file("config", None, "Training configuration, such as configs/quickstart.py:vae.", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, previews.")
    about = "Exit code after SIGTERM; one other than 0 tells a cluster to start the run again."
    stopped_code = flags.DEFINE_integer("stopped_code", 0, about, lower_bound=0, upper_bound=255)
    parse_flags(argv, required=("config", "workdir"))
    distributed.initialize()
    _log_only_ours()
    train(config.value, Path(str(workdir.value)), stopped_code=int(stopped_code.value or 0))


if __name__ == "__main__":
    run_command(main)
