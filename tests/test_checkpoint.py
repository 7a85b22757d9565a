"""Laws of checkpoints: what is restored is what was saved, nothing bad counts, and nothing good is lost."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax import checkpoint, integrity
from hunyuan_jax.checkpoint import Checkpoints, Keep, load_params, not_finite, param_reader
from hunyuan_jax.errors import UserError, explain_disk_error
from tests.commands import ROOT
from tests.faults import FINE, SMALL_STEPS, flip_and_restore, small_state, write_small_run

NEWEST = SMALL_STEPS[-1]


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(0))


def equal(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), one, other)))


def names(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def one_file(workdir: Path, step: int, part: str = "params") -> Path:
    return next(path for path in sorted((workdir / "checkpoints" / str(step) / part / "d").iterdir()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Three checkpoints that nobody touches."""
    workdir = tmp_path_factory.mktemp("whole")
    write_small_run(workdir)
    return workdir


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of them."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def open_run(run):
    opened = []

    def open_with(keep: Keep | None = None) -> Checkpoints:
        if opened:
            opened[-1].close()
        opened.append(Checkpoints(run, keep=keep or Keep(last=3)))
        return opened[-1]

    yield open_with
    if opened:
        opened[-1].close()


@pytest.fixture
def said(caplog):
    logging.getLogger("absl").propagate = True
    caplog.set_level("WARNING")
    return caplog


def test_what_is_restored_is_what_was_saved_bit_for_bit(open_run):
    checkpoints = open_run()
    assert checkpoints.newest_sound() == checkpoints.committed == NEWEST
    state, data = checkpoints.restore(NEWEST, abstract())
    assert equal(state, small_state(NEWEST))
    assert data == {"next_index": NEWEST}


@pytest.mark.parametrize("part", ["params", "ema", "rest", "data"])
def test_damage_in_any_part_leads_to_the_one_before_with_a_warning_that_says_what_was_wrong(run, open_run, said, part):
    path = run / "checkpoints" / "30" / "data" / "metadata" if part == "data" else one_file(run, 30, part)
    flip(path)
    checkpoints = open_run()
    assert checkpoints.newest_sound() == 20
    assert equal(checkpoints.restore(20, abstract())[0], small_state(20))
    assert f"The checkpoint of step 30 is damaged: {part}/" in said.text
    assert "has changed: its checksum differs. The one of step 20 is used." in said.text
    assert names(run) == {"10", "20", "30.damaged"}


def test_where_none_is_sound_the_error_says_of_each_what_is_wrong_and_all_stay(run, open_run):
    one_file(run, 10).unlink()
    path = one_file(run, 20)
    path.write_bytes(path.read_bytes()[:-1])
    flip(run / "checkpoints" / "30" / "manifest.json")
    with pytest.raises(UserError, match=r"No checkpoint .* is sound: step 30: manifest\.json is damaged; step 20: .* bytes and not .*; "):
        open_run().newest_sound()
    with pytest.raises(UserError, match=r"step 10: params/.* is missing\. Restore"):
        open_run().newest_sound()
    with pytest.raises(UserError, match="is sound: step 30"):
        load_params(run, abstract().params, weights="raw")
    assert names(run) == {"10", "20", "30"}


def test_flipped_bits_and_files_cut_short_or_deleted_are_detected_or_harmless(whole, tmp_path):
    outcomes = list(flip_and_restore(whole, tmp_path, flips=30, seed=int.from_bytes(os.urandom(2), "big")))
    assert [outcome for outcome in outcomes if outcome[1] not in FINE] == []
    assert sum(outcome == "detected" for _, outcome in outcomes) > 5


def test_damaged_checkpoints_are_never_deleted_and_do_not_count(run, open_run):
    flip(one_file(run, 30))
    flip(one_file(run, 10))
    checkpoints = open_run(Keep(last=2))
    assert checkpoints.newest_sound() == 20
    for step in (30, 40):
        checkpoints.save(step, small_state(step), data={})
    checkpoints.wait()
    assert names(run) == {"30", "40", "30.damaged", "10.damaged"}
    assert equal(checkpoints.restore(30, abstract())[0], small_state(30))


def test_a_save_to_the_same_step_replaces_nothing_good(run, open_run):
    checkpoints = open_run()
    checkpoints.save(30, small_state(31), data={})
    checkpoints.wait()
    assert names(run) == {"10", "20", "30", "30.left"}
    integrity.verify(run / "checkpoints" / "30.left")
    os.rename(run / "checkpoints" / "30.left", run / "checkpoints" / "31")
    assert equal(checkpoints.restore(31, abstract())[0], small_state(30))


def manifest(*, planned=True, **metrics):
    return {"planned": planned, "metrics": metrics}


def test_the_newest_the_regular_and_the_best_stay():
    there = {step: manifest(psnr=float(-abs(step - 30)), lpips=float(step)) for step in range(10, 100, 10)}
    there[95] = manifest(planned=False)
    assert Keep(last=2).chosen(there) == {80, 90, 95}
    assert Keep(last=1, every=40).chosen(there) == {40, 80, 90, 95}
    assert Keep(last=1, best="psnr", most=True).chosen(there) == {30, 90, 95}
    assert Keep(last=1, best="lpips").chosen(there) == {10, 90, 95}
    assert Keep(last=1).chosen({10: manifest(planned=False), 20: manifest()}) == {20}
    assert Keep(last=1).chosen({}) == set()


def test_what_need_not_stay_is_removed(run, open_run):
    checkpoints = open_run(Keep(last=1, every=20, best="loss"))
    for step, loss in ((50, 0.1), (60, 0.5), (70, float("nan")), (90, 0.2)):
        checkpoints.save(step, small_state(step), data={}, metrics={"loss": loss})
    checkpoints.save(95, small_state(95), data={}, planned=False)
    checkpoints.wait()
    assert names(run) == {"20", "50", "60", "90", "95"}


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_committed(run, open_run, said, part, value):
    state = small_state(40)
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value) if x.ndim == 2 else x, getattr(state, part))
    checkpoints = open_run()
    assert not checkpoints.save(40, state.replace(**{part: broken}), data={})
    checkpoints.wait()
    assert names(run) == {"10", "20", "30"}
    assert f"The state after step 40 is not saved: {part} has values that are not finite." in said.text
    assert checkpoints.save(40, state, data={})


def test_whole_numbers_and_empty_parts_are_finite():
    assert not_finite(small_state(1).replace(opt_state={"count": jnp.array(3)}, ema={})) == []


@pytest.mark.parametrize("name", ["40.saving", "40.saving.orbax-checkpoint-tmp", "10.deleting"])
def test_what_a_kill_left_unfinished_is_removed_and_nothing_else(run, open_run, name):
    shutil.copytree(run / "checkpoints" / "30", run / "checkpoints" / name)
    for other in ("20.damaged", "20.left", "notes"):
        (run / "checkpoints" / other).mkdir()
    assert open_run().newest_sound() == 30
    assert names(run) == {"10", "20", "30", "20.damaged", "20.left", "notes"}


HOLDS = """
import sys, time
from pathlib import Path
from hunyuan_jax import checkpoint
checkpoint.LOCK_SECONDS = float(sys.argv[2])
held = checkpoint._lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_work_in_one_folder_and_a_killed_one_keeps_no_other_out(run, monkeypatch, said):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(run / "lock"), "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 0.3)
        with pytest.raises(UserError, match=rf"belongs to a run that is at work, process {holder.pid} on .*\. Wait for its end"):
            Checkpoints(run)
        assert f"is in use by process {holder.pid} on" in said.text
        monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 60)
        threading.Timer(0.5, holder.kill).start()
        checkpoints = Checkpoints(run)
        assert checkpoints.newest_sound() == NEWEST
        checkpoints.close()
    finally:
        holder.kill()
        holder.wait()


def test_a_file_system_without_locks_is_no_error(run, monkeypatch, said):
    def fail(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", fail)
    Checkpoints(run).close()
    assert "cannot be locked (No locks available): nothing keeps a second run out" in said.text


def test_a_checkpoint_has_its_final_name_only_with_its_manifest(run, open_run, monkeypatch):
    checkpoints, replace = open_run(), os.replace

    def fail(source, target):
        if Path(target).name == integrity.MANIFEST:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(integrity.os, "replace", fail)
    checkpoints.save(40, small_state(40), data={})
    futures.wait([checkpoints._pending])
    with pytest.raises(OSError, match="No space left"):
        checkpoints.check()
    with pytest.raises(OSError, match="No space left") as error:
        checkpoints.wait()
    assert explain_disk_error(error.value).startswith("The disk is full")
    assert names(run) == {"10", "20", "30", "40.saving"}
    assert checkpoints.newest_sound() == 30


def test_checkpoints_from_before_there_were_manifests_are_restored_with_a_notice_and_get_them(run, open_run, said):
    for step in SMALL_STEPS:
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    params, step = load_params(run, abstract().params, weights="raw")
    assert (equal(params, small_state(NEWEST).params), step) == (True, NEWEST)
    assert "nothing is verified" in said.text
    checkpoints = open_run()
    assert checkpoints.newest_sound() == NEWEST
    assert "the checkpoints of steps 30, 20, 10 are from a version without checksums" in said.text
    assert equal(checkpoints.restore(NEWEST, abstract())[0], small_state(NEWEST))
    flip(one_file(run, NEWEST))
    assert open_run().newest_sound() == 20


def test_without_its_manifest_beside_others_with_theirs_a_checkpoint_is_damaged(run, open_run, said):
    (run / "checkpoints" / "30" / "manifest.json").unlink()
    assert open_run().newest_sound() == 20
    assert "The checkpoint of step 30 is damaged: manifest.json is missing." in said.text


def test_readers_verify_what_they_read_and_fall_back_too(run, said):
    flip(one_file(run, 30, "ema"))
    params, step = load_params(run, abstract().params)
    assert (equal(params, small_state(20).ema), step) == (True, 20)
    read, step = param_reader(run, weights="raw")
    assert step == 30
    assert read("layer/kernel", (32, 33)).tobytes() == np.asarray(small_state(30).params["layer"]["kernel"]).tobytes()
    assert "The checkpoint of step 30 is damaged: ema/" in said.text
    assert names(run) == {"10", "20", "30"}


def test_a_run_that_left_a_course_does_not_come_back_to_it(run, open_run):
    checkpoints = open_run(Keep(last=5))
    checkpoints.save(40, small_state(40), data={}, planned=False)
    assert checkpoints.newest_sound(planned_before=45) == 30
    assert checkpoints.newest_sound(planned_before=29) == 20
    assert checkpoints.newest_sound(planned_before=9) is None
    checkpoints.leave_after(20)
    assert checkpoints.newest_sound() == 20
    assert names(run) == {"10", "20", "30.left", "40.left"}


def test_on_a_disk_that_can_no_longer_be_written_the_error_says_so_and_the_last_checkpoint_stays(tmp_path):
    """In a name space of its own, on a file system that becomes read-only."""
    program = """
import subprocess, sys
from pathlib import Path
from hunyuan_jax.checkpoint import Checkpoints
from hunyuan_jax.errors import run_command
from tests.faults import small_state
def main(argv):
    checkpoints = Checkpoints(Path(argv[1]))
    checkpoints.save(10, small_state(10), data={})
    checkpoints.wait()
    checkpoints._lock.close()  # `mount` minds a file that is open to be written, and a disk that fails does not
    subprocess.run(["mount", "-o", "remount,ro", argv[1]], check=True)
    print("sound", checkpoints.newest_sound())
    checkpoints.save(20, small_state(20), data={})
    checkpoints.wait()
run_command(main)
"""
    inside = 'mount -t tmpfs -o size=20m tmpfs "$1" && "$2" -c "$3" "$1"; code=$?; ls "$1/checkpoints"; exit $code'

    def in_name_space(script: str) -> subprocess.CompletedProcess[str]:
        call = ["unshare", "-rm", "bash", "-c", script, "bash", str(tmp_path), sys.executable, program]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)

    if not shutil.which("unshare") or in_name_space('mount -t tmpfs tmpfs "$1"').returncode:
        pytest.skip("This system lets no user mount a file system (unshare -rm), so none can be made read-only.")
    done = in_name_space(inside)
    assert done.returncode == 2, done.stderr
    assert "error: The file system is read-only" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["sound", "10", "10"]
