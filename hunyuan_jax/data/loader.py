"""From datasets to batches on the mesh: the schedule says what each step reads, Grain reads it ahead, in order.

    Schedule.step(n) -> this process's rows -> records -> arrays of the bucket -> VideoBatch, sharded over the mesh

The position of a loader is one number, the next step, whatever the number of processes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from hunyuan_jax.data import records, transforms
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, is_held_out
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError
from hunyuan_jax.video_io import read_video

Encode = Callable[[Sequence[str]], Sequence[records.TextStates]]  # prompts to their text states


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset is read and how. `held_out` is the fraction of source files kept out of training.

    `text_length` is the number of text tokens in a batch (latents only); `threads` read ahead, `prefetch` steps deep.
    """

    path: str
    kind: str
    buckets: tuple[Any, ...]
    held_out: float = 0.05
    text_length: int = 0
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "Configuration data.path is empty; give the dataset's folder, for example --config.data.path=runs/quickstart/clips."
            )
        if self.kind not in ("Clip", "Latent"):
            raise UserError(f"Configuration data.kind must be 'Clip' or 'Latent', not {self.kind!r}.")
        if not 0.0 <= self.held_out < 1.0:
            raise UserError(f"Configuration data.held_out must be at least 0 and below 1, not {self.held_out}.")


def rows_for(dataset: Dataset, bucket: Bucket, *, held_out: bool, fraction: float) -> tuple[int, ...]:
    """The rows of `dataset` that fit the bucket, on one side of the split between training and held-out source files."""

    def fits(row: dict[str, Any]) -> bool:
        if dataset.kind == "Latent":
            return (row["frames"], row["height"], row["width"]) == bucket.shape
        return bucket.fits(row["num_frames"])

    return tuple(n for n, row in enumerate(dataset.rows) if fits(row) and is_held_out(row["source"], fraction=fraction) == held_out)


def sample_id(record_id: str, epoch: int) -> int:
    """32 bits that name the reading of a record in an epoch."""
    return int.from_bytes(hashlib.sha256(f"{record_id}/{epoch}".encode()).digest()[:4], "big")


def make_batch(
    items: Sequence[records.Clip | records.Latent],
    bucket: Bucket,
    *,
    epochs: Sequence[int],
    text_length: int,
    random: bool,
    encode: Encode | None = None,
) -> VideoBatch:
    """Records as a batch of numpy arrays. `random` draws intervals, crops and prompt variants by sample id.

    `encode` makes the text states of records that were stored without.
    """
    ids: Any = np.array([sample_id(item.id, epoch) for item, epoch in zip(items, epochs, strict=True)], np.uint32)
    rngs = [np.random.default_rng(int(i)) if random else None for i in ids]
    clips = [item for item in items if isinstance(item, records.Clip)]
    latents = [item for item in items if isinstance(item, records.Latent)]
    if clips:
        fitted = [transforms.fit_to_bucket(read_video(clip.video).frames, bucket, rng=rng) for clip, rng in zip(clips, rngs, strict=True)]
        frames: Any = np.stack(fitted)
        return VideoBatch(sample_id=ids, frames=frames, tiled=bucket.tiled)
    texts = [item.texts[0 if rng is None else int(rng.integers(len(item.texts)))] for item, rng in zip(latents, rngs, strict=True)]
    if not all(text.is_encoded for text in texts):
        assert encode is not None
        texts = list(encode([text.prompt for text in texts]))
    txt, txt_mask, pooled = transforms.pad_texts(texts, length=text_length)
    mean: Any
    logvar: Any
    mean, logvar = (np.stack([getattr(item, name).astype(np.float32) for item in latents]) for name in ("mean", "logvar"))
    return VideoBatch(sample_id=ids, mean=mean, logvar=logvar, txt=txt, txt_mask=txt_mask, pooled=pooled)


@dataclasses.dataclass(frozen=True)
class ReadStep:
    """Grain's map: a step's number to this process's share of its batch, as numpy arrays."""

    dataset: Dataset
    schedule: Schedule
    text_length: int
    encode: Encode | None
    sharding: jax.sharding.Sharding

    def __call__(self, number: int) -> VideoBatch:
        step = self.schedule.step(number)
        bucket = self.schedule.buckets[step.bucket]
        mine = rows_here(self.sharding, bucket.batch)
        items, epochs = self.dataset.read([step.rows[i] for i in mine]), [step.epochs[i] for i in mine]
        return make_batch(items, bucket, epochs=epochs, text_length=self.text_length, random=True, encode=self.encode)


def rows_here(sharding: jax.sharding.Sharding, batch: int) -> tuple[int, ...]:
    """Which rows of a batch this process's devices hold, in order. Processes that share samples between them hold the same ones."""
    pieces = sharding.addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({row for piece in pieces if piece is not None for row in range(batch)[piece[0]]}))


def to_mesh(batch: VideoBatch, sharding: jax.sharding.Sharding) -> VideoBatch:
    """Each process's share of a batch as global arrays, sharded over the batch."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class Loader:
    """Training batches from `start` on, read ahead by Grain's threads. `state()` is the position to save."""

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        dataset: Dataset,
        *,
        sharding: jax.sharding.Sharding,
        steps: int,
        encode: Encode | None = None,
    ):
        parts = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
        for bucket in schedule.buckets:
            if bucket.batch % parts:
                raise UserError(
                    f"Bucket {bucket.name}: a batch of {bucket.batch} is split into {parts} on this mesh; set a multiple of it."
                )
        read = ReadStep(dataset, schedule, config.text_length, encode, sharding)
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
        self._batches: Any = iter(grain.MapDataset.range(steps).map(read).to_iter_dataset(options))
        self._sharding = sharding

    def __iter__(self) -> Iterator[VideoBatch]:
        return self

    def __next__(self) -> VideoBatch:
        return to_mesh(next(self._batches), self._sharding)

    def state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)


def training_schedule(config: DataConfig, dataset: Dataset, *, buckets: Sequence[Bucket], seed: int) -> Schedule:
    """The plan over the dataset's training rows."""
    rows = tuple(rows_for(dataset, bucket, held_out=False, fraction=config.held_out) for bucket in buckets)
    return Schedule(seed, tuple(buckets), rows)


def held_out_batches(config: DataConfig, dataset: Dataset, bucket: Bucket, *, limit: int, encode: Encode | None = None) -> list[VideoBatch]:
    """Up to `limit` held-out samples of a bucket in batches of at most the bucket's size, always the same ones."""
    rows = rows_for(dataset, bucket, held_out=True, fraction=config.held_out)[:limit]
    groups = [rows[i : i + bucket.batch] for i in range(0, len(rows), bucket.batch)]
    how: dict[str, Any] = {"text_length": config.text_length, "random": False, "encode": encode}
    return [make_batch(dataset.read(group), bucket, epochs=[0] * len(group), **how) for group in groups]
