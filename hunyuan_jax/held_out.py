"""What is asked of held-out clips while a model trains: metrics of its averaged weights, and previews.

A preview has the same clips, prompts and noise each time, and a row for each of

    held_out              the clips
    NAME                  what the averaged weights make of them, NAME being what the task calls that
    NAME_raw              what the weights as they are make of them
    NAME_step_0           what the weights before the first step made of them

WORKDIR/previews/step_00001000.mp4    the rows below each other, the clips beside each other
WORKDIR/previews/step_00000000.npz    what was made before the first step; where it is lost, that row is left out
"""

import dataclasses
import functools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from hunyuan_jax.data import loader
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, replacing
from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.stops import Stop
from hunyuan_jax.tasks.task import Params, Task
from hunyuan_jax.train_step import TrainState
from hunyuan_jax.video_io import write_video

LABEL_HEIGHT, LABEL_SIZE = 16, 10  # pixels, of the strip above a row and of its letters
Videos = dict[str, UInt8[np.ndarray, "N T H W 3"]]


class HeldOut:
    """Metrics of `measured` samples of each bucket, and a preview of `shown` samples of the longest one; 0 of them for none."""

    def __init__(
        self,
        task: Task,
        data: loader.DataConfig,
        dataset: Dataset,
        buckets: Sequence[Bucket],
        *,
        measured: int,
        shown: int,
        fps: float,
        key: jax.Array,
        folder: Path,
    ):
        self._task, self._key, self._folder, self._fps = task, jax.random.fold_in(key, 0xE7A1), folder, fps
        self._measure = jax.jit(lambda params, batch: task.measure(params, batch, key=self._key))
        buckets = [bucket for bucket in buckets if bucket.share > 0]
        select = functools.partial(loader.held_out_batches, data, dataset, encode=task.encode_prompts, shapes=task.batch_shapes)
        self._batches = {bucket.name: select(bucket, limit=measured) for bucket in buckets} if measured else {}
        self._shown: VideoBatch | None = None
        if shown:
            longest = max(buckets, key=lambda b: (b.frames, b.height * b.width))
            found = select(dataclasses.replace(longest, batch=shown), limit=shown)
            if not found:
                raise UserError("No held-out clip is left for previews; raise data.held_out, add clips, or set train.preview_every to 0.")
            self._shown = found[0]

    def check(self, name: str, abstract: TrainState) -> None:
        """Raises `UserError` where no held-out metric has that name."""
        shapes = {bucket: jax.eval_shape(self._measure, abstract.ema, batches[0]) for bucket, batches in self._batches.items() if batches}
        known = [_name_of(metric, bucket) for bucket, found in shapes.items() for metric in found]
        if name not in known:
            raise UserError(f"train.keep_best: there is no held-out metric {name!r}. {nearest(name, known)}")

    def measure(self, state: TrainState, *, stop: Stop | None = None) -> dict[str, float] | None:
        """Means over the held-out samples of each bucket, as `held_out/METRIC/BUCKET`; None where `stop` cut it short."""
        out = {}
        for name, batches in self._batches.items():
            rows = []
            for batch in batches:
                if stop is not None and stop.cuts_short:
                    return None
                rows.append(jax.device_get(self._measure(state.ema, jax.tree.map(jnp.asarray, batch))))
            for metric in rows[0] if rows else ():
                out[_name_of(metric, name)] = float(np.mean(np.concatenate([row[metric] for row in rows])))
        return out

    def preview(self, state: TrainState, done: int) -> Videos:
        """The preview after step `done`, also written as one mp4; the one before the first step has one row of made clips, and keeps it."""
        self._folder.mkdir(exist_ok=True)
        made = self._made(state.ema)
        if done:
            rows = made | _named(self._made(state.params), "_raw") | _named(self._first(made), "_step_0")
        else:
            rows = made
            if jax.process_index() == 0:
                with replacing(self._first_path) as temporary, temporary.open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **made)
        videos = {"held_out": self._clips} | rows
        if jax.process_index() == 0:
            write_video(self._folder / f"step_{done:08d}.mp4", below_each_other(videos), fps=self._fps)
        return videos

    def _made(self, params: Params) -> Videos:
        return self._task.preview(params, jax.tree.map(jnp.asarray, self._shown), key=self._key)

    @functools.cached_property
    def _clips(self) -> UInt8[np.ndarray, "N T H W 3"]:
        return self._task.seen(jax.tree.map(jnp.asarray, self._shown))

    @property
    def _first_path(self) -> Path:
        return self._folder / "step_00000000.npz"

    def _first(self, made: Videos) -> Videos:
        """What was made before the first step, as far as it is there and fits what is made now; it is process 0 that shows it."""
        if jax.process_index() != 0 or not self._first_path.exists():
            return {}
        try:
            with np.load(self._first_path) as file:
                return {name: file[name] for name, now in made.items() if name in file and file[name].shape == now.shape}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            logging.warning("%s cannot be read (%s); previews go on without that row.", self._first_path, error)
            return {}


def _named(videos: Mapping[str, np.ndarray], ending: str) -> Videos:
    return {f"{name}{ending}": clips for name, clips in videos.items()}


def below_each_other(videos: Videos) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """A video of all: each a row of clips with its name above."""
    rows = []
    for name, clips in videos.items():
        row = np.concatenate(list(clips), axis=2)
        label = Image.new("RGB", (row.shape[2], LABEL_HEIGHT), "white")
        ImageDraw.Draw(label).text((2, 1), name.replace("_", " "), "black", ImageFont.load_default(LABEL_SIZE))
        rows += [np.broadcast_to(np.asarray(label), (len(row), *np.asarray(label).shape)), row]
    return np.concatenate(rows, axis=1)


def _name_of(metric: str, bucket: str) -> str:
    return f"held_out/{metric.removesuffix('_db')}/{bucket}" + ("_db" if metric.endswith("_db") else "")
