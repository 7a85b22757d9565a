"""Trains any task: `python -m hunyuan_jax.train --config=configs/quickstart.py:vae --workdir DIR`.

The recipe in time order: setup (configuration, mesh, data, task), state or checkpoint, loop. Run again with the same arguments it continues
from the newest sound checkpoint, with the same samples and the same noise as if it had never stopped; a finished run says so. How it is
stopped: `stops.py`; what it does about steps that are not finite: `bad_steps.py`; what it keeps: `checkpoint.py`.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from clu import parameter_overview
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from hunyuan_jax import bad_steps, convert, errors, metrics, stops
from hunyuan_jax.bad_steps import BadStep, BadSteps
from hunyuan_jax.checkpoint import Checkpoints, Keep, newest_step, write_model
from hunyuan_jax.data import loader
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, open_dataset, sha256_of, write_json
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError, nearest, run_command
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from hunyuan_jax.parallel import distributed
from hunyuan_jax.parallel.compiler_options import step_options
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings, path_of, replicated
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.tasks import make_task
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.train_step import CriticState, EmaConfig, TrainState, check_accumulation, init_critic_state, init_state, make_step
from hunyuan_jax.video_io import write_video
from hunyuan_jax.weights import LICENCE, LICENCE_KEY, differences, open_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long the loop runs and how often it does what; 0 means never.

    Kept are the `keep` newest checkpoints, those of every `keep_every` steps, and the best one by the held-out metric `keep_best`, such
    as "held_out/flow_loss/13x64x64"; `keep_best_most` says that more of it is better. After SIGTERM a run has `grace_seconds` to save, and
    one that does not move for `watchdog_seconds` is ended. After `rollback_after` bad steps in a row it goes back to a checkpoint, and
    on with the data after them, up to `rollbacks` times. `tuned_compiler` compiles with all options of parallel/compiler_options.py.
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
    rollback_after: int = 10
    rollbacks: int = 3
    tuned_compiler: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.checkpoint_every, self.log_every, self.keep) < 1:
            raise UserError("train: steps, log_every, checkpoint_every and keep must be at least 1.")
        if min(self.keep_every, self.grace_seconds, self.watchdog_seconds, self.rollback_after, self.rollbacks) < 0:
            raise UserError("train: keep_every, grace_seconds, watchdog_seconds, rollback_after and rollbacks must be at least 0.")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """What the loop knows beside the training state; each checkpoint has it, as JSON.

    `data` is the loader's position, None at the start; `left_out` how many steps of the data plan were passed over by going back, which
    was done `rollbacks` times; `unlogged` what the next line of the log averages; `lines` how many lines the metrics have; `owed` says
    that a stop came before what is due after this step was measured.
    """

    seed: int
    data: dict[str, Any] | None = None
    left_out: int = 0
    rollbacks: int = 0
    in_a_row: tuple[BadStep, ...] = ()
    unlogged: tuple[tuple[int, dict[str, float]], ...] = ()
    lines: int | None = None
    owed: bool = False

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
    held_out: "HeldOut"
    checkpoints: Checkpoints
    stop: stops.Stop
    agreement: stops.Agreement
    watchdog: stops.Watchdog

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
    setup = Setup.from_config(config)
    loop, task, mesh = setup.loop, setup.task, setup.mesh
    if config.start and newest_step(workdir) is None:
        check_start(task, config.start)

    workdir.mkdir(parents=True, exist_ok=True)
    write_model(workdir, task.describe())
    task.keep_beside(workdir)
    if jax.process_index() == 0:  # a mounted bucket takes a file from one process at a time
        write_json(workdir / "config.json", config.to_dict())
        data = {"index": sha256_of(setup.dataset.folder / "dataset.json"), "records": len(setup.dataset.rows)}
        _replace(workdir / "data.json", data, compared=tuple(data), so="from here on other samples are read than would have been")
        _replace(workdir / "environment.json", metrics.environment(), compared=("python", "packages"), so="the same bits are not promised")

    optimizer = make_optimizer(setup.optimizer)
    key = jax.random.key(config.seed)
    step = make_step(task, optimizer, ema=setup.ema, key=key, accumulate=setup.optimizer.accumulate)
    with (
        stops.Stop(grace_seconds=loop.grace_seconds, code=stopped_code) as stop,
        stops.Watchdog(workdir, seconds=loop.watchdog_seconds) as watchdog,
        jax.set_mesh(mesh),
        contextlib.closing(Checkpoints(workdir, keep=loop.kept)) as checkpoints,
    ):
        stop.saved = lambda: checkpoints.committed
        agreement = stops.Agreement(stop, mesh)
        abstract = abstract_state(task, optimizer, mesh)
        options = step_options(mesh.devices.flat[0].device_kind, tuned=loop.tuned_compiler)
        run = Run(
            setup=setup,
            workdir=workdir,
            make_state=lambda: make_state(task, optimizer, key=key, mesh=mesh, start=config.start),
            abstract=abstract,
            step_fn=agreement.jit(step, state=abstract, options=options),
            held_out=HeldOut(setup, key=key, workdir=workdir),
            checkpoints=checkpoints,
            stop=stop,
            agreement=agreement,
            watchdog=watchdog,
        )
        if loop.keep_best:
            run.held_out.check(loop.keep_best, run.abstract)
        state, position = run.state_at(checkpoints.newest_sound())
        if int(state.step) >= loop.steps and not position.owed and not position.in_a_row:
            logging.info("%s: all %d steps are done", workdir, loop.steps)
            return
        if int(state.step) == 0:
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            logging.info("Parameters:\n%s", overview)
            if jax.process_index() == 0:
                (workdir / "parameters.txt").write_text(overview + "\n")
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


def take_steps(run: Run, state: TrainState, position: Position, *, config: ConfigDict) -> list[BadStep]:
    """Takes steps until all are done or the run is to stop, and saves them; returns early the bad steps it has to go back for."""
    setup, loop, checkpoints, stop, watchdog = run.setup, run.setup.loop, run.checkpoints, run.stop, run.watchdog
    start = stop.done = int(state.step)
    schedule = dataclasses.replace(setup.schedule, left_out=position.left_out)
    batches = loader.Loader(
        setup.data, schedule, setup.dataset, sharding=batch_sharding(setup.mesh), steps=loop.steps, encode=setup.task.encode_prompts
    )
    if position.data is not None:
        batches.restore(position.data)
    learning_rate, throughput = make_schedule(setup.optimizer), metrics.Throughput()
    log = MetricLog([bucket.name for bucket in schedule.buckets], position.unlogged)
    bad = BadSteps(limit=loop.rollback_after, skipped=int(state.skipped), in_a_row=position.in_a_row)
    if bad.too_many:
        return bad.in_a_row
    with (
        contextlib.closing(metrics.MetricWriter(run.workdir, start_step=start, lines=position.lines)) as writer,
        metrics.progress(loop.steps, start) as bar,
    ):
        writer.write_texts(start, {"config": f"```\n{config}\n```"})
        if position.owed and look(run, state, start, writer=writer, bar=bar) is None:
            return []  # stopped once more, with nothing new to save
        if start == 0 and config.start and loop.measure_every:
            writer.write_scalars(0, run.held_out.measure(state) or {})  # what the weights that were given are worth

        for number in range(start, loop.steps):
            watchdog.doing(f"the reading of the batch of step {number + 1}")
            batch = read_batch(batches, schedule, setup.dataset, number)
            watchdog.doing(f"step {number + 1}")
            state, values = run.step_fn(state, batch)
            log.add(schedule.step(number).bucket, values)
            throughput.add(len(batch.sample_id))
            done = stop.done = number + 1
            bar.update()
            bad.add(done, values)
            if bad.too_many:
                return bad.in_a_row
            if done % loop.log_every == 0 or done == loop.steps:
                checkpoints.check()
                scalars = log.take() | {"learning_rate": float(learning_rate(number)), "samples_per_second": throughput.rate()}
                writer.write_scalars(done, scalars)
                bar.set_postfix_str(metrics.format_line(done, {k: scalars[k] for k in ("loss", "samples_per_second")}), refresh=False)
            stopping = run.agreement.reached()
            measured = None if stopping else look(run, state, done, writer=writer, bar=bar)
            stopping = stopping or measured is None
            if stopping:
                stop.heed()
            if stopping or _due(done, loop.checkpoint_every, loop.steps):
                watchdog.doing(f"the saving of step {done}")
                bad.look_at_all()
                if bad.too_many and not stopping:
                    return bad.in_a_row
                writer.flush()
                position = dataclasses.replace(
                    position,
                    data=batches.state(),
                    in_a_row=tuple(bad.in_a_row),
                    unlogged=log.untaken(),
                    lines=writer.lines,
                    owed=measured is None,
                )
                planned = _due(done, loop.checkpoint_every, loop.steps) and not bad.in_a_row
                checkpoints.save(done, state, data=dataclasses.asdict(position), planned=planned, metrics=measured)
            if stopping:
                break
        watchdog.doing("the saving of the last step")
        checkpoints.wait()
    return []


def look(run: Run, state: TrainState, done: int, *, writer: metrics.MetricWriter, bar: Any) -> dict[str, float] | None:
    """Measures and shows what is due after step `done`; gives the measures, and None where a stop cut it short with nothing written."""
    loop, videos = run.setup.loop, {}
    measured: dict[str, float] | None = {}
    if _due(done, loop.measure_every, loop.steps):
        run.watchdog.doing(f"measuring after step {done}")
        measured = run.held_out.measure(state, stop=run.stop)
    if _due(done, loop.preview_every, loop.steps) and measured is not None and not run.stop.cuts_short:
        run.watchdog.doing(f"the preview after step {done}")
        videos = run.held_out.preview(state, done)
    elif _due(done, loop.preview_every, loop.steps):
        measured = None
    if measured:
        writer.write_scalars(done, measured)
        bar.write(metrics.format_line(done, measured))
    if videos:
        writer.write_videos(done, videos, fps=loop.preview_fps)
    return measured


def go_back(run: Run, position: Position, bad: list[BadStep]) -> tuple[TrainState, Position]:
    """The newest planned checkpoint from before the bad steps, or the beginning, and from there on the data after them.

    Raises `UserError` where the run has gone back as often as it may.
    """
    loop, first, last = run.setup.loop, bad[0].step, bad[-1].step
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
    state, saved = run.state_at(step)
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


def abstract_state(task: Task, optimizer: Any, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state, without memory."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_state(task.init(key), optimizer, init_critic_state(task, key)))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, state_shardings(shapes, mesh))


def make_state(task: Task, optimizer: Any, *, key: jax.Array, mesh: jax.sharding.Mesh, start: str = "") -> TrainState:
    """The initial state, made in place on the mesh: from random parameters, or from the weights at `start`, in any layout.

    A critic is fresh in either case.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, optimizer, mesh))
    critic = lambda: init_critic_state(task, jax.random.fold_in(key, 0xC217))  # noqa: E731
    if start:
        by_path = traverse_util.flatten_dict(shardings.params, sep="/")
        params = convert.load(start, task.component, shardings=by_path)[1]
        return jax.jit(lambda params: init_state(params, optimizer, critic()), out_shardings=shardings)(params)
    init = lambda: init_state(task.init(jax.random.fold_in(key, 0x1417)), optimizer, critic())  # noqa: E731
    return jax.jit(init, out_shardings=shardings)()


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> Any:
    """Parameters by their table; what an optimizer keeps for a parameter like that parameter; the rest whole everywhere."""
    params, opt_state = _shardings_of(state.params, state.opt_state, mesh)
    critic = state.critic
    if critic is not None:
        critic = CriticState(*_shardings_of(critic.params, critic.opt_state, mesh))
    whole = replicated(mesh)
    return TrainState(step=whole, skipped=whole, params=params, ema=params, opt_state=opt_state, critic=critic)  # type: ignore[arg-type]


def _shardings_of(params: Any, opt_state: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    by_params, whole = param_shardings(params, mesh), replicated(mesh)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(by_params), strict=True)
    homes = {path_of(path): _homes(leaf.shape, place) for (path, leaf), place in leaves}

    def place(path: Any, leaf: Any) -> Any:
        """The optimizer's path to an array that belongs to a parameter ends with that parameter's path."""
        names = path_of(path).split("/")
        owners = ("/".join(names[start:]) for start in range(len(names)))
        return next((homes[name][leaf.shape] for name in owners if leaf.shape in homes.get(name, {})), whole)

    return by_params, jax.tree_util.tree_map_with_path(place, opt_state)


def _homes(shape: tuple[int, ...], place: NamedSharding) -> dict[tuple[int, ...], NamedSharding]:
    """Where what belongs to a parameter lies, by shape: as the parameter, and a mean along one of its axes as the others do."""
    axes = tuple(place.spec)
    rests = [(shape[:n] + shape[n + 1 :], PartitionSpec(*axes[:n], *axes[n + 1 :])) for n in range(len(shape))]
    return {rest: NamedSharding(place.mesh, spec) for rest, spec in rests} | {shape: place}


class MetricLog:
    """Averages of what steps return, overall and by bucket; values stay on the device until they are taken."""

    def __init__(self, buckets: Sequence[str], untaken: Sequence[tuple[int, dict[str, float]]] = ()) -> None:
        self._buckets = buckets
        self._values: list[tuple[int, dict[str, Any]]] = list(untaken)

    def add(self, bucket: int, values: dict[str, jax.Array]) -> None:
        self._values.append((bucket, values))

    def untaken(self) -> tuple[tuple[int, dict[str, float]], ...]:
        """What the next `take` will average: with it another log continues this one."""
        return tuple((bucket, {k: float(v) for k, v in values.items()}) for bucket, values in jax.device_get(self._values))

    def take(self) -> dict[str, float]:
        """The averages since the last call."""
        rows = self.untaken()
        self._values = []
        out = {name: float(np.mean([row[name] for _, row in rows])) for name in rows[0][1]}
        out["skipped"] = rows[-1][1]["skipped"]
        for bucket in sorted({bucket for bucket, _ in rows}):
            out[f"loss/{self._buckets[bucket]}"] = float(np.mean([row["loss"] for b, row in rows if b == bucket]))
        return out


class HeldOut:
    """What is asked of the averaged weights while they train: metrics of held-out clips, and previews."""

    def __init__(self, setup: Setup, *, key: jax.Array, workdir: Path):
        loop, task = setup.loop, setup.task
        self._task, self._key, self._loop, self._folder = task, jax.random.fold_in(key, 0xE7A1), loop, workdir / "previews"
        self._measure = jax.jit(lambda params, batch: task.measure(params, batch, key=self._key))
        self._batches: dict[str, list[VideoBatch]] = {}
        buckets = [bucket for bucket in setup.schedule.buckets if bucket.share > 0]
        select = functools.partial(loader.held_out_batches, setup.data, setup.dataset, encode=task.encode_prompts)
        if loop.measure_every:
            self._batches = {bucket.name: select(bucket, limit=loop.measure_samples) for bucket in buckets}
        self._shown: VideoBatch | None = None
        if loop.preview_every:
            longest = max(buckets, key=lambda b: (b.frames, b.height * b.width))
            shown = select(dataclasses.replace(longest, batch=loop.preview_samples), limit=loop.preview_samples)
            if not shown:
                raise UserError("No held-out clip is left for previews; raise data.held_out, add clips, or set train.preview_every to 0.")
            self._shown = shown[0]

    def check(self, name: str, abstract: TrainState) -> None:
        """Raises `UserError` where no held-out metric has that name."""
        shapes = {bucket: jax.eval_shape(self._measure, abstract.ema, batches[0]) for bucket, batches in self._batches.items() if batches}
        known = [_held_out_name(metric, bucket) for bucket, found in shapes.items() for metric in found]
        if name not in known:
            raise UserError(f"train.keep_best: there is no held-out metric {name!r}. {nearest(name, known)}")

    def measure(self, state: TrainState, *, stop: stops.Stop | None = None) -> dict[str, float] | None:
        """Means over the held-out samples of each bucket, as `held_out/METRIC/BUCKET`; None where `stop` cut it short."""
        out = {}
        for name, batches in self._batches.items():
            rows = []
            for batch in batches:
                if stop is not None and stop.cuts_short:
                    return None
                rows.append(jax.device_get(self._measure(state.ema, jax.tree.map(jnp.asarray, batch))))
            for metric in rows[0] if rows else ():
                out[_held_out_name(metric, name)] = float(np.mean(np.concatenate([row[metric] for row in rows])))
        return out

    def preview(self, state: TrainState, done: int) -> dict[str, np.ndarray]:
        """The task's preview of the averaged weights, also written as one mp4 with the clips side by side."""
        videos = self._task.preview(state.ema, jax.tree.map(jnp.asarray, self._shown), key=self._key)
        self._folder.mkdir(exist_ok=True)
        if jax.process_index() == 0:
            wide = np.concatenate([np.concatenate(list(clips), axis=2) for clips in videos.values()], axis=1)
            write_video(self._folder / f"step_{done:08d}.mp4", wide, fps=self._loop.preview_fps)
        return videos


def _held_out_name(metric: str, bucket: str) -> str:
    return f"held_out/{metric.removesuffix('_db')}/{bucket}" + ("_db" if metric.endswith("_db") else "")


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
