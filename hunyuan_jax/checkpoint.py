"""Checkpoints of a run: the training state and what the loop knows, by Orbax, and what the model is, beside them.

WORKDIR/model.json                 task, model and codec settings: what the parameters mean
WORKDIR/checkpoints/1200/          params, ema, rest (step, optimizer, critic), data (the loop's position) and manifest.json;
                                   spikes, where steps are skipped for them: a run that begins to, or no longer does, goes on as well
WORKDIR/checkpoints/1200.saving/   one that is being written, or that a kill cut short; the next run removes it
WORKDIR/checkpoints/1200.damaged/  one that was found damaged: nothing reads, counts or deletes it
WORKDIR/checkpoints/1200.left/     one of a course that was left by a roll back: likewise
WORKDIR/lock                       who writes here at present; locked, so that nobody else does, until that process ends in whatever way

The manifest (`integrity.py`) is written when all else is on the disk, and then the folder gets its final name, which commits it. What a
checkpoint holds is verified whenever it is read: the newest sound one is used, with a warning about each newer one that is not.
Checkpoints of runs from before there were manifests are read with a notice, and get manifests when their run goes on.
"""

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from hunyuan_jax.data.dataset import write_json
from hunyuan_jax.errors import UserError
from hunyuan_jax.integrity import MANIFEST, DamagedError, read_manifest, sync, verify, write_manifest
from hunyuan_jax.spikes import Spikes, no_spikes
from hunyuan_jax.tasks.task import Params
from hunyuan_jax.train_step import CriticState, TrainState

Kept = Literal["ema", "raw"]  # the averaged parameters, or the last ones
FOLDERS = {"ema": "ema", "raw": "params"}
LOCK_SECONDS = 100.0  # that a run waits for the one before it to end; after the loss of a host NFS keeps a lock for 90 s
SPIKES = "spikes"
UNFINISHED = ("saving", "deleting")  # endings of folders that hold nothing whole
SAID_BYTES = 300  # of what one process tells the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay: the newest; the `last` newest planned ones; every `every` steps (0: none); the best one by `best`.

    `best` names a held-out metric (empty: none), and `most` says whether more of it is better. A checkpoint that was saved because the
    run was asked to stop is not planned: it stays only while it is the newest, so that what stays does not depend on stops.
    """

    last: int = 2
    every: int = 0
    best: str = ""
    most: bool = False

    def chosen(self, there: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Which of the checkpoints stay; `there` maps steps to manifests."""
        planned = sorted(step for step, said in there.items() if said["planned"])
        chosen = {max(there), *planned[-self.last :]} if there else set()
        if self.every:
            chosen |= {step for step in there if step % self.every == 0}
        rated = {step: said["metrics"][self.best] for step, said in there.items() if self.best in said["metrics"]}
        if rated:
            chosen.add(max(rated, key=lambda step: (rated[step] if self.most else -rated[step], step)))
        return chosen


class Checkpoints:
    """The checkpoints of one run, which is the only one that writes them. `committed` is the newest step that is safe on disk.

    Raises `UserError` where another run is at work there and stays so for LOCK_SECONDS.
    """

    def __init__(self, workdir: Path, *, keep: Keep = Keep()) -> None:
        self._folder, self._keep = (workdir / "checkpoints").absolute(), keep
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(workdir / "lock") if jax.process_index() == 0 else None
        if jax.process_index() == 0:
            _tidy(self._folder)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.committed = 0

    def newest_sound(self, *, planned_before: int | None = None) -> int | None:
        """The newest step whose checkpoint is what was written, None where there is no checkpoint; all processes find the same one.

        `planned_before` asks for planned ones up to that step. Newer ones that are damaged get that name, with a warning. Raises
        `UserError` where there are checkpoints and none of them is sound.
        """
        self.wait()
        self._adopt()
        wrong: dict[int, str] = {}
        for step in _agreed_steps(self._folder):
            try:
                planned = _verify_together(self._folder / str(step))["planned"]
            except DamagedError as error:
                wrong[step] = str(error)
                continue
            if planned_before is None or (planned and step <= planned_before):
                self._set_aside({s: said for s, said in wrong.items() if s > step}, used=step)
                self.committed = step
                return step
        if wrong and planned_before is None:
            raise _none_sound(self._folder, wrong)
        return None

    def save(
        self, step: int, state: TrainState, *, data: dict[str, Any], planned: bool = True, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Begins to write a checkpoint, and training goes on meanwhile; False where the state has a value that is not finite.

        Such a state is never written. `data` and `metrics` are JSON values. Raises `UserError` where the disk has no room for it
        and `OSError` where it cannot be written.
        """
        self.wait()
        if broken := not_finite(state):
            logging.warning("The state after step %d is not saved: %s has values that are not finite.", step, " and ".join(broken))
            return False
        # Both are said beforehand, since the threads that write would each say them in their own way, at length.
        tempfile.TemporaryFile(dir=self._folder).close()
        needed, free = _bytes_here(state), shutil.disk_usage(self._folder).free
        if needed > free:
            raise UserError(
                f"The disk is full: a checkpoint takes {needed / 1e6:.1f} MB, and {self._folder} has room for {free / 1e6:.1f} MB. "
                "Free some space, then run the same command again; it continues from the newest checkpoint."
            )
        more = {} if state.spikes is None else {SPIKES: ocp.args.StandardSave(_fields(state.spikes))}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            rest=ocp.args.StandardSave(_rest_of(state)),
            data=ocp.args.JsonSave(data),
            **more,
        )
        unfinished = self._folder / f"{step}.saving"
        self._checkpointer.save(unfinished, args=items, force=True)
        finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        said = {"step": step, "planned": planned, "metrics": finite}
        self._pending = self._background.submit(self._commit, unfinished, said)
        return True

    def _commit(self, unfinished: Path, said: dict[str, Any]) -> None:
        """Waits until Orbax has written all, gives the folder its manifest and its name, and removes what need not stay."""
        step = said["step"]
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            write_manifest(unfinished, said)
            final = self._folder / str(step)
            if final.exists():
                _rename_aside(final, _ending_of(final))
            os.rename(unfinished, final)
            sync(self._folder)
        self.committed = step
        if jax.process_index() == 0:
            self._remove_old()

    def _remove_old(self) -> None:
        """Removes what need not stay, after all that stays, and all that goes, has been read and found sound."""
        there = {step: manifest for step in _steps(self._folder) if (manifest := _manifest_or_none(self._folder / str(step)))}
        if self._keep.chosen(there) == set(there):
            return
        wrong = {}
        for step in list(there):
            try:
                verify(self._folder / str(step))
            except DamagedError as error:
                wrong[step] = str(error)
                del there[step]
        for step, problem in wrong.items():
            logging.warning("The checkpoint of step %d is damaged (%s); it is set aside and does not count.", step, problem)
            _rename_aside(self._folder / str(step), "damaged")
        for step in set(there) - self._keep.chosen(there):
            going = _rename_aside(self._folder / str(step), "deleting")
            shutil.rmtree(going)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The checkpoint of `step`, in the shapes and shardings of `abstract`, and what was saved as `data`.

        Spikes that it does not have, or has of another window, begin anew.
        """
        folder = self._folder / str(step)
        spikes = abstract.spikes
        more = {} if spikes is None or not _same_shapes(folder / SPIKES, spikes) else {SPIKES: ocp.args.StandardRestore(_fields(spikes))}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            ema=ocp.args.StandardRestore(abstract.ema),
            rest=ocp.args.StandardRestore(_rest_of(abstract)),
            data=ocp.args.JsonRestore(),
            **more,
        )
        found = self._checkpointer.restore(folder, args=items)
        rest = dict(found.rest)
        if spikes is not None:
            begin = jax.jit(lambda: no_spikes(len(spikes.norms)), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, spikes))
            rest["spikes"] = Spikes(**found[SPIKES]) if more else begin()
        critic = CriticState(**rest.pop("critic")) if "critic" in rest else None
        return TrainState(params=found.params, ema=found.ema, critic=critic, **rest), found.data

    def leave_after(self, step: int) -> None:
        """Sets aside all checkpoints after `step`: the run goes on from there on another course."""
        self.wait()
        if jax.process_index() == 0:
            for newer in _steps(self._folder):
                if newer > step:
                    _rename_aside(self._folder / str(newer), "left")
        _wait_for_all("left a course")
        self.committed = min(self.committed, step)

    def check(self) -> None:
        """Raises what has kept the last checkpoint from being written, if anything has; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Returns when what was saved is on disk under its final name, in every process."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
            _wait_for_all("a checkpoint is committed")

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()
            if self._lock is not None:
                self._lock.close()

    def _adopt(self) -> None:
        """Gives manifests to the checkpoints of a run from before there were any."""
        if jax.process_index() == 0 and (old := _without_manifests(self._folder)):
            logging.warning(
                "%s: the checkpoints of steps %s are from a version without checksums; what is there now counts as sound.",
                *(self._folder, ", ".join(map(str, old))),
            )
            for step in old:
                write_manifest(self._folder / str(step), {"step": step, "planned": True, "metrics": {}})
        _wait_for_all("adopted")

    def _set_aside(self, wrong: Mapping[int, str], *, used: int) -> None:
        if jax.process_index() == 0:
            for step, problem in wrong.items():
                logging.warning("The checkpoint of step %d is damaged: %s. The one of step %d is used.", step, problem, used)
                _rename_aside(self._folder / str(step), "damaged")
        _wait_for_all("set aside")


def not_finite(state: TrainState) -> list[str]:
    """Which parts of a state have values that are not finite. One pass over it on the devices."""
    parts = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state, "critic": state.critic}
    return [name for name, finite in jax.device_get(_finite(parts)).items() if not finite]


@jax.jit
def _finite(parts: dict[str, Any]) -> dict[str, jax.Array]:
    def of(part: Any) -> jax.Array:
        floats = [leaf for leaf in jax.tree.leaves(part) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))

    return {name: of(part) for name, part in parts.items()}


def _steps(folder: Path) -> list[int]:
    """The steps that have a folder under a final name, the newest first."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name) for path in there if re.fullmatch(r"\d+", path.name) and path.is_dir()), reverse=True)


def _agreed_steps(folder: Path) -> list[int]:
    """The steps that process 0 sees: a disk that is shared may show another process something else for a while."""
    steps = _steps(folder)
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int64(len(steps))))
    here = np.array((steps + [0] * count)[:count], np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(here)]


def _without_manifests(folder: Path) -> list[int]:
    """The steps of a run from before there were manifests: of its folders none has one."""
    steps = _steps(folder)
    return [] if any((folder / str(step) / MANIFEST).exists() for step in steps) else steps


def _manifest_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)
    except DamagedError:
        return None


def _verify_together(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, whose files the processes verify between them; raises `DamagedError` in all of them or in none."""
    said, manifest = "", {}
    try:
        manifest = verify(folder, share=(jax.process_index(), jax.process_count()))
    except DamagedError as error:
        said = str(error)
    if jax.process_count() > 1:
        padded = said.encode()[:SAID_BYTES].ljust(SAID_BYTES, b"\0")
        told = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
        said = next((text for row in told if (text := bytes(row).rstrip(b"\0").decode(errors="replace"))), "")
    if said:
        raise DamagedError(said)
    return manifest


def _lock(path: Path) -> IO[str]:
    """The file, locked until it is closed, by this process or by its end. A file system that knows no locks is no error."""
    file, deadline = path.open("a+"), time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder, left = file.read().strip() or "another process", deadline - time.monotonic()
            if left < 0:
                file.close()
                raise UserError(
                    f"{path.parent} belongs to a run that is at work, {holder}. Wait for its end or end it, or give another --workdir."
                ) from None
            logging.log_every_n_seconds(logging.WARNING, "%s is in use by %s; this run waits for its end.", 60, path.parent, holder)
            time.sleep(min(0.2, left + 0.01))
        except OSError as error:
            logging.warning("%s cannot be locked (%s): nothing keeps a second run out of this folder.", path, error.strerror)
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _tidy(folder: Path) -> None:
    """Removes what a run that was killed had not finished to write, or to delete."""
    for path in folder.iterdir():
        if re.fullmatch(rf"\d+\.({'|'.join(UNFINISHED)})(-\d+)?(\.orbax-checkpoint-tmp.*)?", path.name):
            shutil.rmtree(path)


def _rename_aside(path: Path, ending: str) -> Path:
    """Gives a folder a name that nothing reads, one that is free."""
    targets = (path.with_name(f"{path.name}.{ending}" + (f"-{number}" if number else "")) for number in range(1_000_000))
    target = next(target for target in targets if not target.exists())
    os.rename(path, target)
    sync(path.parent)
    return target


def _ending_of(path: Path) -> str:
    """What to call a checkpoint in whose place another comes."""
    try:
        verify(path)
    except DamagedError:
        return "damaged"
    return "left"


def _none_sound(folder: Path, wrong: Mapping[int, str]) -> UserError:
    each = "; ".join(f"step {step}: {problem}" for step, problem in wrong.items())
    return UserError(
        f"No checkpoint in {folder} is sound: {each}. Restore one of these folders from a copy, or give another --workdir to begin anew."
    )


def _fields(spikes: Spikes) -> dict[str, Any]:
    return {field.name: getattr(spikes, field.name) for field in dataclasses.fields(spikes)}


def _same_shapes(folder: Path, spikes: Spikes) -> bool:
    """Whether spikes were saved in `folder`, of as many norms."""
    if not folder.exists():
        return False
    with ocp.StandardCheckpointer() as checkpointer:
        there = checkpointer.metadata(folder).item_metadata["norms"].shape
    return tuple(there) == spikes.norms.shape


def _rest_of(state: TrainState) -> dict[str, Any]:
    """What a checkpoint has beside the model's parameters; a critic only where there is one."""
    rest = {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}
    return rest if state.critic is None else rest | {"critic": {"params": state.critic.params, "opt_state": state.critic.opt_state}}


def _bytes_here(tree: Any) -> int:
    """What this process writes of a tree of arrays: of each piece one copy."""
    pieces = (piece for leaf in jax.tree.leaves(tree) for piece in leaf.addressable_shards if piece.replica_id == 0)
    return sum(piece.data.nbytes for piece in pieces)


def write_model(workdir: Path, model: dict[str, Any]) -> None:
    """Says beside the checkpoints what they are; an existing other model is a `UserError`."""
    path = workdir / "model.json"
    if path.exists() and (there := json.loads(path.read_text())) != json.loads(json.dumps(model)):
        changed = sorted(key for key in there.keys() | model.keys() if there.get(key) != json.loads(json.dumps(model)).get(key))
        raise UserError(
            f"{workdir} holds checkpoints of another model: its {', '.join(changed)} differs. "
            "Choose another --workdir, or the config it was made with."
        )
    write_json(path, model)


def read_model(workdir: Path) -> dict[str, Any]:
    """What the checkpoints in `workdir` are. Raises `UserError` where there are none."""
    try:
        return json.loads((workdir / "model.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{workdir} holds no training run: model.json is missing. Give the --workdir of a run of hunyuan_jax.train."
        ) from None
    except ValueError as error:
        raise UserError(f"{workdir / 'model.json'} cannot be read: {error}.") from error


def newest_step(workdir: Path) -> int | None:
    """The step of the newest finished checkpoint, sound or not; None where there is none."""
    return next(iter(_steps(workdir / "checkpoints")), None)


def load_params(workdir: Path, abstract: Params, *, weights: Kept = "ema") -> tuple[Params, int]:
    """Parameters of the newest sound checkpoint, and its step, in the shapes and shardings of `abstract`."""
    folder, step = _newest(workdir, weights)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder, abstract), step
        except (ValueError, KeyError) as error:
            raise _of_another_model(workdir, str(error)[:300]) from error


def param_reader(workdir: Path, *, weights: Kept = "ema") -> tuple[Callable[[str, tuple[int, ...]], np.ndarray], int]:
    """A function that reads one parameter of the newest sound checkpoint, by its path and shape, into host memory; and the step."""
    folder, step = _newest(workdir, weights)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def read(path: str, shape: tuple[int, ...]) -> np.ndarray:
        wanted = traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(shape, np.float32)}, sep="/")
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        try:
            found = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True))
        except (ValueError, KeyError) as error:
            raise _of_another_model(workdir, str(error)[:300]) from error
        (value,) = jax.tree.leaves(found)
        if value.shape != shape:
            raise _of_another_model(workdir, f"{path} has shape {value.shape} and not {shape}.")
        return value

    return read, step


def _newest(workdir: Path, weights: Kept) -> tuple[Path, int]:
    """Where the newest sound checkpoint has its averaged or its raw parameters, and its step."""
    folder, part = (workdir / "checkpoints").absolute(), FOLDERS[weights]
    steps, wrong = _steps(folder), {}
    if not steps:
        raise UserError(f"{workdir} has no finished checkpoint yet. Train first; a run saves every train.checkpoint_every steps.")
    if _without_manifests(folder):
        logging.warning("%s: the checkpoints have no checksums, since an earlier version wrote them; nothing is verified.", folder)
        return folder / str(steps[0]) / part, steps[0]
    for step in steps:
        try:
            verify(folder / str(step), parts=(part,))
        except DamagedError as error:
            wrong[step] = str(error)
            continue
        for newer, problem in wrong.items():
            logging.warning("The checkpoint of step %d is damaged: %s. The one of step %d is used.", newer, problem, step)
        return folder / str(step) / part, step
    raise _none_sound(folder, wrong)


def _of_another_model(workdir: Path, said: str) -> UserError:
    return UserError(f"The checkpoint in {workdir} is of another model than its model.json says: {said}")
