"""The global plan of the data: step -> bucket and samples, a pure function of the seed and the dataset's rows.

    step 0 1 2 3 4 5 ...      every period of steps uses each bucket its fixed number of times, in a shuffled order
    bucket A A B A B A        each bucket walks through its own samples, epoch after epoch, each epoch in a new order

Nothing here depends on the number of hosts or on where a run was stopped: any host can compute any step at once.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.errors import UserError

PERIOD = 64


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step reads: a bucket, the rows of the dataset, and for each row the epoch in which it is read."""

    bucket: int
    rows: tuple[int, ...]
    epochs: tuple[int, ...]


def _steps_per_period(shares: Sequence[float]) -> list[int]:
    """PERIOD split in proportion to shares, by largest remainder; a bucket with a share gets at least one step."""
    total = sum(shares)
    exact = [PERIOD * share / total for share in shares]
    counts = [max(int(e), 1) if e > 0 else 0 for e in exact]
    by_need = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    while sum(counts) < PERIOD:
        counts[by_need[0]] += 1
        by_need.append(by_need.pop(0))
    while sum(counts) > PERIOD:
        largest = max(range(len(counts)), key=lambda i: counts[i])
        counts[largest] -= 1
    return counts


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The plan for `buckets`, where `rows[b]` are the dataset's row numbers that bucket b may use.

    With `left_out` a run reads at each step what the plan has so many steps later.
    """

    seed: int
    buckets: tuple[Bucket, ...]
    rows: tuple[tuple[int, ...], ...]
    left_out: int = 0

    def __post_init__(self) -> None:
        if not self.buckets or sum(b.share for b in self.buckets) <= 0:
            raise UserError("The data plan needs at least one bucket with a share above 0.")
        for bucket, rows in zip(self.buckets, self.rows, strict=True):
            if bucket.share > 0 and not rows:
                raise UserError(
                    f"No clip fits bucket {bucket.name} with intervals {bucket.intervals}; "
                    f"it needs {bucket.span(min(bucket.intervals))} frames."
                )

    @functools.cached_property
    def _counts(self) -> list[int]:
        return _steps_per_period([b.share for b in self.buckets])

    def step(self, number: int) -> Step:
        """What step `number` (from 0) reads."""
        bucket, positions = self._positions(number)
        picked = tuple(self.rows[bucket][self._order(bucket, epoch)[place]] for epoch, place in positions)
        return Step(bucket, picked, tuple(epoch for epoch, _ in positions))

    def instead(self, number: int, slot: int) -> Iterator[int]:
        """The rows that may stand in for a damaged one in a slot of step `number`'s batch, in order; the first that is sound does.

        Those half an epoch further in the epoch's order and on from there, so that no sample is read twice within a few steps, and
        another one stands in in every epoch.
        """
        bucket, positions = self._positions(number)
        epoch, place = positions[slot]
        rows, order = self.rows[bucket], self._order(bucket, epoch)
        places = ((place + len(rows) // 2 + further) % len(rows) for further in range(len(rows)))
        return (rows[order[other]] for other in places if other != place)

    def _positions(self, number: int) -> tuple[int, list[tuple[int, int]]]:
        """The bucket of step `number`, and for each slot of its batch the epoch and the place in that epoch's order."""
        period, place = divmod(number + self.left_out, PERIOD)
        order = _order_of_period(self.seed, tuple(self._counts), period)
        bucket = order[place]
        turn = period * self._counts[bucket] + order[:place].count(bucket)
        batch = self.buckets[bucket].batch
        return bucket, [divmod(turn * batch + i, len(self.rows[bucket])) for i in range(batch)]

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        return _order_of_epoch(self.seed, bucket, epoch, len(self.rows[bucket]))


@functools.lru_cache(maxsize=64)
def _order_of_period(seed: int, counts: tuple[int, ...], period: int) -> list[int]:
    order = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng((seed, 1, period)).permutation(order).tolist()


@functools.lru_cache(maxsize=64)
def _order_of_epoch(seed: int, bucket: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, 2, bucket, epoch)).permutation(size)
