"""Checkpoints of a run: the training state and the data position, by Orbax, and what the model is, beside them.

WORKDIR/model.json           task, model and codec settings: what the parameters mean
WORKDIR/checkpoints/1200/    params, ema, rest (step, optimizer, critic), data (the loader's position); a folder under its
                             final name is whole, Orbax commits by renaming
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from hunyuan_jax.data.dataset import write_json
from hunyuan_jax.errors import UserError
from hunyuan_jax.tasks.task import Params
from hunyuan_jax.train_step import CriticState, TrainState

Kept = Literal["ema", "raw"]  # the averaged parameters, or the last ones


class Checkpoints:
    """The checkpoints of one run; the newest `keep` are kept."""

    def __init__(self, workdir: Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, *, data: dict[str, Any]) -> None:
        """Begins to write a checkpoint; training goes on meanwhile. Raises `UserError` where the disk has no room for it."""
        needed, free = _bytes_here(state), shutil.disk_usage(self._folder).free
        if needed > free:
            # Said beforehand, since the threads that write would each say it in their own way, at length.
            raise UserError(
                f"The disk is full: a checkpoint takes {needed / 1e6:.1f} MB, and {self._folder} has room for {free / 1e6:.1f} MB. "
                "Free some space, then run the same command again; it continues from the newest checkpoint."
            )
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            rest=ocp.args.StandardSave(_rest_of(state)),
            data=ocp.args.JsonSave(data),
        )
        self._manager.save(step, args=items)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the shapes and shardings of `abstract`, and the data position."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            ema=ocp.args.StandardRestore(abstract.ema),
            rest=ocp.args.StandardRestore(_rest_of(abstract)),
            data=ocp.args.JsonRestore(),
        )
        found = self._manager.restore(self.latest(), args=items)
        rest = dict(found.rest)
        critic = CriticState(**rest.pop("critic")) if "critic" in rest else None
        return TrainState(params=found.params, ema=found.ema, critic=critic, **rest), found.data

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


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
    """The step of the newest finished checkpoint, None where there is none."""
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder) as manager:
        return manager.latest_step()


def load_params(workdir: Path, abstract: Params, *, weights: Kept = "ema") -> tuple[Params, int]:
    """Parameters of the newest checkpoint, and its step, in the shapes and shardings of `abstract`."""
    folder, step = _newest(workdir, weights)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder, abstract), step
        except (ValueError, KeyError) as error:
            raise _of_another_model(workdir, str(error)[:300]) from error


def param_reader(workdir: Path, *, weights: Kept = "ema") -> tuple[Callable[[str, tuple[int, ...]], np.ndarray], int]:
    """A function that reads one parameter of the newest checkpoint, by its path and shape, into host memory; and the step."""
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
    """Where the newest checkpoint has its averaged or its raw parameters, and its step."""
    folder, step = (workdir / "checkpoints").absolute(), newest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} has no finished checkpoint yet. Train first; a run saves every train.checkpoint_every steps.")
    return folder / str(step) / {"ema": "ema", "raw": "params"}[weights], step


def _of_another_model(workdir: Path, said: str) -> UserError:
    return UserError(f"The checkpoint in {workdir} is of another model than its model.json says: {said}")
