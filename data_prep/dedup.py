"""Near-duplicates: of clips that look alike at all their moments, the best one is kept.

    Shot -> bands of its embedding's signs -> GroupByKey -> compare within a group -> the best near copy of each shot -> Shot

Comparing all with all does not scale, so a clip meets only those that share a band: the side it lies on of a few random planes
through the origin. Two clips at the threshold share one of the bands nearly always, unlike clips seldom do.

A shot is dropped when a better one is its near copy, whatever becomes of that one; this needs no order of visiting and gives
the same answer on any number of workers. Clips kept by earlier runs are better than any new one.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from data_prep.filter import NEAR_DUPLICATE
from data_prep.split import Shot

_BLOCK = 1024  # rows compared at once, which bounds memory in a crowded band


@dataclasses.dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """When two clips are near copies, and how candidates are found."""

    similarity: float  # cosine of the embeddings from which on two clips are near copies
    bands: int
    band_bits: int  # planes in a band: more for larger sets, with more bands


Rank = tuple[int, float, float, str]  # the least is the best
Point = tuple[Rank, bytes]  # rank (whose last part is the id) and embedding


def rank(shot: Shot) -> Rank:
    """New shots: the larger one, then the sharper one, then the one whose id comes first."""
    return 1, -float(shot.scores["short_side"]), shot.scores["blur"], shot.id


def kept_point(clip_id: str, embedding: bytes) -> Point:
    """A clip that an earlier run has kept."""
    return (0, 0.0, 0.0, clip_id), embedding


def bands_of(embedding: bytes, planes: np.ndarray, bands: int) -> list[str]:
    """The keys under which a clip is looked for; `planes` is [bands * band_bits, D]."""
    vector = np.frombuffer(embedding, np.float16).astype(np.float32)
    signs = (planes @ vector > 0).reshape(bands, -1)
    return [f"{band}/{''.join('01'[bit] for bit in row)}" for band, row in enumerate(signs.astype(int))]


def near_copies(points: list[Point], similarity: float) -> Iterator[tuple[str, Rank]]:
    """(id of the worse, rank of the better) for all near copies among `points` whose worse one is new."""
    points = sorted(points)
    vectors = np.stack([np.frombuffer(embedding, np.float16) for _, embedding in points]).astype(np.float32)
    for start in range(0, len(points), _BLOCK):
        cosines = vectors[start : start + _BLOCK] @ vectors.T
        for row, column in zip(*np.nonzero(cosines >= similarity), strict=True):
            worse, better = points[start + row][0], points[column][0]
            if better < worse and worse[0] == 1:
                yield worse[3], better


class _Bands(beam.DoFn):
    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._planes: np.ndarray | None = None

    def process(self, point: Point) -> Iterator[tuple[str, Point]]:
        if self._planes is None:
            size = (self._config.bands * self._config.band_bits, len(point[1]) // 2)
            self._planes = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        for key in bands_of(point[1], self._planes, self._config.bands):
            yield key, point


def _compare(group: tuple[str, Iterable[Point]], similarity: float) -> Iterator[tuple[str, Rank]]:
    points = list(group[1])
    return near_copies(points, similarity) if len(points) > 1 else iter(())


def _mark(joined: tuple[str, dict[str, Any]]) -> Shot:
    (shot,), better = joined[1]["shot"], list(joined[1]["better"])
    if not better:
        return shot
    return dataclasses.replace(shot, failed=(*shot.failed, NEAR_DUPLICATE), duplicate_of=better[0][3])


class MarkNearDuplicates(beam.PTransform):
    """Shots (PCollection) and points of kept clips (PCollection) -> the shots, near copies marked as failed."""

    def __init__(self, config: DedupConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, inputs):  # type: ignore[no-untyped-def]  # Beam would take these for element types.
        points = inputs["shots"] | "rank" >> beam.Map(lambda shot: (rank(shot), shot.embedding))
        better = (
            (points, inputs["kept"])
            | "all clips" >> beam.Flatten()
            | "bands" >> beam.ParDo(_Bands(self._config))
            | "group bands" >> beam.GroupByKey()
            | "compare" >> beam.FlatMap(_compare, similarity=self._config.similarity)
            | "best of each" >> beam.CombinePerKey(min)
        )
        shots = inputs["shots"] | "by id" >> beam.Map(lambda shot: (shot.id, shot))
        return {"shot": shots, "better": better} | "join" >> beam.CoGroupByKey() | "mark" >> beam.Map(_mark)


def expected_recall(config: DedupConfig, cosine: float) -> float:
    """Chance that two clips of this similarity share a band, so that they are compared at all."""
    same_side = 1 - float(np.arccos(cosine)) / np.pi
    return 1 - (1 - same_side**config.band_bits) ** config.bands
