"""Trains any task: `python -m hunyuan_jax.train --config=configs/quickstart.py:vae --workdir DIR`.

The recipe in time order: setup (configuration, mesh, data, task), state or checkpoint, loop. Run again with the same arguments it continues
from the newest checkpoint, with the same samples and the same noise as if it had never stopped; a finished run says so.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from clu import parameter_overview
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from hunyuan_jax import convert, metrics
from hunyuan_jax.checkpoint import Checkpoints, newest_step, write_model
from hunyuan_jax.data import loader
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, open_dataset, write_json
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings, path_of, replicated
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.tasks import make_task
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.train_step import CriticState, EmaConfig, TrainState, init_critic_state, init_state, make_step
from hunyuan_jax.video_io import write_video
from hunyuan_jax.weights import LICENCE, LICENCE_KEY, differences, open_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long the loop runs and how often it does what; 0 means never."""

    steps: int
    log_every: int = 10
    checkpoint_every: int = 500
    measure_every: int = 0
    measure_samples: int = 64
    preview_every: int = 0
    preview_samples: int = 8
    preview_fps: float = 6.0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1 or self.log_every < 1:
            raise UserError("train: steps, log_every and checkpoint_every must be at least 1.")


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
        return cls(loop, optimizer, ema, data, mesh, dataset, schedule, make_task(config, dataset))


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs the training that `config` describes in `workdir`, from its newest checkpoint if there is one."""
    setup = Setup.from_config(config)
    loop, task, mesh, schedule = setup.loop, setup.task, setup.mesh, setup.schedule
    if config.start and newest_step(workdir) is None:
        check_start(task, config.start)

    workdir.mkdir(parents=True, exist_ok=True)
    write_model(workdir, task.describe())
    task.keep_beside(workdir)
    write_json(workdir / "config.json", config.to_dict())
    write_json(workdir / "environment.json", metrics.environment())

    optimizer = make_optimizer(setup.optimizer)
    key = jax.random.key(config.seed)
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(workdir, keep=loop.keep)) as checkpoints:
        batches = loader.Loader(
            setup.data, schedule, setup.dataset, sharding=batch_sharding(mesh), steps=loop.steps, encode=task.encode_prompts
        )
        if checkpoints.latest() is None:
            state = make_state(task, optimizer, key=key, mesh=mesh, start=config.start)
        else:
            state, position = checkpoints.restore(abstract_state(task, optimizer, mesh))
            batches.restore(position)
        start = int(state.step)
        if start >= loop.steps:
            logging.info("%s: all %d steps are done", workdir, loop.steps)
            return
        if start == 0:
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            logging.info("Parameters:\n%s", overview)
            (workdir / "parameters.txt").write_text(overview + "\n")

        step_fn = jax.jit(make_step(task, optimizer, ema=setup.ema, key=key), donate_argnums=0)
        held_out = HeldOut(setup, key=key, workdir=workdir)
        writer = metrics.MetricWriter(workdir, start_step=start)
        writer.write_texts(start, {"config": f"```\n{config}\n```"})
        bar = metrics.progress(loop.steps, start)
        learning_rate = make_schedule(setup.optimizer)
        throughput = metrics.Throughput()
        log = MetricLog([b.name for b in schedule.buckets])
        if start == 0 and config.start and loop.measure_every:
            writer.write_scalars(0, held_out.measure(state))  # what the weights that were given are worth

        for number in range(start, loop.steps):
            batch = next(batches)
            state, values = step_fn(state, batch)
            log.add(schedule.step(number).bucket, values)
            throughput.add(len(batch.sample_id))
            done = number + 1
            bar.update()
            if done % loop.log_every == 0 or done == loop.steps:
                scalars = log.take() | {"learning_rate": float(learning_rate(number)), "samples_per_second": throughput.rate()}
                writer.write_scalars(done, scalars)
                bar.set_postfix_str(metrics.format_line(done, {k: scalars[k] for k in ("loss", "samples_per_second")}), refresh=False)
            if _due(done, loop.measure_every, loop.steps):
                scalars = held_out.measure(state)
                writer.write_scalars(done, scalars)
                bar.write(metrics.format_line(done, scalars))
            if _due(done, loop.preview_every, loop.steps):
                writer.write_videos(done, held_out.preview(state, done), fps=loop.preview_fps)
            if _due(done, loop.checkpoint_every, loop.steps):
                writer.flush()
                checkpoints.save(done, state, data=batches.state())
        bar.close()
        checkpoints.wait()
        writer.close()
    logging.info("%s: trained to step %d", workdir, loop.steps)


def _due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


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
    known = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = {path_of(path): place for path, place in jax.tree_util.tree_leaves_with_path(by_params)}

    def place(path: Any, leaf: Any) -> Any:
        """The optimizer's path to an array that belongs to a parameter ends with that parameter's path."""
        names = path_of(path).split("/")
        owners = ("/".join(names[start:]) for start in range(len(names)))
        return next((places[name] for name in owners if known.get(name) == leaf.shape), whole)

    return by_params, jax.tree_util.tree_map_with_path(place, opt_state)


class MetricLog:
    """Averages of what steps return, overall and by bucket; values stay on the device until they are taken."""

    def __init__(self, buckets: Sequence[str]) -> None:
        self._buckets = buckets
        self._values: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, bucket: int, values: dict[str, jax.Array]) -> None:
        self._values.append((bucket, values))

    def take(self) -> dict[str, float]:
        """The averages since the last call."""
        rows = [(bucket, {k: float(v) for k, v in values.items()}) for bucket, values in jax.device_get(self._values)]
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

    def measure(self, state: TrainState) -> dict[str, float]:
        """Means over the held-out samples of each bucket, as `held_out/METRIC/BUCKET`."""
        out = {}
        for name, batches in self._batches.items():
            rows = [jax.device_get(self._measure(state.ema, jax.tree.map(jnp.asarray, batch))) for batch in batches]
            for metric in rows[0] if rows else ():
                out[f"held_out/{metric.removesuffix('_db')}/{name}" + ("_db" if metric.endswith("_db") else "")] = float(
                    np.mean(np.concatenate([row[metric] for row in rows]))
                )
        return out

    def preview(self, state: TrainState, done: int) -> dict[str, np.ndarray]:
        """The task's preview of the averaged weights, also written as one mp4 with the clips side by side."""
        videos = self._task.preview(state.ema, jax.tree.map(jnp.asarray, self._shown), key=self._key)
        self._folder.mkdir(exist_ok=True)
        if jax.process_index() == 0:
            wide = np.concatenate([np.concatenate(list(clips), axis=2) for clips in videos.values()], axis=1)
            write_video(self._folder / f"step_{done:08d}.mp4", wide, fps=self._loop.preview_fps)
        return videos


def _log_only_ours() -> None:
    """Our lines at INFO on process 0; of libraries only warnings."""
    logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    logging.use_absl_handler()
    package = str(Path(__file__).parent)
    logging.get_absl_handler().addFilter(lambda record: record.levelno > 20 or record.pathname.startswith(package))


def main(argv: list[str]) -> None:
    config = config_flags.DEFINE_config_file("config", None, "Training configuration, such as configs/quickstart.py:vae.", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, previews.")
    parse_flags(argv, required=("config", "workdir"))
    _log_only_ours()
    train(config.value, Path(str(workdir.value)))


if __name__ == "__main__":
    run_command(main)
