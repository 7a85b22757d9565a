"""A dataset on disk: a folder of ArrayRecord shards, a Parquet manifest of their records and a `dataset.json`.

    DIR/clips-3f2a9c-00000-of-00002.array_record   the records; one group of shards for each time the dataset grew
    DIR/manifest.parquet                           one row a record: id, shard, index and what the record's kind adds
    DIR/dataset.json                               format, kind, counts and sha256 of the shards, what they were made from

`dataset.json` is written last and by renaming, so a folder without it is no dataset, and what it does not name is not there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_data_source, array_record_module

from hunyuan_jax.data import records
from hunyuan_jax.errors import UserError

FORMAT = 1
READ_AGAIN_AFTER = (0.0, 1.0, 5.0, 15.0)  # seconds: what a disk does not give at once it is asked for again


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` at the end; an error leaves `path` as it was."""
    # Hosts that share a disk may write the same file at the same time, and containers often have the same process number.
    temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, items: Sequence[bytes]) -> dict[str, Any]:
    """Writes serialised records as one shard, whole or not at all; returns its row for `dataset.json`.

    Options: one record a group, since training reads at random, and the fastest zstd level.
    """
    with replacing(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
        for item in items:
            writer.write(item)
        writer.close()
    return {"name": path.name, "records": len(items), "sha256": sha256_of(path)}


def write_index(
    folder: Path, *, kind: str, rows: Sequence[dict[str, Any]], shards: Sequence[dict[str, Any]], made_from: dict[str, Any]
) -> None:
    """Writes the manifest and then `dataset.json`: after this call the dataset is what `rows` and `shards` say."""
    with replacing(folder / "manifest.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    write_json(
        folder / "dataset.json", {"format": FORMAT, "kind": kind, "records": len(rows), "shards": list(shards), "made_from": made_from}
    )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An open dataset: `rows` is its manifest in order, and `read` and `read_each` fetch records by row number."""

    folder: Path
    kind: str
    rows: tuple[dict[str, Any], ...]
    made_from: dict[str, Any]
    _source: array_record_data_source.ArrayRecordDataSource
    _offsets: dict[str, int]

    def read(self, row_numbers: Sequence[int]) -> list[records.Clip | records.Latent]:
        """Records by row number, in one batched read. Raises `DamagedRecord` where one of them is damaged."""
        found = []
        for number, item in zip(row_numbers, self.read_each(row_numbers), strict=True):
            if isinstance(item, records.DamagedRecord):
                raise records.DamagedRecord(f"Record {self.rows[number]['id']} of {self.folder}: {item}") from item
            found.append(item)
        return found

    def read_each(self, row_numbers: Sequence[int]) -> list[records.Clip | records.Latent | records.DamagedRecord]:
        """Records by row number, in one batched read, with the error in the place of a record that is damaged.

        Damaged is what fails its checksum or does not decode when it is read alone too. Raises `UserError` where a shard cannot be
        read: a file that is missing, a disk that fails several times, an index inside the shard that is gone.
        """
        positions = [self._offsets[self.rows[n]["shard"]] + self.rows[n]["index"] for n in row_numbers]
        if not positions:
            return []
        try:
            return [records.from_bytes(data) for data in self._source.__getitems__(positions)]
        except (RuntimeError, records.DamagedRecord):  # one of them, or the disk
            return [self._read_alone(n) for n in row_numbers]

    def first(self) -> records.Clip | records.Latent:
        """The first record that is not damaged. Raises `DamagedRecord` where all are."""
        for number in range(len(self.rows)):
            (item,) = self.read_each([number])
            if not isinstance(item, records.DamagedRecord):
                return item
        raise records.DamagedRecord(f"No record of {self.folder} can be read. Write the dataset again.")

    def _read_alone(self, number: int) -> records.Clip | records.Latent | records.DamagedRecord:
        """One record through a reader of its own, so that nothing is left of an earlier failure."""
        path, index = self.folder / self.rows[number]["shard"], self.rows[number]["index"]
        for seconds in READ_AGAIN_AFTER:
            time.sleep(seconds)
            try:
                with array_record_data_source.ArrayRecordDataSource([str(path)]) as source:
                    return records.from_bytes(source[index])
            except records.DamagedRecord as damage:
                return damage
            except (RuntimeError, ValueError) as error:
                failure = error
                # What fails its checksum stays so; ArrayRecord says so in these words, and in others of its index.
                if "Corrupted" in str(error) and "Failed to read Riegeli" not in str(error):
                    return records.DamagedRecord(str(error))
        raise UserError(f"Shard {path} cannot be read ({failure}). Restore it, or write the dataset again.") from failure


def open_dataset(folder: str | Path, *, kind: str) -> Dataset:
    """Opens a dataset and checks every shard's count against `dataset.json`.

    Raises `UserError` if the folder is no dataset, of another kind, empty, or if a shard is missing or truncated.
    Counts are compared as well, since a damaged ArrayRecord file may read as one with fewer records.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "dataset.json").read_text())
        rows = tuple(pq.read_table(folder / "manifest.parquet").to_pylist())
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no dataset: {error.filename} is missing. Run the step that writes it first.") from error
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"The index of the dataset in {folder} cannot be read ({error}). Write the dataset again.") from error
    if index.get("format") != FORMAT or index.get("kind") != kind:
        raise UserError(
            f"{folder} holds a dataset of kind {index.get('kind')!r}, format {index.get('format')!r}; "
            f"a {kind!r} dataset of format {FORMAT} was expected."
        )
    if not rows:
        raise UserError(f"The dataset in {folder} has no records. See its report for what was dropped and why.")
    paths, offsets, total = [], {}, 0
    for shard in index["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            raise UserError(f"Shard {path} is missing. Restore it or write the dataset again.")
        paths.append(str(path))
        offsets[shard["name"]] = total
        total += shard["records"]
    try:
        source = array_record_data_source.ArrayRecordDataSource(paths)
    except RuntimeError as error:
        raise UserError(f"A shard of {folder} is damaged ({error}). Write the dataset again.") from error
    if len(source) != total or total != len(rows):
        raise UserError(
            f"The shards of {folder} hold {len(source)} records, its index says {total} and its manifest {len(rows)}: "
            "a shard is damaged. Write the dataset again."
        )
    return Dataset(folder, kind, rows, index["made_from"], source, offsets)


def is_held_out(source: str, *, fraction: float) -> bool:
    """Whether everything cut from file `source` is kept out of training: by the file's name, so no shot of it leaks."""
    draw = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return draw < fraction
