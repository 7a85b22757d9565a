"""From datasets to batches on the mesh: the schedule says what each step reads, Grain reads it ahead, in order.

    Schedule.step(n) -> this process's rows -> records -> arrays of the bucket -> VideoBatch, sharded over the mesh

The position of a loader is one number, the next step, whatever the number of processes.

A damaged record is set aside (quarantine.py) and its slot of the batch filled with the first sound record of `Schedule.instead`, which
follows from the plan alone: nobody has to be told, and all other slots stay as they were. What is drawn for the slot (its sample id,
from which noise, crop and prompt follow) stays the planned record's: the substitute is read under another id than in its own slot, so
that the epoch has no two draws alike, and each process knows the ids of a batch without reading it.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from hunyuan_jax.data import records, transforms
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, is_held_out
from hunyuan_jax.data.quarantine import Damage, Quarantine
from hunyuan_jax.data.samples import Sample, make_sample
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError

Encode = Callable[[Sequence[str]], Sequence[records.TextStates]]  # prompts to their text states
Shapes = Callable[[Bucket], VideoBatch]  # what a batch of a bucket looks like, without memory
FEWEST = 10  # damaged records that a limit which is a share allows in the smallest dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset is read and how. `held_out` is the fraction of source files kept out of training.

    `text_length` is the number of text tokens in a batch (latents only); `threads` read ahead, `prefetch` steps deep. A run ends when
    more records are damaged than `quarantine_limit`: below 1 a share of the dataset's records, though at least 10 of them; from 1 on a
    number of records; 0 allows none.
    """

    path: str
    kind: str
    buckets: tuple[Any, ...]
    held_out: float = 0.05
    text_length: int = 0
    threads: int = 2
    prefetch: int = 4
    quarantine_limit: float = 0.001

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "Configuration data.path is empty; give the dataset's folder, for example --config.data.path=runs/quickstart/clips."
            )
        if self.kind not in ("Clip", "Latent"):
            raise UserError(f"Configuration data.kind must be 'Clip' or 'Latent', not {self.kind!r}.")
        if not 0.0 <= self.held_out < 1.0:
            raise UserError(f"Configuration data.held_out must be at least 0 and below 1, not {self.held_out}.")
        if not self.quarantine_limit >= 0.0:
            raise UserError(f"Configuration data.quarantine_limit must be at least 0, not {self.quarantine_limit}.")

    def most_damaged(self, number_of_records: int) -> int:
        """How many of so many records may be damaged."""
        if self.quarantine_limit == 0 or self.quarantine_limit >= 1:
            return int(self.quarantine_limit)
        return max(FEWEST, int(self.quarantine_limit * number_of_records))


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


def make_batch(samples: Sequence[Sample], ids: Sequence[int], bucket: Bucket, *, text_length: int, encode: Encode | None) -> VideoBatch:
    """Samples and their sample ids as a batch of numpy arrays. `encode` makes the text states of those that were stored without."""
    sample_ids: Any = np.array(ids, np.uint32)
    stacked: dict[str, Any] = {
        name: np.stack([getattr(sample, name) for sample in samples])
        for name in ("frames", "mean", "logvar")
        if getattr(samples[0], name) is not None
    }
    texts = [sample.text for sample in samples if sample.text is not None]
    if not texts:
        return VideoBatch(sample_id=sample_ids, tiled=bucket.tiled, **stacked)
    if not all(text.is_encoded for text in texts):
        assert encode is not None
        texts = list(encode([text.prompt for text in texts]))
    txt, txt_mask, pooled = transforms.pad_texts(texts, length=text_length)
    return VideoBatch(sample_id=sample_ids, txt=txt, txt_mask=txt_mask, pooled=pooled, **stacked)


@dataclasses.dataclass(frozen=True)
class Read:
    """What step `number` (from 0) reads here, and the damaged records met on the way; no batch where too many are."""

    number: int
    batch: VideoBatch | None
    met: tuple[Damage, ...]


@dataclasses.dataclass(frozen=True)
class ReadStep:
    """Grain's map: a step's number to this process's share of its batch, as numpy arrays.

    For a slot of the batch at most `most` damaged records are passed over.
    """

    dataset: Dataset
    schedule: Schedule
    text_length: int
    encode: Encode | None
    shapes: Shapes | None
    sharding: jax.sharding.Sharding
    most: int

    def __call__(self, number: int) -> Read:
        step = self.schedule.step(number)
        bucket = self.schedule.buckets[step.bucket]
        mine = rows_here(self.sharding, bucket.batch)
        shapes = self.shapes(bucket) if self.shapes else None
        samples, ids, met = [], [], []
        for slot, item in zip(mine, self.dataset.read_each([step.rows[i] for i in mine]), strict=True):
            row, epoch = step.rows[slot], step.epochs[slot]
            ids.append(sample_id(self.dataset.rows[row]["id"], epoch))
            instead = itertools.islice(self.schedule.instead(number, slot), self.most)
            others = ((other, self.dataset.read_each([other])[0]) for other in instead)
            sample, found = self._first_sound(itertools.chain([(row, item)], others), bucket, ids[-1], epoch, shapes)
            met += found
            if sample is None:
                return Read(number, None, tuple(met))
            samples.append(sample)
        return Read(number, make_batch(samples, ids, bucket, text_length=self.text_length, encode=self.encode), tuple(met))

    def _first_sound(
        self, items: Iterator[tuple[int, Any]], bucket: Bucket, name: int, epoch: int, shapes: VideoBatch | None
    ) -> tuple[Sample | None, list[Damage]]:
        """The first of (row, record) that makes a sample, drawn as sample id `name` says, and the damage of those before it."""
        met: list[Damage] = []
        for row, item in items:
            said = self.dataset.rows[row]
            try:
                sample = make_sample(item, said, bucket, rng=np.random.default_rng(name), shapes=shapes)
            except records.DamagedRecord as error:
                met.append(Damage(id=said["id"], row=row, reason=str(error), epoch=epoch, substitute=None))
            else:
                return sample, [dataclasses.replace(damage, substitute=said["id"]) for damage in met]
        return None, met


def rows_here(sharding: jax.sharding.Sharding, batch: int) -> tuple[int, ...]:
    """Which rows of a batch this process's devices hold, in order. Processes that share samples between them hold the same ones."""
    pieces = sharding.addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({row for piece in pieces if piece is not None for row in range(batch)[piece[0]]}))


def to_mesh(batch: VideoBatch, sharding: jax.sharding.Sharding) -> VideoBatch:
    """Each process's share of a batch as global arrays, sharded over the batch."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class Loader:
    """Training batches, read ahead by Grain's threads. `state()` is the position to save.

    Damaged records that batches met are listed in `workdir`, those of steps up to `start` from before (quarantine.py). `shapes` is
    needed for latents.
    """

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        dataset: Dataset,
        *,
        sharding: jax.sharding.Sharding,
        steps: int,
        workdir: Path,
        start: int = 0,
        encode: Encode | None = None,
        shapes: Shapes | None = None,
    ):
        parts = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
        for bucket in schedule.buckets:
            if bucket.batch % parts:
                near = max(1, round(bucket.batch / parts)) * parts
                raise UserError(
                    f"Bucket {bucket.name}: a batch of {bucket.batch} is split into {parts} on this mesh; set a multiple of it, such "
                    f"as {near}."
                )
        most = config.most_damaged(len(dataset.rows))
        read = ReadStep(dataset, schedule, config.text_length, encode, shapes, sharding, most)
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
        self._batches: Any = iter(grain.MapDataset.range(steps).map(read).to_iter_dataset(options))
        self._sharding = sharding
        self._quarantine = Quarantine(workdir, most=most, after=start)

    def __iter__(self) -> Iterator[VideoBatch]:
        return self

    def __next__(self) -> VideoBatch:
        read: Read = next(self._batches)
        self._quarantine.add(read.number + 1, read.met)  # now, and not when it was read ahead: so that it follows from the steps alone
        if read.batch is None:
            raise UserError(f"Every record that could stand in for {read.met[-1].id} is damaged too: {read.met[-1].reason}")
        return to_mesh(read.batch, self._sharding)

    def quarantined(self, step: int) -> int:
        """How many damaged records were met up to `step` (from 1). Raises `UserError` where they are too many."""
        return self._quarantine.count(step)

    def state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)


def training_schedule(config: DataConfig, dataset: Dataset, *, buckets: Sequence[Bucket], seed: int) -> Schedule:
    """The plan over the dataset's training rows."""
    rows = tuple(rows_for(dataset, bucket, held_out=False, fraction=config.held_out) for bucket in buckets)
    return Schedule(seed, tuple(buckets), rows)


def held_out_batches(
    config: DataConfig, dataset: Dataset, bucket: Bucket, *, limit: int, encode: Encode | None = None, shapes: Shapes | None = None
) -> list[VideoBatch]:
    """Up to `limit` held-out samples of a bucket in batches of at most the bucket's size, always the same ones.

    Damaged records are left out and said in the log; those that follow come up. Raises `UserError` for more than the quarantine's limit.
    """
    rows = rows_for(dataset, bucket, held_out=True, fraction=config.held_out)
    like = shapes(bucket) if shapes else None
    samples: list[tuple[Sample, int]] = []
    damaged: list[str] = []
    for start in range(0, len(rows), max(limit, 1)):
        for row, item in zip(rows[start : start + limit], dataset.read_each(rows[start : start + limit]), strict=True):
            name = dataset.rows[row]["id"]
            try:
                samples.append((make_sample(item, dataset.rows[row], bucket, rng=None, shapes=like), sample_id(name, 0)))
            except records.DamagedRecord as damage:
                damaged.append(f"{name}: {damage}")
                logging.warning("Held-out record %s is damaged and left out: %s", name, damage)
        if len(damaged) > config.most_damaged(len(dataset.rows)):
            raise UserError(f"{len(damaged)} held-out records of {dataset.folder} are damaged, such as {damaged[0]}. Write it again.")
        if len(samples) >= limit:
            break
    groups = [samples[i : min(i + bucket.batch, limit)] for i in range(0, min(len(samples), limit), bucket.batch)]
    return [
        make_batch([sample for sample, _ in group], [i for _, i in group], bucket, text_length=config.text_length, encode=encode)
        for group in groups
    ]
