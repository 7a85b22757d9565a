"""Laws of a dataset on disk: it is whole or it is none, and damage is said, not skipped."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hunyuan_jax.data import records
from hunyuan_jax.data.dataset import is_held_out, open_dataset, replacing, write_index, write_json, write_shard
from hunyuan_jax.errors import UserError
from tests.test_records import CLIP


def clip(number: int, *, size: int = 100) -> records.Clip:
    return dataclasses.replace(CLIP, id=f"clip-{number}", video=np.random.default_rng(number).bytes(size))


def write(folder: Path, *, shards: int = 2, of: int = 3, size: int = 100) -> list[records.Clip]:
    """A dataset of `shards` shards of `of` clips, its rows in another order than its records."""
    clips = [clip(number, size=size) for number in range(shards * of)]
    groups = [clips[start : start + of] for start in range(0, len(clips), of)]
    indexed = [
        write_shard(folder / f"clips-{n}.array_record", [records.to_bytes(item) for item in group]) for n, group in enumerate(groups)
    ]
    rows = [{"id": item.id, "shard": indexed[n]["name"], "index": i} for n, group in enumerate(groups) for i, item in enumerate(group)]
    write_index(folder, kind="Clip", rows=rows[::-1], shards=indexed, made_from={"seed": 1})
    return clips[::-1]


def test_records_are_read_by_row_number(tmp_path):
    clips = write(tmp_path)
    dataset = open_dataset(tmp_path, kind="Clip")
    assert dataset.made_from == {"seed": 1}
    assert dataset.read([4, 0, 4]) == [clips[4], clips[0], clips[4]]
    assert dataset.read([]) == []
    assert [row["id"] for row in dataset.rows] == [item.id for item in clips]


def test_the_same_records_are_the_same_shard(tmp_path):
    items = [records.to_bytes(clip(n)) for n in range(5)]
    first, second = (write_shard(tmp_path / name, items) for name in ("a", "b"))
    assert first["sha256"] == second["sha256"]
    assert first["records"] == 5


def test_hosts_that_share_a_disk_write_the_same_file_at_the_same_time(tmp_path, monkeypatch):
    """In containers, which all have the same process number."""
    with contextlib.ExitStack() as all_at_once:
        for host in ("first", "second"):
            monkeypatch.setattr("socket.gethostname", lambda host=host: host)
            all_at_once.enter_context(replacing(tmp_path / "file")).write_text("the same")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from hunyuan_jax.data import dataset
folder, where = Path(sys.argv[1]), sys.argv[2]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
real_replace, calls = os.replace, []
def replace(a, b):
    if Path(b).name.startswith(where):
        die()
    real_replace(a, b)
os.replace = replace
shard = dataset.write_shard(folder / "clips-0.array_record", [b"x" * 1000] * 3)
rows = [{"id": str(i), "shard": shard["name"], "index": i} for i in range(3)]
dataset.write_index(folder, kind="Clip", rows=rows, shards=[shard], made_from={})
"""


@pytest.mark.parametrize("where", ["clips-0", "manifest", "dataset.json"])
def test_a_killed_writer_leaves_no_dataset(tmp_path, where):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), where], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "dataset.json").exists()
    with pytest.raises(UserError, match="holds no dataset"):
        open_dataset(tmp_path, kind="Clip")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"old": True})

    def fail() -> None:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        fail()
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("lost", [1.0, 0.99, 0.5, 0.1])
def test_a_truncated_shard_is_refused(tmp_path, lost):
    write(tmp_path, size=100_000)
    shard = tmp_path / "clips-1.array_record"
    os.truncate(shard, int((1 - lost) * shard.stat().st_size))
    with pytest.raises(UserError, match="Write the dataset again"):
        open_dataset(tmp_path, kind="Clip")


def test_a_missing_shard_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "clips-0.array_record").unlink()
    with pytest.raises(UserError, match="is missing"):
        open_dataset(tmp_path, kind="Clip")


def test_a_dataset_of_another_kind_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="'Latent' dataset"):
        open_dataset(tmp_path, kind="Latent")


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet"])
def test_a_broken_index_is_refused(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(tmp_path, kind="Clip")


def test_an_empty_dataset_is_refused(tmp_path):
    write_index(tmp_path, kind="Clip", rows=[], shards=[], made_from={})
    with pytest.raises(UserError, match="no records"):
        open_dataset(tmp_path, kind="Clip")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no dataset"):
        open_dataset(tmp_path / "nowhere", kind="Clip")


def test_held_out_sources_are_a_fraction_that_only_grows():
    names = [f"in/{n}.mp4" for n in range(2000)]
    few, more = ({name for name in names if is_held_out(name, fraction=f)} for f in (0.05, 0.2))
    assert few < more
    assert abs(len(few) / 2000 - 0.05) < 0.02
    assert not any(is_held_out(name, fraction=0.0) for name in names)
