"""Laws of damaged records: their slots are filled by a rule that every host knows, all other slots stay, and the run says what it met."""

import dataclasses
import functools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hunyuan_jax.data import dataset as datasets
from hunyuan_jax.data import records
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset, open_dataset, write_index, write_shard
from hunyuan_jax.data.loader import DataConfig, Loader, ReadStep, held_out_batches, rows_for, sample_id, training_schedule
from hunyuan_jax.data.quarantine import Damage, Quarantine, read_entries
from hunyuan_jax.data.records import Clip, DamagedRecord, Latent, TextStates
from hunyuan_jax.data.samples import make_sample
from hunyuan_jax.data.schedule import Schedule
from hunyuan_jax.errors import UserError
from tests.tiny_trainings import flip_in_records, write_clips

BUCKET = Bucket(frames=3, height=16, width=16, batch=4, intervals=(1, 2))
LATENTS = Bucket(frames=5, height=8, width=8, batch=2)
STEPS = 9  # of 4 clips of 12: three epochs
DAMAGED = (2, 3, 7)
RNG = np.random.default_rng(0)
LATENT = Latent(
    id="a/5x8x8",
    bucket=LATENTS.shape,
    fps=8.0,
    source="a.mp4",
    mean=RNG.normal(size=(2, 1, 1, 4)).astype(np.float32),
    logvar=RNG.normal(size=(2, 1, 1, 4)).astype(np.float32),
    texts=(TextStates(prompt="a", txt=np.ones((3, 6), np.float32), pooled=np.ones(5, np.float32)),),
)
LATENT_ROW = {"id": LATENT.id, "source": LATENT.source, "frames": 5, "height": 8, "width": 8}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(datasets, "READ_AGAIN_AFTER", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sound"
    write_clips(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(sound) -> Path:
    folder = sound.parent / "damaged"
    shutil.copytree(sound, folder)
    flip_in_records(folder / "clips-0.array_record", *DAMAGED)
    return folder


@dataclasses.dataclass(frozen=True)
class Host:
    """The sharding of a process that holds these rows of a batch."""

    rows: slice

    def addressable_devices_indices_map(self, shape):
        return {0: (self.rows,)}


def config_of(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(path=str(folder), kind="Clip", buckets=(), held_out=0.0, **changes)


def reading(folder: Path, rows: slice = slice(None), *, most: int = 10) -> ReadStep:
    dataset = open_dataset(folder, kind="Clip")
    schedule = training_schedule(config_of(folder), dataset, buckets=[BUCKET], seed=0)
    return ReadStep(dataset, schedule, 0, None, None, Host(rows), most)  # type: ignore[arg-type]


def loading(folder: Path, workdir: Path, *, start: int = 0, **changes: Any) -> Loader:
    dataset, config = open_dataset(folder, kind="Clip"), config_of(folder, **changes)
    schedule = training_schedule(config, dataset, buckets=[BUCKET], seed=0)
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:1]), "x"), PartitionSpec("x"))
    workdir.mkdir(exist_ok=True)
    return Loader(config, schedule, dataset, sharding=sharding, steps=STEPS, workdir=workdir, start=start)


def batches_of(read: ReadStep) -> list[VideoBatch]:
    out = [read(number).batch for number in range(STEPS)]
    assert all(batch is not None for batch in out)
    return out  # type: ignore[return-value]


# --- Which samples are read ----------------------------------------------------------------------------------------------------


def test_only_the_slots_of_damaged_records_change_and_they_hold_what_the_plan_says(sound, damaged):
    read = reading(damaged)
    replaced = 0
    for number, (whole, came) in enumerate(zip(batches_of(reading(sound)), batches_of(read), strict=True)):
        np.testing.assert_array_equal(whole.sample_id, came.sample_id)
        for slot, row in enumerate(read.schedule.step(number).rows):
            expected = whole.frames[slot]
            if row in DAMAGED:
                other = next(row for row in read.schedule.instead(number, slot) if row not in DAMAGED)
                rng = np.random.default_rng(int(whole.sample_id[slot]))
                (item,) = read.dataset.read([other])
                expected = make_sample(item, read.dataset.rows[other], BUCKET, rng=rng, shapes=None).frames
                replaced += 1
            np.testing.assert_array_equal(came.frames[slot], expected)
    assert replaced == 3 * len(DAMAGED)


@pytest.mark.parametrize("cut", [1, 2])
def test_two_hosts_read_what_one_reads(damaged, cut):
    parts = [batches_of(reading(damaged, rows)) for rows in (slice(cut), slice(cut, None))]
    for whole, one, two in zip(batches_of(reading(damaged)), *parts, strict=True):
        jax.tree.map(lambda a, b, c: np.testing.assert_array_equal(a, np.concatenate([b, c])), whole, one, two)


def test_the_rows_that_may_stand_in_are_all_others_half_an_epoch_away_first():
    plan = reading_plan(rows=10)
    first = [[next(plan.instead(number, slot)) for slot in range(4)] for number in range(STEPS)]
    assert first != [list(plan.step(number).rows) for number in range(STEPS)]
    for number in range(STEPS):
        for slot, row in enumerate(plan.step(number).rows):
            assert sorted((row, *plan.instead(number, slot))) == list(range(10))
    # In the order of the first epoch, the slots that follow each other in the plan are half of it, five, behind their substitutes.
    order = [row for number in range(STEPS) for row in plan.step(number).rows][:10]
    assert [row for rows in first for row in rows][:5] == order[5:]
    assert list(reading_plan(rows=1).instead(0, 0)) == []


def reading_plan(*, rows: int) -> Schedule:
    return Schedule(0, (BUCKET,), (tuple(range(rows)),))


@pytest.mark.parametrize("keep", [True, False])
def test_a_resumed_run_reads_and_lists_the_same_and_without_its_list_it_reads_the_same(damaged, tmp_path, keep):
    at = 5
    loader = loading(damaged, tmp_path / "run")
    whole, counts, state = [], [], None
    for number in range(STEPS):
        if number == at:
            state = loader.state()
        whole.append(next(loader))
        counts.append(loader.quarantined(number + 1))
    listed = read_entries((tmp_path / "run").glob("quarantine-*"))
    assert counts[-1] == len(DAMAGED) == len({entry["row"] for entry in listed})
    assert counts == [sum(entry["step"] <= step for entry in listed) for step in range(1, STEPS + 1)]
    if not keep:
        shutil.rmtree(tmp_path / "run")
    again = loading(damaged, tmp_path / "run", start=at)
    again.restore(state)
    for number in range(at, STEPS):
        batch = next(again)
        jax.tree.map(np.testing.assert_array_equal, batch, whole[number])
        if keep:
            assert again.quarantined(number + 1) == counts[number]
    if keep:
        assert read_entries((tmp_path / "run").glob("quarantine-*")) == listed


# --- What is damage ------------------------------------------------------------------------------------------------------------


def packed(item: Clip | Latent, **changes: Any) -> bytes:
    return msgpack.packb(msgpack.unpackb(records.to_bytes(item)) | changes)


def changed(array: np.ndarray, **how: Any) -> list[Any]:
    return records._pack_array(np.full(how.get("shape", array.shape), how.get("value", 0), how.get("dtype", array.dtype)))


def shapes_of(bucket: Bucket) -> VideoBatch:
    array = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    latent: Any = array((bucket.batch, 2, 1, 1, 4))
    return VideoBatch(sample_id=None, mean=latent, logvar=latent, txt=array((1, 3, 6)), pooled=array((1, 5)))  # type: ignore[arg-type]


def text_with(**changes: Any) -> list[Any]:
    text = LATENT.texts[0]
    fields = {"prompt": text.prompt, "txt": changed(text.txt), "pooled": changed(text.pooled)} | changes
    return [list(fields.values())]


LATENT_DAMAGE = {
    "nothing": b"",
    "cut short": packed(LATENT)[:-30],
    "of another version": packed(LATENT, v=2),
    "another record": packed(LATENT, id="b/5x8x8"),
    "of a held-out source": packed(LATENT, source="b.mp4"),
    "of another bucket": packed(LATENT, bucket=[9, 8, 8]),
    "of no bucket": packed(LATENT, bucket=[]),
    "a clip": records.to_bytes(Clip(**{f.name: None for f in dataclasses.fields(Clip)} | {"id": LATENT.id})),
    "mean of another shape": packed(LATENT, mean=changed(LATENT.mean, shape=(2, 1, 1, 3))),
    "logvar of another shape": packed(LATENT, logvar=changed(LATENT.mean, shape=(8,))),
    "a shape beyond all numbers": packed(LATENT, mean=["float32", [2**64 - 1], b""]),
    "bytes for numbers": packed(LATENT, mean=changed(LATENT.mean, dtype=np.uint8)),
    "a mean that is not finite": packed(LATENT, mean=changed(LATENT.mean, value=np.nan)),
    "an infinite logvar": packed(LATENT, logvar=changed(LATENT.mean, value=np.inf)),
    "no text": packed(LATENT, texts=[]),
    "a prompt that is a number": packed(LATENT, texts=text_with(prompt=3)),
    "text states of another width": packed(LATENT, texts=text_with(txt=changed(LATENT.mean, shape=(3, 7)))),
    "text states without tokens": packed(LATENT, texts=text_with(txt=changed(LATENT.mean, shape=(6,)))),
    "a pooled number": packed(LATENT, texts=text_with(pooled=changed(LATENT.mean, shape=()))),
    "a pooled vector of another width": packed(LATENT, texts=text_with(pooled=changed(LATENT.mean, shape=(6,)))),
    "text states that are not finite": packed(LATENT, texts=text_with(txt=changed(LATENT.mean, shape=(3, 6), value=np.nan))),
}


@pytest.mark.parametrize("what", LATENT_DAMAGE)
def test_a_latent_that_is_not_what_its_row_says_is_damaged(tmp_path, what):
    whole = dataclasses.replace(LATENT, id="whole/5x8x8", source="whole.mp4")
    items = [records.to_bytes(whole), LATENT_DAMAGE[what]]
    shard = write_shard(tmp_path / "latents.array_record", items)
    rows = [{**LATENT_ROW, "shard": shard["name"], "index": i} for i in range(2)]
    rows[0] |= {"id": whole.id, "source": whole.source}
    write_index(tmp_path, kind="Latent", rows=rows, shards=[shard], made_from={})
    dataset = open_dataset(tmp_path, kind="Latent")
    config = DataConfig(path=str(tmp_path), kind="Latent", buckets=(), held_out=0.0, text_length=3)
    schedule = training_schedule(config, dataset, buckets=[LATENTS], seed=0)
    read = ReadStep(dataset, schedule, 3, None, shapes_of, Host(slice(None)), 10)(0)  # type: ignore[arg-type]
    (met,) = read.met
    assert (met.id, met.row, met.substitute) == (LATENT.id, 1, whole.id)
    assert met.reason
    np.testing.assert_array_equal(read.batch.mean, np.stack([whole.mean] * 2))
    assert list(read.batch.sample_id) == [sample_id(dataset.rows[row]["id"], 0) for row in schedule.step(0).rows]


def test_a_clip_that_is_not_what_its_row_says_is_damaged(sound, tmp_path):
    secret = tmp_path / "secret.mp4"
    (whole,) = open_dataset(sound, kind="Clip").read([0])
    row = {"id": whole.id, "source": whole.source, "num_frames": 5, "height": 16, "width": 16}
    secret.write_bytes(whole.video)
    make_sample(whole, row, BUCKET, rng=None, shapes=None)
    changes = [{"video": b""}, {"video": whole.video[:1000]}, {"video": b"x" * 3000}, {"video": str(secret)}, {"video": None}]
    for change in [*changes, {"num_frames": 6}, {"height": 32}, {"id": 3}, {"source": "other.mp4"}]:
        item = records.from_bytes(packed(whole, **change))
        with pytest.raises(DamagedRecord):
            make_sample(item, row, BUCKET, rng=None, shapes=None)
        if "num_frames" in change:  # the manifest may be as wrong as the record
            with pytest.raises(DamagedRecord, match="5 frames and should have 6"):
                make_sample(item, row | change, BUCKET, rng=None, shapes=None)


FLIPS = 1000 if os.environ.get("LONG_TESTS") else 30


def test_bits_flipped_anywhere_in_a_shard_are_harmless_quarantined_or_refused(sound, tmp_path):
    """A flip in what leads to the records is refused, in this dataset with the shard, wherever it lies."""
    whole = (sound / "clips-0.array_record").read_bytes()
    seed = int.from_bytes(os.urandom(2), "big")
    draw, steps, outcomes = random.Random(seed), range(3), []
    expected = [reading(sound)(number).batch for number in steps]
    shutil.copytree(sound, tmp_path / "clips")
    for _ in range(FLIPS):
        data = bytearray(whole)
        places = [draw.randrange(len(data) if draw.random() < 0.2 else 34_000) for _ in range(draw.choice((1, 1, 1, 40)))]
        for place in places:
            data[place] ^= 1 << draw.randrange(8)
        (tmp_path / "clips" / "clips-0.array_record").write_bytes(data)
        try:
            read = [reading(tmp_path / "clips", most=12)(number) for number in steps]
        except UserError:
            outcomes.append("refused")
            continue
        met = {damage.row for result in read for damage in result.met}
        outcomes.append("quarantined" if met else "harmless")
        if len(met) == 12:
            continue
        plan = reading(sound).schedule
        for number, (result, batch) in enumerate(zip(read, expected, strict=True)):
            for slot, row in enumerate(plan.step(number).rows):
                assert row in met or (result.batch.frames[slot] == batch.frames[slot]).all(), f"seed {seed}, {places}"
    assert outcomes.count("quarantined") > FLIPS / 3, f"seed {seed}: {outcomes}"


def test_bits_flipped_in_a_record_before_it_was_written_are_read_or_damage(sound):
    """No checksum sees these."""
    seed = int.from_bytes(os.urandom(2), "big")
    draw, shapes = random.Random(seed), shapes_of(LATENTS)
    (clip,) = open_dataset(sound, kind="Clip").read([0])
    rows = {"Clip": {"id": clip.id, "source": clip.source, "num_frames": 5}, "Latent": LATENT_ROW}
    for item in [clip, LATENT] * (2 * FLIPS):
        data = bytearray(records.to_bytes(item))
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        data = data[: draw.choice((len(data), len(data), draw.randrange(len(data))))]
        row, bucket = rows[type(item).__name__], BUCKET if item is clip else LATENTS
        try:
            make_sample(records.from_bytes(bytes(data)), row, bucket, rng=np.random.default_rng(0), shapes=shapes)
        except DamagedRecord:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {bytes(data)!r}") from error


class Failing(ArrayRecordDataSource):
    """A source whose first `times` readings fail as when a disk does."""

    times = 0

    def __init__(self, paths):
        Failing.times -= 1
        if Failing.times >= 0:
            raise RuntimeError("open() failed: Input/output error; opening shard")
        super().__init__(paths)


@pytest.mark.parametrize(("times", "reads"), [(0, True), (2, True), (3, False)])
def test_a_disk_that_fails_is_asked_again_and_then_named_but_no_record_is_blamed(sound, damaged, monkeypatch, times, reads):
    dataset: Dataset = open_dataset(damaged, kind="Clip")
    monkeypatch.setattr(datasets.array_record_data_source, "ArrayRecordDataSource", Failing)
    Failing.times = times
    if reads:
        found = dataset.read_each(range(12))
        assert tuple(n for n, item in enumerate(found) if isinstance(item, DamagedRecord)) == DAMAGED
    else:
        with pytest.raises(UserError, match=r"clips-0.array_record cannot be read \(open\(\) failed: Input/output") as raised:
            dataset.read_each(range(12))
        assert not isinstance(raised.value, DamagedRecord)


# --- What the run says of it ---------------------------------------------------------------------------------------------------


def test_each_damaged_record_is_listed_once_with_where_it_was_met_and_what_took_its_place(damaged, tmp_path):
    loader, read = loading(damaged, tmp_path), reading(damaged)
    for _ in range(STEPS):
        next(loader)
    lines = [json.loads(line) for line in (tmp_path / "quarantine-00000.jsonl").read_text().splitlines()]
    ids = [row["id"] for row in read.dataset.rows]
    assert sorted(line["row"] for line in lines) == list(DAMAGED)
    for line in lines:
        assert line.keys() == {"id", "row", "reason", "step", "epoch", "host", "substitute"}
        assert line["id"] == ids[line["row"]]
        assert "hash mismatch" in line["reason"]
        assert line["host"]
        step = read.schedule.step(line["step"] - 1)
        if line["row"] in step.rows:
            slot = step.rows.index(line["row"])
            assert line["epoch"] == step.epochs[slot]
            assert line["substitute"] == ids[next(row for row in read.schedule.instead(line["step"] - 1, slot) if row not in DAMAGED)]


def test_more_damage_than_the_limit_ends_the_run_with_the_list_and_the_first_reasons(damaged, tmp_path):
    assert len(list(loading(damaged, tmp_path, quarantine_limit=3))) == STEPS
    with pytest.raises(UserError, match=r"3 records are damaged, and data.quarantine_limit allows 2") as raised:
        list(loading(damaged, tmp_path, quarantine_limit=2))
    assert str(tmp_path / "quarantine-") in str(raised.value)
    assert all(f"clip-{row}: Corrupted Riegeli" in str(raised.value) for row in DAMAGED)


@pytest.mark.parametrize("limit", [0.001, 5, 0])
def test_a_dataset_without_a_sound_record_ends_the_run_whatever_the_limit(sound, tmp_path, limit):
    shutil.copytree(sound, tmp_path / "clips")
    flip_in_records(tmp_path / "clips" / "clips-0.array_record", *range(12))
    loader = loading(tmp_path / "clips", tmp_path / "run", quarantine_limit=limit)
    with pytest.raises(UserError, match=r"records are damaged, and data.quarantine_limit allows|could stand in"):
        next(loader)


def test_the_limit_is_a_share_or_a_number_of_records():
    limits = [((0, 10**6), 0), ((0.001, 10**6), 1000), ((0.001, 500), 10), ((1, 500), 1), ((25, 500), 25)]
    for (limit, count), most in limits:
        assert config_of(Path("x"), quarantine_limit=limit).most_damaged(count) == most
    for wrong in (-1, float("nan")):
        with pytest.raises(UserError, match="quarantine_limit must be at least 0"):
            config_of(Path("x"), quarantine_limit=wrong)


def damage(row: int, reason: str = "broken") -> Damage:
    return Damage(id=f"clip-{row}", row=row, reason=reason, epoch=0, substitute=None)


def test_processes_list_apart_and_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def of(process: int, **how: Any) -> Quarantine:
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return Quarantine(tmp_path, **{"most": 3, "after": 0} | how)

    second = of(1)
    second.add(1, [damage(4)])
    second.add(5, [damage(5), damage(4)])
    second.add(7, [damage(6, "with\x1b[31m colours" + "!" * 1000)])
    first = of(0)
    first.add(2, [damage(4), damage(7)])
    assert [first.count(step) for step in (1, 2, 4, 5)] == [1, 2, 2, 3]
    with pytest.raises(UserError, match=r"4 records are damaged, and data.quarantine_limit allows 3"):
        first.count(7)
    entries = read_entries([tmp_path / "quarantine-00001.jsonl"])
    assert [(entry["row"], entry["step"]) for entry in entries] == [(4, 1), (5, 5), (6, 7)]
    assert entries[2]["reason"].startswith("with [31m colours!")
    assert len(entries[2]["reason"]) == 300
    # One process goes on after step 4 and takes care of the list that is nobody's now; a line cut short by a kill is forgotten.
    with (tmp_path / "quarantine-00001.jsonl").open("a") as file:
        file.write('{"id": "clip-')
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    alone = of(0, after=4)
    assert alone.count(4) == alone.count(9) == 2
    assert [entry["row"] for entry in read_entries([tmp_path / "quarantine-00001.jsonl"])] == [4]
    of(0, after=0)
    assert list(tmp_path.iterdir()) == []


def test_damaged_held_out_records_are_left_out_and_the_next_come_up(sound, damaged):
    """Up to as many damaged ones as training may meet."""
    bucket, whole = dataclasses.replace(BUCKET, batch=2), open_dataset(sound, kind="Clip")
    config = dataclasses.replace(config_of(sound), held_out=0.9)
    rows = rows_for(whole, bucket, held_out=True, fraction=0.9)
    left = [row for row in rows if row not in DAMAGED]
    assert set(DAMAGED) & set(rows[:5])
    names = [sample_id(whole.rows[row]["id"], 0) for row in left]
    broken = open_dataset(damaged, kind="Clip")
    for limit in (5, 100):
        batches = held_out_batches(config, broken, bucket, limit=limit)
        assert [int(i) for batch in batches for i in batch.sample_id] == names[:limit]
        assert [len(batch.sample_id) for batch in batches][:2] == [2, 2]
    everything = np.concatenate([batch.frames for batch in held_out_batches(config, whole, bucket, limit=100)])
    np.testing.assert_array_equal(np.concatenate([b.frames for b in batches]), everything[[rows.index(row) for row in left]])
    with pytest.raises(UserError, match=r"held-out records of .* are damaged"):
        held_out_batches(dataclasses.replace(config, quarantine_limit=0), broken, bucket, limit=5)
