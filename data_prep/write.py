"""From shots that are kept to shards of `Clip` records, and from the pipeline's workers back to the command.

    (source, shots) --CutClips--> one record a file in the work folder --WriteShard--> shard, rows of the manifest
    rows of any table --WriteRows--> the work folder --read_rows--> the command, which publishes them

Every clip's frames are decoded and encoded on their own, so memory holds one clip, and a shard is put together from files.
Its content depends on ids alone: the shard is the id modulo the number of shards, the order within is by id.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import apache_beam as beam
import msgpack
import numpy as np

from data_prep.split import Shot, pictures
from hunyuan_jax.data import records
from hunyuan_jax.data.dataset import replacing, write_shard
from hunyuan_jax.errors import explain_disk_error
from hunyuan_jax.video_io import MediaError, encode_mp4

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """How clips are stored."""

    clips_per_shard: int
    crf: int  # H.264's constant rate factor: 18 looks lossless, 23 is small
    max_short_side: int  # pixels; larger clips are made smaller


def make_clip(shot: Shot, frames: Sequence[np.ndarray], config: WriteConfig) -> records.Clip:
    """The record of a shot, from its uint8 RGB frames."""
    height, width = frames[0].shape[:2]
    return records.Clip(
        id=shot.id,
        video=encode_mp4(np.stack(frames), fps=shot.fps, crf=config.crf),
        fps=shot.fps,
        num_frames=len(frames),
        # The encoder pads odd sides, since H.264 stores colour at half the size.
        height=height + height % 2,
        width=width + width % 2,
        caption=shot.caption,
        camera=shot.camera,
        source=shot.source,
        start_seconds=shot.start_seconds,
        end_seconds=shot.end_seconds,
        scores=shot.scores,
    )


def cut_clips(path: Path, shots: Sequence[Shot], config: WriteConfig) -> Iterator[tuple[Shot, records.Clip]]:
    """Decodes a file up to its last shot and yields the record of each; `shots` are in order and do not overlap."""
    frames: list[np.ndarray] = []
    waiting = list(shots)
    for picture in pictures(path):
        if picture.number >= waiting[0].first_frame:
            frames.append(picture.scaled(config.max_short_side, layout="rgb24"))
        if len(frames) == waiting[0].num_frames:
            shot = waiting.pop(0)
            yield shot, make_clip(shot, frames, config)
            frames = []
        if not waiting:
            return
    raise MediaError(f"It has fewer frames than when it was measured; {len(waiting)} clips are missing.")


class CutClips(beam.DoFn):
    """(source, shots) -> the shots, each one's record written to the work folder. A bad file is a `MediaError`."""

    def __init__(self, folder: str, work: str, config: WriteConfig) -> None:
        self._folder, self._work, self._config = folder, Path(work), config
        self._milliseconds = beam.metrics.Metrics.distribution("curate", "cut_ms")

    def process(self, element: tuple[str, Sequence[Shot]]) -> Iterator[Shot]:
        source, shots = element
        began = time.perf_counter()
        try:
            for shot, clip in cut_clips(Path(self._folder) / source, shots, self._config):
                with replacing(self._work / "records" / shot.id) as temporary:
                    temporary.write_bytes(records.to_bytes(clip))
                yield dataclasses.replace(shot, height=clip.height, width=clip.width)
        except OSError as error:
            # A full disk ends the job with a word about the disk; anything else is the file's fault.
            if explain_disk_error(error) is not None:
                raise
            raise MediaError(f"It cannot be cut ({error}).") from error
        finally:
            mark_progress(self._work)
        self._milliseconds.update(round(1000 * (time.perf_counter() - began)))


class _Files(Sequence[bytes]):
    """Contents of files, read one at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> "_Files": ...

    def __getitem__(self, index: int | slice) -> "bytes | _Files":
        return _Files(self._paths[index]) if isinstance(index, slice) else self._paths[index].read_bytes()


def num_shards(clips: int, config: WriteConfig) -> int:
    return max(1, -(-clips // config.clips_per_shard))


def with_shard(shot: Shot, clips: int, config: WriteConfig) -> tuple[int, Shot]:
    """Keys a shot by its shard, `clips` being the number of all of them."""
    return int(shot.id[:8], 16) % num_shards(clips, config), shot


class WriteShard(beam.DoFn):
    """(shard, shots) -> (table, row) of the tables "shards", "manifest" and "features"."""

    def __init__(self, output: str, work: str, group: str, config: WriteConfig) -> None:
        self._output, self._work, self._group, self._config = Path(output), Path(work), group, config

    def process(self, element: tuple[int, Iterable[Shot]], clips: int) -> Iterator[tuple[str, Row]]:
        shots = sorted(element[1], key=lambda shot: shot.id)
        name = f"clips-{self._group}-{element[0]:05d}-of-{num_shards(clips, self._config):05d}.array_record"
        path = self._output / name
        row = write_shard(path, _Files([self._work / "records" / shot.id for shot in shots]))
        yield "shards", {**row, "bytes": path.stat().st_size}
        for index, shot in enumerate(shots):
            yield "manifest", manifest_row(shot, shard=name, index=index)
            yield "features", {"id": shot.id, "embedding": shot.embedding, "thumbnail": shot.thumbnail}


def manifest_row(shot: Shot, *, shard: str, index: int) -> Row:
    """What the manifest says of a clip; one column for each score."""
    return {
        "id": shot.id,
        "shard": shard,
        "index": index,
        "source": shot.source,
        "start_seconds": shot.start_seconds,
        "end_seconds": shot.end_seconds,
        "first_frame": shot.first_frame,
        "num_frames": shot.num_frames,
        "fps": shot.fps,
        "height": shot.height,
        "width": shot.width,
        "camera": shot.camera,
        "caption": json.dumps(shot.caption, ensure_ascii=False),
        **{f"score_{name}": value for name, value in shot.scores.items()},
    }


def rejected_row(shot: Shot) -> Row:
    """What is kept of a shot that was dropped: every reason, its scores and a thumbnail."""
    return {
        "id": shot.id,
        "source": shot.source,
        "start_seconds": shot.start_seconds,
        "end_seconds": shot.end_seconds,
        "failed": list(shot.failed),
        "duplicate_of": shot.duplicate_of,
        **{f"score_{name}": value for name, value in shot.scores.items()},
        "thumbnail": shot.thumbnail,
    }


def mark_progress(work: Path) -> None:
    """Tells the command that one more file is done: the length of a file in the work folder counts them."""
    with (work / "progress").open("ab") as file:
        file.write(b".")


class WriteRows(beam.DoFn):
    """((table, part), rows) -> nothing; the rows lie in the work folder afterwards."""

    def __init__(self, work: str) -> None:
        self._work = Path(work)

    def process(self, element: tuple[tuple[str, int], Iterable[Row]]) -> None:
        (table, part), rows = element
        with replacing(self._work / "rows" / f"{table}-{part:03d}.msgpack") as temporary, temporary.open("wb") as file:
            for row in rows:
                file.write(msgpack.packb(row))


def read_rows(work: Path, table: str) -> list[Row]:
    """All rows of a table that the workers have written, in no order."""
    rows: list[Row] = []
    for path in sorted((work / "rows").glob(f"{table}-*.msgpack")):
        with path.open("rb") as file:
            rows += msgpack.Unpacker(file)
    return rows
