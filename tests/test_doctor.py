"""Laws of the doctor: a sound machine passes every check, each fault is one finding with its remedy, and nothing ends in a traceback."""

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest

from hunyuan_jax import doctor, video_io
from hunyuan_jax.data import records
from hunyuan_jax.data.dataset import write_index, write_shard
from hunyuan_jax.doctor import Finding, Options
from hunyuan_jax.errors import UserError
from tests.commands import ROOT
from tests.test_records import CLIP, LATENT

DEPENDS_ON_THE_MACHINE = {"host memory", "shared memory", "open files", "space"}  # a small one is a warning
HERE = Options(workdir=Path("."))
LINE = re.compile(r"(pass    |warning |failure ) [a-z ]+: .+\.")


def write_dataset(folder: Path, record: records.Clip | records.Latent) -> None:
    folder.mkdir()
    shard = write_shard(folder / "records.array_record", [records.to_bytes(record)])
    rows = [{"id": record.id, "shard": shard["name"], "index": 0}]
    write_index(folder, kind=type(record).__name__, rows=rows, shards=[shard], made_from={})


def real_clip() -> records.Clip:
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 24, 3), np.uint8)
    return dataclasses.replace(CLIP, video=video_io.encode_mp4(frames, fps=CLIP.fps), num_frames=3, height=16, width=24)


def attempt(check, *arguments, **options) -> Finding:
    """The finding as the command would show it."""
    return doctor._attempt(check.__name__.replace("_", " "), lambda: check(*arguments, **options))


def assert_failure(finding: Finding, *parts: str, state: str = "failure") -> None:
    assert finding.state == state
    assert finding.remedy
    assert all(part in finding.found for part in parts), finding.found
    assert LINE.fullmatch(doctor.format_finding(finding))


@pytest.fixture
def no_process_left():
    """Fails a test that leaves a process of its own behind."""
    before = psutil.Process().children()
    yield
    assert [process for process in psutil.Process().children() if process not in before] == []


def test_a_sound_machine_passes_every_check_and_json_is_all_that_is_printed(tmp_path):
    workdir, data = tmp_path / "run", tmp_path / "data"
    workdir.mkdir()
    write_dataset(data, real_clip())
    command = [sys.executable, "-m", "hunyuan_jax.doctor", "--workdir", str(workdir), "--data", str(data), "--json"]
    environment = dict(os.environ) | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    findings = {finding["name"]: finding for finding in said["findings"]}
    assert list(findings) == list(doctor.checks(Options(workdir=workdir, data=data)))
    states = {name: finding["state"] for name, finding in findings.items() if name not in DEPENDS_ON_THE_MACHINE}
    assert states == dict.fromkeys(states, "pass")
    assert all(findings[name]["state"] in ("pass", "warning") for name in DEPENDS_ON_THE_MACHINE)
    assert said["state"] in ("pass", "warning")
    assert "2 x cpu" in findings["devices"]["found"]
    assert "xla_force_host_platform_device_count=2" in findings["settings"]["found"]
    assert list(workdir.iterdir()) == []


def run_without(left_out: set[str], *options: str) -> list[str]:
    """The lines of the command, run by an interpreter with `options`, where some checks are left out to save time. It must fail."""
    program = f"""
from hunyuan_jax import doctor
checks = doctor.checks
doctor.checks = lambda options: {{name: check for name, check in checks(options).items() if name not in {left_out!r}}}
doctor.run_command(doctor.main)
"""
    done = subprocess.run([sys.executable, *options, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0][9:] for line in lines] == [name for name in doctor.checks(HERE) if name not in left_out]
    assert all(LINE.fullmatch(line.partition(" Remedy: ")[0]) for line in lines)
    assert all((" Remedy: " in line) != line.startswith("pass") for line in lines)
    return lines


def test_an_unknown_compiler_flag_is_a_finding_and_does_not_end_the_command(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    lines = "\n".join(run_without({"processes", "checkpoint"}))
    assert re.search(r"^failure  jax: .*Unknown flag in XLA_FLAGS: --xla_no_such_flag=1\. Remedy: .*XLA_FLAGS", lines, re.MULTILINE)
    for name in doctor.NEEDS_JAX:
        assert f"failure  {name}: not tried" in lines
    assert "pass     video: " in lines


def test_missing_packages_are_findings_and_do_not_end_the_command():
    lines = "\n".join(run_without({"jax", "processes", "checkpoint"}, "-S"))  # processes of their own have all packages
    for name in ("packages", "devices", "collectives", "host memory", "video"):
        assert re.search(rf"^failure  {name}: No module named .* Remedy: .*requirements\.txt", lines, re.MULTILINE)


@pytest.mark.parametrize(
    ("error", "found", "remedy"),
    [
        (UserError("This came.\nDo that."), "This came. Do that.", "message"),
        (ValueError("bad\n value"), "ValueError: bad value", "message"),
        (OSError(errno.ENOSPC, "No space left on device"), f"OSError: [Errno {errno.ENOSPC}] No space left on device", "Free some space"),
    ],
)
def test_an_exception_inside_a_check_is_a_failure_with_its_text_on_one_line(error, found, remedy):
    def check() -> Finding:
        raise error

    finding = attempt(check)
    assert_failure(finding)
    assert finding.found == found
    assert remedy in finding.remedy


@pytest.mark.parametrize(("states", "code"), [(["pass", "warning"], 0), (["warning", "failure", "pass"], 1)])
def test_the_exit_code_counts_failures_alone(states, code, monkeypatch, capsys):
    def say(state: str) -> Finding:
        print("what a library prints")
        return Finding(state, state, "this")

    monkeypatch.setattr(doctor, "checks", lambda options: {state: lambda state=state: say(state) for state in states})
    with pytest.raises(SystemExit) as ended:
        doctor.main(["doctor", "--json"])
    assert ended.value.code == code
    said = json.loads(capsys.readouterr().out)
    assert [finding["state"] for finding in said["findings"]] == states
    assert said["state"] == ("failure" if code else "warning")


@pytest.mark.parametrize("count", ["1", "65"])
def test_a_number_of_processes_that_cannot_be_is_refused(count):
    with pytest.raises(UserError, match="between 2 and 64"):
        doctor.main(["doctor", "--processes", count])


def test_an_old_python_fails():
    assert_failure(doctor.check_python(oldest=(99, 0)), "3.")


@pytest.mark.parametrize(
    ("lines", "state", "found"),
    [
        ("numpy\n", "pass", "1 packages"),
        ("# a comment\n\n--no-index\nnumpy>=1  # why\nno-such-package==1; python_version < '3'\n", "pass", "1 packages"),
        ("numpy==0.0.1\npytest\n", "warning", f"1 of 2 packages are not as pinned: numpy {np.__version__} instead of ==0.0.1"),
        ("numpy==0.0.1\nno-such-package==1\n", "failure", "1 of 2 packages are missing: no-such-package"),
        ("numpy is good\n", "failure", "numpy is good"),
        (None, "warning", "absent"),
    ],
)
def test_packages_are_compared_with_their_pins(tmp_path, lines, state, found):
    path = tmp_path / "requirements.txt"
    if lines is not None:
        path.write_text(lines)
    finding = attempt(doctor.check_packages, path)
    assert finding.state == state
    assert found in finding.found
    assert bool(finding.remedy) == (state != "pass")


def test_a_clock_before_the_package_is_a_warning():
    assert_failure(doctor.check_clock(doctor.FIRST_DAY - datetime.timedelta(days=1)), state="warning")
    assert doctor.check_clock(doctor.FIRST_DAY).state == "pass"


def test_settings_are_told_and_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch(mode=0o777)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "cache"), "XLA_FLAGS": "--a", "HOME": "here"}
    finding = doctor.check_settings(cache)
    assert_failure(finding, "XLA_FLAGS='--a'", "cannot be written", state="warning")
    assert "HOME" not in finding.found
    assert doctor.check_settings({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "new" / "cache")}).state == "pass"
    assert not (tmp_path / "new").exists()
    assert "are not kept" in doctor.check_settings({}).found


def test_a_platform_that_is_not_there_fails():
    finding = doctor.check_jax(dict(os.environ) | {"JAX_PLATFORMS": "no_such_platform"})
    assert_failure(finding, "code 1", "no_such_platform")


@pytest.mark.usefixtures("no_process_left")
def test_a_jax_that_hangs_is_stopped(tmp_path):
    (tmp_path / "jax.py").write_text("import time; time.sleep(600)")
    started = time.monotonic()
    assert_failure(doctor.check_jax(dict(os.environ) | {"PYTHONPATH": str(tmp_path)}, seconds=0.5), "stopped")
    assert time.monotonic() - started < 10


def test_a_device_that_computes_wrongly_fails(monkeypatch):
    assert doctor.check_devices(accelerators=()).state == "pass"
    monkeypatch.setattr(doctor, "_square", lambda matrix: (matrix @ matrix).at[127, 127].add(1))
    assert_failure(doctor.check_devices(), "wrong on")


def test_an_accelerator_that_jax_does_not_use_is_a_warning(tmp_path, monkeypatch):
    assert doctor.check_devices(accelerators=(tmp_path,)).state == "pass"  # the user has said JAX_PLATFORMS=cpu
    monkeypatch.delenv("JAX_PLATFORMS")
    assert_failure(doctor.check_devices(accelerators=(tmp_path,)), str(tmp_path), state="warning")


def test_a_sum_over_devices_that_is_wrong_fails(monkeypatch):
    assert doctor.check_collectives().state == "pass"
    add = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda row, axes: add(row.at[..., -1].add(1), axes))
    assert_failure(doctor.check_collectives(), "wrong")


def run_instead(program: str, monkeypatch) -> None:
    """What checks start in processes of their own is `program`, with the same arguments."""
    monkeypatch.setattr(doctor, "command_for", lambda function, *arguments: [sys.executable, "-c", program, *arguments])


def test_a_sum_over_processes_that_is_wrong_fails(monkeypatch):
    run_instead(
        "import jax; jax.lax.psum = jax.lax.pmax; from hunyuan_jax import doctor; doctor.run_command(doctor.add_over_processes)",
        monkeypatch,
    )
    assert_failure(doctor.check_processes(2), "ended with code 2: a sum over 2 processes is wrong")


@pytest.mark.usefixtures("no_process_left")
def test_processes_that_find_no_one_behind_a_proxy_are_killed(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    finding = doctor.check_processes(2, seconds=3)
    assert_failure(finding, "2 of 2 processes hung for 3 s")
    assert "no_proxy" in finding.remedy


@pytest.mark.usefixtures("no_process_left")
def test_who_waits_for_a_process_that_failed_is_killed_at_once(monkeypatch):
    run_instead("import sys, time; sys.exit('no network') if sys.argv[2] == '2' else time.sleep(600)", monkeypatch)
    started = time.monotonic()
    assert_failure(doctor.check_processes(3, seconds=60), "process 2 of 3 ended with code 1: no network")
    assert time.monotonic() - started < 10


def test_a_machine_that_is_too_small_is_a_warning(tmp_path):
    assert_failure(doctor.check_host_memory(math.inf), "free of", state="warning")
    assert_failure(doctor.check_space(tmp_path, least=math.inf), str(tmp_path), state="warning")
    assert doctor.check_space(tmp_path, least=1).state == "pass"
    assert doctor.check_host_memory(1).state == "pass"
    if sys.platform == "linux":
        assert_failure(doctor.check_shared_memory(least=math.inf), "/dev/shm", state="warning")
        assert_failure(doctor.check_shared_memory(tmp_path / "absent"), "absent", state="warning")
        assert doctor.check_shared_memory(tmp_path, least=1).state == "pass"


@contextlib.contextmanager
def limited(what: int, number: int):
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def test_few_open_files_are_a_warning():
    with limited(resource.RLIMIT_NOFILE, 512):
        assert_failure(doctor.check_open_files(least=513), "512", state="warning")
        assert doctor.check_open_files(least=512).state == "pass"


def test_a_work_directory_that_is_none_fails(tmp_path):
    file, absent = tmp_path / "file", tmp_path / "absent"
    file.touch()
    assert_failure(doctor.check_writing(file), f"{file} is no folder")
    assert_failure(doctor.check_writing(absent), f"{absent} does not exist")
    assert_failure(attempt(doctor.check_checkpoint, file), "NotADirectoryError", str(file))
    assert_failure(attempt(doctor.check_checkpoint, absent), "FileNotFoundError", str(absent))
    assert_failure(attempt(doctor.check_space, absent), "FileNotFoundError", str(absent))
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_takes_no_more_fails(tmp_path):
    with limited(resource.RLIMIT_FSIZE, 2**20):
        assert_failure(attempt(doctor.check_writing, tmp_path), "File too large")
    assert list(tmp_path.iterdir()) == []
    assert doctor.check_writing(tmp_path).state == "pass"


def test_a_disk_that_changes_what_is_written_fails(tmp_path, monkeypatch):
    flush = os.fsync

    def damage(file: int) -> None:
        assert [path.name for path in tmp_path.rglob("written*")] == ["written.tmp"]
        os.pwrite(file, b"\0", 500)
        flush(file)

    monkeypatch.setattr(os, "fsync", damage)
    monkeypatch.setattr(os, "urandom", lambda size: b"\1" * size)
    assert_failure(doctor.check_writing(tmp_path, size=1000), "1000 bytes came back")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_rename_fails(tmp_path, monkeypatch):
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSYS, "rename")

    monkeypatch.setattr(os, "replace", refuse)
    assert_failure(attempt(doctor.check_writing, tmp_path), "rename")
    assert list(tmp_path.iterdir()) == []


def test_processes_that_are_started_leave_the_accelerator_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    run_instead("import os, sys; sys.exit(os.environ['JAX_PLATFORMS'] != 'cpu')", monkeypatch)
    assert doctor.check_processes(2).state == "pass"
    assert doctor.check_checkpoint(tmp_path).state == "pass"


def test_a_checkpoint_on_a_full_disk_fails_in_one_line(tmp_path, capfd):
    with limited(resource.RLIMIT_FSIZE, 2**18):
        assert_failure(doctor.check_checkpoint(tmp_path), str(tmp_path), "File too large")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_the_reason_is_found_before_what_other_threads_say_after_it(tmp_path, monkeypatch):
    run_instead("import sys; print('log'); print('error: the disk is full'); print('RuntimeError: closed'); sys.exit(2)", monkeypatch)
    assert_failure(doctor.check_checkpoint(tmp_path), ": the disk is full")


@pytest.mark.usefixtures("no_process_left")
def test_a_checkpoint_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    run_instead("import time; time.sleep(600)", monkeypatch)
    assert_failure(doctor.check_checkpoint(tmp_path, seconds=0.2), "not saved and restored")


def test_a_checkpoint_that_is_damaged_on_disk_fails(tmp_path, monkeypatch):
    wait = ocp.StandardCheckpointer.wait_until_finished

    def damage(checkpointer: ocp.StandardCheckpointer) -> None:
        wait(checkpointer)
        for path in tmp_path.rglob("d/*"):
            path.write_bytes(bytes(path.stat().st_size))

    doctor.save_and_restore(["", str(tmp_path / "whole")])
    monkeypatch.setattr(ocp.StandardCheckpointer, "wait_until_finished", damage)
    with pytest.raises(UserError, match="DATA_LOSS"):
        doctor.save_and_restore(["", str(tmp_path / "damaged")])


def test_a_checkpoint_that_loses_the_sign_of_zero_fails(tmp_path, monkeypatch):
    restore = ocp.StandardCheckpointer.restore

    def unsigned(*arguments, **options):
        return {name: leaf + 0 for name, leaf in restore(*arguments, **options).items()}  # -0.0 + 0 is 0.0

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", unsigned)
    with pytest.raises(UserError, match="odd, half came back changed"):
        doctor.save_and_restore(["", str(tmp_path / "tree")])


def test_pictures_that_do_not_survive_fail():
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), np.uint8)
    assert_failure(doctor.check_video(noise), "dB")


def test_frames_that_are_lost_fail(monkeypatch):
    whole = video_io.read_video
    monkeypatch.setattr(video_io, "read_video", lambda path: dataclasses.replace(whole(path), frames=whole(path).frames[:-1]))
    assert_failure(doctor.check_video(), "[9, 48, 64, 3] at 12.0 frames/s was written, [8, 48, 64, 3]")
    monkeypatch.setattr(video_io, "read_video", lambda path: dataclasses.replace(whole(path), fps=24.0))
    assert_failure(doctor.check_video(), "at 24.0")


@pytest.mark.parametrize(
    ("record", "kind", "found"), [(real_clip(), "Clip", "3 frames of 16 x 24"), (LATENT, "Latent", "finite latents [3, 8, 6, 4]")]
)
def test_a_dataset_of_either_kind_passes(record, kind, found, tmp_path):
    write_dataset(tmp_path / "data", record)
    finding = doctor.check_data(tmp_path / "data")
    assert finding.state == "pass"
    assert f"1 records of kind {kind}" in finding.found
    assert found in finding.found


DAMAGED_RECORDS = {
    "video": (dataclasses.replace(real_clip(), video=b"no video"), "no video file"),
    "size": (dataclasses.replace(real_clip(), num_frames=4), "it is 4 frames of 16 x 24, but it decodes to 3 frames"),
    "mean": (dataclasses.replace(LATENT, mean=LATENT.mean * np.float32("nan")), "not finite"),
    "logvar": (dataclasses.replace(LATENT, logvar=LATENT.logvar[1:]), "[2, 8, 6, 4]"),
}


@pytest.mark.parametrize("name", DAMAGED_RECORDS)
def test_a_first_record_that_does_not_decode_fails(name, tmp_path):
    record, found = DAMAGED_RECORDS[name]
    write_dataset(tmp_path / "data", record)
    assert_failure(attempt(doctor.check_data, tmp_path / "data"), found)


def damage_shard(folder: Path) -> None:
    path = folder / "records.array_record"
    path.write_bytes(bytes(len(path.read_bytes())))


DAMAGED_FOLDERS = {
    "index": (lambda folder: (folder / "dataset.json").unlink(), "dataset.json is missing"),
    "json": (lambda folder: (folder / "dataset.json").write_text("[]"), ""),
    "kind": (lambda folder: (folder / "dataset.json").write_text('{"format": 1, "kind": "Other"}'), "'Other'"),
    "shard": (damage_shard, "damaged"),
    "no shard": (lambda folder: (folder / "records.array_record").unlink(), "is missing"),
}


@pytest.mark.parametrize("name", DAMAGED_FOLDERS)
def test_a_dataset_that_is_damaged_fails(name, tmp_path):
    damage, found = DAMAGED_FOLDERS[name]
    write_dataset(tmp_path / "data", real_clip())
    damage(tmp_path / "data")
    assert_failure(attempt(doctor.check_data, tmp_path / "data"), found)
