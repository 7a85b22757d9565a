"""What else befalls a run, and the catalogue of it all: `launch/FAULTS.md` names for each fault the test that says what happens."""

import ast
import errno
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from absl import logging

from hunyuan_jax import errors, held_out, stops
from hunyuan_jax import train as training
from hunyuan_jax.errors import explain_disk_error
from hunyuan_jax.train import train
from tests.commands import ROOT, run_module
from tests.faults import LENGTHS, NEAR, kill_and_compare, spoil_and_compare, table_of
from tests.mesh_restores import MESHES
from tests.tiny_trainings import Left, Linear, tiny_config, write_clips

LAST = 8
OFTEN = {"steps": LAST, "log_every": 2, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder / "clips")
    return folder


@pytest.fixture
def run(data, monkeypatch):
    """Trains the linear task in a folder, with changes to its config."""

    def train_in(workdir: Path, changes=lambda config: None, **loop) -> None:
        config = tiny_config("linear", data, **{**OFTEN, **loop})
        changes(config)
        train(config, workdir)

    monkeypatch.setattr(training, "make_task", Linear.from_config)
    return train_in


@pytest.fixture
def said(caplog):
    logging.use_python_logging()
    caplog.set_level("WARNING")
    return caplog


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Left:
    """What a run leaves that nothing befell."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_task", Linear.from_config)
        train(tiny_config("linear", data, **OFTEN), workdir)
    return Left.by(workdir, LAST)


def same(workdir: Path, whole: Left) -> bool:
    left = Left.by(workdir, LAST)
    return (whole.differing_bits(left), whole.differing_values(left)) == (0, 0)


# --- Samples of the commands -----------------------------------------------------------------------------------------------------


def test_a_lost_process_of_several_costs_what_was_done_since_the_checkpoint(tmp_path):
    seed = time.time_ns() % 1000
    tallies = kill_and_compare(tmp_path, tasks=["linear"], processes=[2], kills=1, seed=seed, say=print)
    assert [said for tally in tallies for said in tally.wrong] == [], f"seed {seed}\n{table_of(tallies)}"
    assert [(tally.kills, tally.kind, tally.bits, tally.values) for tally in tallies] == [(1, "SIGKILL", 0, 0)]


def test_a_run_goes_on_upon_other_meshes_in_the_same_bits():
    """A pair that is drawn; all of them in a row where long tests are asked for, those of two processes among them."""
    drawn = random.sample([mesh for mesh in MESHES if "/" not in mesh and "8" not in mesh], 2)
    meshes = MESHES if os.environ.get("LONG_TESTS") else drawn
    said = run_module("tests.mesh_restores", *meshes, minutes=30)
    assert len(re.findall(r"^\| [x\d/]+ \| [x\d/]+ \| 0 \| 0 \| .* \|$", said, re.MULTILINE)) == len(meshes) - 1, said


def test_spoilt_data_lead_to_no_spoilt_checkpoint_and_to_the_loss_of_a_clean_run(tmp_path, monkeypatch):
    monkeypatch.setitem(LENGTHS, "linear", (96,))
    seed = time.time_ns() % 1000
    tally = spoil_and_compare(tmp_path, task="linear", runs=2, seed=seed, say=print)
    assert (tally.wrong, tally.not_finite) == ([], 0), f"seed {seed}"
    assert (tally.runs, tally.checkpoints > 4, tally.far <= NEAR["linear"]) == (2, True, True)


# --- What else befalls a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-20, 20])
def test_a_clock_that_jumps_changes_nothing(run, whole, tmp_path, monkeypatch, years):
    now, start = time.time, stops.Watchdog.doing
    shift = [0.0]

    def doing(self, what, kind=None):
        shift[0] = 3.15e7 * years if what == "the start of step 4" else shift[0]
        start(self, what, kind)

    monkeypatch.setattr(time, "time", lambda: now() + shift[0])
    monkeypatch.setattr(stops.Watchdog, "doing", doing)
    run(tmp_path)
    assert shift[0]
    assert same(tmp_path, whole)


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: out of memory"), MemoryError()])
def test_an_error_within_a_step_is_shown_and_what_was_saved_continues(run, whole, tmp_path, monkeypatch, error):
    compiled = stops.Agreement.jit

    def failing(self, step, **how):
        step = compiled(self, step, **how)
        calls = iter(range(LAST))

        def fail(state, batch):
            if next(calls) == 6:
                raise error
            return step(state, batch)

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(stops.Agreement, "jit", failing)
        with pytest.raises(type(error)):
            run(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}
    run(tmp_path)
    assert same(tmp_path, whole)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"\0{]" * 50), lambda path: os.truncate(path, 30)])
def test_metrics_that_are_damaged_or_gone_cost_their_lines_alone(run, whole, tmp_path, damage):
    run(tmp_path, steps=4)
    damage(tmp_path / "metrics.jsonl")
    run(tmp_path)
    left = Left.by(tmp_path, LAST)
    assert whole.differing_bits(left) == 0
    assert [line["step"] for line in left.logged] == [6, 8, 8]
    assert left.logged == whole.logged[-3:]


def test_a_preview_that_cannot_be_written_ends_the_run_with_the_reason_and_what_was_saved_continues(run, whole, tmp_path, monkeypatch):
    how = {"preview_every": 6, "preview_samples": 1}

    write = held_out.write_video

    def full(path, *what, **how):
        if path.stem != "step_00000000":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *what, **how)

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "write_video", full)
        with pytest.raises(OSError, match="No space left") as error:
            run(tmp_path, **how)
    assert explain_disk_error(error.value).startswith("The disk is full at ")
    run(tmp_path, **how)
    assert same(tmp_path, whole)
    assert {path.name for path in (tmp_path / "previews").glob("*.mp4")} == {f"step_{step:08d}.mp4" for step in (0, 6, 8)}


def test_a_folder_that_may_not_be_written_is_an_error_that_says_so(run, tmp_path, monkeypatch, capsys):
    """Root may write everywhere, so that the refusal is the system's in name alone."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "checkpoints"))

    monkeypatch.setattr(training, "Checkpoints", refuse)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"left with {code}") if code != 2 else None)
    errors.run_command(lambda _: run(tmp_path))
    assert "error: Permission was denied at" in capsys.readouterr().err


def test_another_learning_rate_counts_from_the_checkpoint_on(run, whole, tmp_path):
    run(tmp_path, steps=4)
    half = Left.by(tmp_path, 4)
    run(tmp_path, lambda config: config.optimizer.update({"learning_rate": 0.125, "warmup_steps": 0, "decay_steps": 0}))
    left = Left.by(tmp_path, LAST)
    assert left.logged[:2] == half.logged[:2] == whole.logged[:2]
    assert [line["learning_rate"] for line in left.logged[-3:-1]] == [0.125, 0.125]


def test_data_and_versions_that_are_others_than_before_are_told(run, data, tmp_path, monkeypatch, said):
    shutil.copytree(data, tmp_path / "data")
    run(tmp_path / "run", lambda config: config.data.update({"path": str(tmp_path / "data" / "clips")}), steps=4)
    assert "was" not in said.text
    with (tmp_path / "data" / "clips" / "dataset.json").open("a") as index:
        index.write("\n")
    environment = training.metrics.environment
    monkeypatch.setattr(training.metrics, "environment", lambda: environment() | {"python": "4.0"})
    run(tmp_path / "run", lambda config: config.data.update({"path": str(tmp_path / "data" / "clips")}))
    assert re.search(r"data\.json: index was \w+ and is \w+; from here on other samples are read than would have been", said.text)
    assert re.search(r"environment\.json: python was 3\S+ and is 4\.0; the same bits are not promised", said.text)


def test_a_finished_run_says_so_and_changes_nothing(run, tmp_path, said):
    said.set_level("INFO")
    run(tmp_path)
    assert "all 8 steps are done" not in said.text
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    run(tmp_path)
    assert "all 8 steps are done" in said.text
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}


# --- The catalogue ---------------------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    text = (ROOT / "launch" / "FAULTS.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in table if len(row) == 4 and row[0] not in ("fault", "---")]


def test_every_fault_of_the_catalogue_has_a_test_that_is_there():
    assert len(rows()) >= 30
    for fault, happens, lost, tests in rows():
        assert fault
        assert happens
        assert lost
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", tests)
        assert named, fault
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (fault, file, name)
