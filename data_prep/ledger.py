"""What a curated folder remembers: the files that were looked at, the finished groups of shards, and everything said of them.

    scan(input) --new_files(ledger)--> sources to curate --(the job)--> Growth --publish--> the folder, one group larger

`dataset.json` names the finished groups. Rows of any table that belong to another group are from a run that was killed, and are
left out on reading; so the tables may be written before `dataset.json` in any order.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import report
from data_prep.report import Tables
from data_prep.split import Shot
from data_prep.write import Row, WriteConfig, cut_clips
from hunyuan_jax.data import records
from hunyuan_jax.data.dataset import replacing, write_index, write_json, write_shard
from hunyuan_jax.errors import UserError

_TABLES = ("rejected.parquet", "features.parquet", "files.parquet", "errors.jsonl")
_INDEX = ("dataset.json", "manifest.parquet", "report.json", "report.html", *_TABLES)
_SHARD = re.compile(r"clips-([0-9a-f]{6})-\d{5}-of-\d{5}\.array_record")
_EMPTY = Tables(manifest=(), features=(), rejected=(), files=(), errors=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A file of the input folder; times are of the last change, in ns, and -1 where there is no sidecar."""

    size: int
    mtime_ns: int
    sidecar_ns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """The finished part of a folder."""

    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shards: Sequence[Row] = ()
    tables: Tables = _EMPTY

    @property
    def groups(self) -> list[str]:
        return list(self.made_from.get("groups", ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """What one run adds."""

    group: str
    shards: Sequence[Row]
    tables: Tables


def scan(folder: Path, extensions: Sequence[str]) -> tuple[dict[str, Found], int]:
    """Files with a video's extension, by their path relative to `folder`, and the number of other files. Links to folders are
    not followed, and hidden ones not entered.

    Raises `UserError` if the folder is missing or cannot be read, or a path in it is not UTF-8.
    """
    if not folder.is_dir():
        raise UserError(
            f"A folder with video files was expected at {folder}, but {'there is a file' if folder.exists() else 'there is none'}."
        )
    found, others = {}, 0
    for directory, names, files in os.walk(folder, onerror=_cannot_read):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            path = Path(directory, name)
            if not name.lower().endswith(tuple(extensions)) or name.startswith(".") or not path.is_file():
                others += not name.endswith(".json")
                continue
            source = path.relative_to(folder).as_posix()
            try:
                source.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"The name of {source!r} is not UTF-8. Rename the file.") from error
            stat = path.stat()
            found[source] = Found(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sidecar_ns=_changed_ns(path.with_suffix(".json")))
    if not found:
        raise UserError(f"{folder} holds no video file ({others} others); files ending in {' '.join(extensions)} were expected.")
    return found, others


def _cannot_read(error: OSError) -> None:
    raise UserError(f"The folder {error.filename} cannot be read ({error.strerror}). Check its permissions.") from error


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def new_files(ledger: Ledger, found: Mapping[str, Found]) -> tuple[list[str], list[str]]:
    """Files to curate now, and files that have changed since their clips were made.

    A bad file that has changed is tried again. One with clips is not, for its clips lie in finished shards.
    """
    known = {row["source"]: row for row in ledger.tables.files}
    new = [source for source in found if source not in known]
    for source, row in known.items():
        if (
            source in found
            and Found(size=row["size"], mtime_ns=row["mtime_ns"], sidecar_ns=row["sidecar_ns"]) != found[source]
            and row["state"] == "bad"
        ):
            new.append(source)
    changed = [
        source
        for source, row in known.items()
        if source in found
        and row["state"] != "bad"
        and (row["size"] != found[source].size or row["sidecar_ns"] != found[source].sidecar_ns)
    ]
    return sorted(new), sorted(changed)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the folder for one run. Raises `UserError` if another one holds it, or if it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise UserError(f"The folder {output} cannot be made ({error.strerror}). Choose another one.") from error
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another curation is writing to {output}. Wait until it has ended.") from error
        yield


def restart(output: Path) -> None:
    """Removes what this job has written, and nothing else."""
    _check_kind(output)
    clean(output, Ledger())
    for name in _INDEX:
        (output / name).unlink(missing_ok=True)


def clean(output: Path, ledger: Ledger) -> None:
    """Removes what killed runs have left: the work folder, temporary files, shards that `dataset.json` does not name."""
    if not ledger.made_from:
        (output / "dataset.json").unlink(missing_ok=True)  # first, so that a half-emptied folder is no dataset
    shutil.rmtree(output / ".work", ignore_errors=True)
    named = {row["name"] for row in ledger.shards}
    for path in output.iterdir():
        whole, _, temporary = path.name.partition(".tmp-")
        ours = whole in _INDEX or _SHARD.fullmatch(whole)
        if ours and (temporary or (_SHARD.fullmatch(path.name) and path.name not in named)):
            path.unlink()


def _check_kind(output: Path) -> dict[str, Any] | None:
    """The content of `dataset.json`, if there is one. Raises `UserError` if it is of another kind of dataset."""
    try:
        index = json.loads((output / "dataset.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    if not isinstance(index, dict) or index.get("kind") != "Clip":
        raise UserError(f"{output} holds a dataset of another kind than clips. Choose another folder.")
    return index


def load(output: Path) -> Ledger:
    """The finished part of a folder; empty where there is nothing, or where an index or a table is missing or damaged."""
    index = _check_kind(output)
    try:
        if not index:
            return Ledger()
        groups = set(index["made_from"]["groups"])
        shards = {row["name"] for row in index["shards"]}
        rejected, features, files = (pq.read_table(output / name).to_pylist() for name in _TABLES[:3])
        errors = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
        manifest = [row for row in pq.read_table(output / "manifest.parquet").to_pylist() if row["shard"] in shards]
        ids = {row["id"] for row in manifest}
        tables = Tables(
            manifest=manifest,
            features=[row for row in features if row["id"] in ids],
            rejected=[row for row in rejected if row["group"] in groups],
            files=[row for row in files if row["group"] in groups],
            errors=[row for row in errors if row["group"] in groups],
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        print(f"curate: the tables in {output} are damaged or incomplete ({type(error).__name__}); everything is made again")
        return Ledger()
    if len(manifest) != index["records"] or len(tables.features) != len(manifest):
        print(f"curate: the tables in {output} do not agree with its index; everything is made again")
        return Ledger()
    return Ledger(made_from=index["made_from"], shards=index["shards"], tables=tables)


def lost_shards(output: Path, ledger: Ledger) -> list[Row]:
    """Shards of finished groups that are not there, or not of the size they had."""

    def size(name: str) -> int:
        path = output / name
        return path.stat().st_size if path.is_file() else -1

    return [row for row in ledger.shards if size(row["name"]) != row["bytes"]]


def remake_shard(folder: Path, output: Path, row: Row, ledger: Ledger, config: WriteConfig) -> None:
    """Cuts the clips of one lost shard again. Raises `UserError` if their files are gone or have changed."""
    entries = [entry for entry in ledger.tables.manifest if entry["shard"] == row["name"]]
    by_source = collections.defaultdict(list)
    for entry in entries:
        by_source[entry["source"]].append(_shot_of(entry))
    blobs: dict[str, bytes] = {}
    try:
        for source, shots in by_source.items():
            for shot, clip in cut_clips(folder / source, sorted(shots, key=lambda shot: shot.first_frame), config):
                blobs[shot.id] = records.to_bytes(clip)
    except UserError as error:
        raise UserError(f"{row['name']} is lost and cannot be made again from {source}: {error} Use --restart.") from error
    again = write_shard(output / row["name"], [blobs[entry["id"]] for entry in entries])
    if again["sha256"] != row["sha256"]:
        raise UserError(f"{row['name']} was lost and its files have changed since it was made. Use --restart to curate all again.")


def _shot_of(entry: Row) -> Shot:
    names = ("id", "source", "first_frame", "num_frames", "start_seconds", "end_seconds", "fps", "height", "width", "camera")
    scores = {name.removeprefix("score_"): value for name, value in entry.items() if name.startswith("score_")}
    caption = json.loads(entry["caption"])
    return Shot(**{name: entry[name] for name in names}, scores=scores, caption=caption, whole_shot=(0, 0), embedding=b"", thumbnail=b"")


def publish(output: Path, ledger: Ledger, growth: Growth, *, made_from: Mapping[str, Any], seconds: Mapping[str, float]) -> Tables:
    """Adds a group to the folder: tables and report first, the index last. Without any clip, the index is not written."""
    again = {row["source"] for row in growth.tables.files}  # bad files that were tried again
    old = ledger.tables
    tables = Tables(
        manifest=[*old.manifest, *_sorted(growth.tables.manifest, "shard", "index")],
        features=[*old.features, *_sorted(growth.tables.features, "id")],
        rejected=[*old.rejected, *_of_group(_sorted(growth.tables.rejected, "source", "start_seconds"), growth.group)],
        files=_sorted([*(row for row in old.files if row["source"] not in again), *_of_group(growth.tables.files, growth.group)], "source"),
        errors=[
            *(row for row in old.errors if row["source"] not in again),
            *_of_group(_sorted(growth.tables.errors, "source", "stage"), growth.group),
        ],
    )
    _write_parquet(
        output / "rejected.parquet",
        tables.rejected,
        pa.schema([("id", pa.string()), ("failed", pa.list_(pa.string())), ("group", pa.string())]),
    )
    _write_parquet(output / "features.parquet", tables.features, pa.schema([("id", pa.string())]))
    _write_parquet(output / "files.parquet", tables.files, pa.schema([("source", pa.string())]))
    with replacing(output / "errors.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in tables.errors))
    write_report(output, tables, seconds=seconds)
    if tables.manifest:
        shards = [*ledger.shards, *_sorted(growth.shards, "name")]
        write_index(
            output, kind="Clip", rows=tables.manifest, shards=shards, made_from={**made_from, "groups": [*ledger.groups, growth.group]}
        )
    return tables


def _sorted(rows: Sequence[Row], *keys: str) -> list[Row]:
    return sorted(rows, key=lambda row: tuple(row[key] for key in keys))


def _of_group(rows: Sequence[Row], group: str) -> list[Row]:
    return [{**row, "group": group} for row in rows]


def _write_parquet(path: Path, rows: Sequence[Row], schema_if_empty: pa.Schema) -> None:
    table = pa.Table.from_pylist(list(rows)) if rows else schema_if_empty.empty_table()
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def write_report(output: Path, tables: Tables, *, seconds: Mapping[str, float]) -> None:
    """Writes report.json and report.html; what the last run took goes in as `seconds`."""
    rounded = {name: round(value, 2) for name, value in seconds.items()}
    with replacing(output / "report.html") as temporary:
        temporary.write_text(report.page(tables, seconds=rounded))
    write_json(output / "report.json", {**report.funnel(tables), "seconds": rounded})
