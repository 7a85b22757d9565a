"""Laws of the quickstart: what is done is not done again, a kill loses one step's work at most, signals and codes go through."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import quickstart

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]

# A step appends its word to a log, then waits until a file lets it go on or fails as told.
FAKE_STEP = """
import os, pathlib, signal, sys, time
run, word, *rest = sys.argv[1:]
run = pathlib.Path(run)
with (run / "log").open("a") as log:
    log.write(word + "\\n")
if "memory" in rest:
    held = b"x" * (300 * 2**20)
if "environment" in rest:
    (run / "flags").write_text(os.environ["XLA_FLAGS"])
while "wait" in rest and not (run / "go").exists():
    time.sleep(0.05)
if "stop" in rest and not (run / "go").exists():
    sys.exit(143)
if "fail" in rest and not (run / "go").exists():
    sys.exit(7)
(run / word).write_text(word)
"""

DRIVER = """
import json, signal, sys
from launch import quickstart
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has switched off for what it runs in the background
quickstart.SAMPLE_SECONDS = 0.1
steps = [quickstart.Step(**step) for step in json.loads(sys.argv[2])]
quickstart.quickstart_steps = lambda from_scratch, long: tuple(steps)
sys.exit(quickstart.main([sys.argv[1], *sys.argv[3:]]))
"""


@pytest.fixture
def modules(tmp_path):
    """A folder with the module `fake_step`, beside the run directory."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_step.py").write_text(FAKE_STEP)
    return folder


def fake_steps(*specs):
    """Steps from strings such as "a" or "b wait": a word, then how it behaves."""
    words = [spec.split() for spec in specs]
    return [
        {"name": w[0], "says": f"Step {w[0]}", "arguments": ["fake_step", "{run}", *w], "leaves": w[0], "expected_seconds": 1.0}
        for w in words
    ]


def start(modules, *specs, options=(), **variables):
    run = modules.parent / "run"
    arguments = [sys.executable, "-c", DRIVER, str(run), json.dumps(fake_steps(*specs)), *options]
    environment = os.environ | {"PYTHONPATH": f"{modules}{os.pathsep}{ROOT}"} | variables
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=modules)


def finish(process):
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def log_of(modules):
    return (modules.parent / "run" / "log").read_text().split()


def wait_for_log(modules, *words):
    deadline = time.monotonic() + 30
    path = modules.parent / "run" / "log"
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().split() == list(words):
            return
        time.sleep(0.05)
    raise AssertionError(f"The log never read {words}")


def test_a_finished_quickstart_does_nothing_again(modules):
    assert finish(start(modules, "a", "b"))[0] == 0
    code, said = finish(start(modules, "a", "b"))
    assert (code, log_of(modules)) == (0, ["a", "b"])
    assert said.count("done before") == 2


def test_steps_compile_quickly_unless_the_user_says_otherwise(modules, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    flags = modules.parent / "run" / "flags"
    assert finish(start(modules, "a environment"))[0] == 0
    assert flags.read_text() == "--xla_backend_optimization_level=1"
    assert finish(start(modules, "b environment", XLA_FLAGS="--xla_backend_optimization_level=3"))[0] == 0
    assert flags.read_text() == "--xla_backend_optimization_level=3"


def test_a_changed_command_runs_again_with_all_that_follows(modules):
    assert finish(start(modules, "a", "b", "c"))[0] == 0
    assert finish(start(modules, "a", "b otherwise", "c"))[0] == 0
    assert log_of(modules) == ["a", "b", "c", "b", "c"]


def test_what_followed_a_changed_step_runs_again_even_after_a_failure(modules):
    run = modules.parent / "run"
    run.mkdir()
    (run / "go").touch()
    assert finish(start(modules, "a", "b fail", "c"))[0] == 0
    (run / "go").unlink()
    assert finish(start(modules, "a otherwise", "b fail", "c"))[0] == 7
    (run / "go").touch()
    assert finish(start(modules, "a otherwise", "b fail", "c"))[0] == 0
    assert log_of(modules) == ["a", "b", "c", "a", "b", "b", "c"]


def test_a_step_whose_output_was_deleted_runs_again(modules):
    assert finish(start(modules, "a", "b"))[0] == 0
    (modules.parent / "run" / "b").unlink()
    assert finish(start(modules, "a", "b"))[0] == 0
    assert log_of(modules) == ["a", "b", "b"]


def test_a_killed_quickstart_continues_and_leaves_no_process_behind(modules):
    process = start(modules, "a", "b wait", "c")
    wait_for_log(modules, "a", "b")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=20)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    (modules.parent / "run" / "go").touch()
    assert finish(start(modules, "a", "b wait", "c"))[0] == 0
    assert log_of(modules) == ["a", "b", "b", "c"]


def test_processes_of_a_killed_quickstart_are_ended_before_the_next(modules):
    folder = modules.parent / "run"
    mark = os.environ | {quickstart.OWNER: str(folder)}
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=mark)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=mark | {quickstart.OWNER: str(folder) + "2"})
    try:
        time.sleep(0.3)
        quickstart._end_leftovers(folder)
        assert not psutil.pid_exists(ours.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_the_quickstart(modules, number):
    process = start(modules, "a wait")
    wait_for_log(modules, "a")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code, said = finish(process)
    assert code == 128 + number
    assert "interrupted" in said
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert "a" not in json.loads((modules.parent / "run" / ".steps.json").read_text())["done"]


def test_a_step_that_alone_was_told_to_stop_is_not_done(modules):
    """As a training is that gets SIGTERM without the quickstart, with what it leaves in place: it has saved, and said so by its code."""
    run = modules.parent / "run"
    run.mkdir()
    (run / "a").touch()
    code, said = finish(start(modules, "a stop", "b"))
    assert (code, log_of(modules)) == (143, ["a"])
    assert "[1/2] a was interrupted; the same command continues here" in said
    (run / "go").touch()
    assert finish(start(modules, "a stop", "b"))[0] == 0
    assert log_of(modules) == ["a", "a", "b"]
    trainings = [
        step.arguments for step in quickstart.quickstart_steps(from_scratch=True, long=False) if step.leaves.endswith("/checkpoints")
    ]
    assert len(trainings) == 3
    assert all("--stopped_code=143" in arguments for arguments in trainings)


def test_a_failed_step_gives_its_code_and_is_tried_again(modules):
    code, said = finish(start(modules, "a", "b fail", "c"))
    assert (code, log_of(modules)) == (7, ["a", "b"])
    assert "error: [2/3] b ended with code 7" in said
    (modules.parent / "run" / "go").touch()
    assert finish(start(modules, "a", "b fail", "c"))[0] == 0
    assert log_of(modules) == ["a", "b", "b", "c"]


def test_two_quickstarts_do_not_work_in_one_folder(modules):
    first = start(modules, "a wait")
    wait_for_log(modules, "a")
    code, said = finish(start(modules, "a wait"))
    assert code == 2
    assert "Another quickstart is at work" in said
    (modules.parent / "run" / "go").touch()
    assert finish(first)[0] == 0


def test_a_folder_holds_one_variant_only(modules):
    assert finish(start(modules, "a"))[0] == 0
    for option in ("--from-scratch", "--long"):
        code, said = finish(start(modules, "a", options=[option]))
        assert (code, log_of(modules)) == (2, ["a"])
        assert "Choose another folder" in said


def test_time_adds_up_over_attempts_and_memory_is_that_of_the_largest_moment(modules):
    finish(start(modules, "a memory", "b fail"))
    first = {row["step"]: row for row in json.loads((modules.parent / "run" / "timings.json").read_text())}
    (modules.parent / "run" / "go").touch()
    finish(start(modules, "a memory", "b fail"))
    second = {row["step"]: row for row in json.loads((modules.parent / "run" / "timings.json").read_text())}
    summary = json.loads((modules.parent / "run" / "summary.json").read_text())
    assert second["a"] == first["a"]
    assert second["b"]["seconds"] > first["b"]["seconds"] > 0
    assert 0.3 < second["a"]["peak_gib"] < 0.45
    assert second["b"]["peak_gib"] < 0.2
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in second.values()), abs=0.06)
    assert summary["peak_gib"] == second["a"]["peak_gib"]


def test_a_damaged_state_file_is_one_clear_error(modules):
    (modules.parent / "run").mkdir()
    (modules.parent / "run" / ".steps.json").write_text('{"done')
    code, said = finish(start(modules, "a"))
    assert code == 2
    assert "Delete it" in said
    assert "Traceback" not in said


def test_each_step_leaves_what_its_followers_read():
    for from_scratch, long in itertools.product((False, True), repeat=2):
        steps = quickstart.quickstart_steps(from_scratch=from_scratch, long=long)
        made = set()
        for step in steps:
            read = {m for argument in step.arguments for m in re.findall(r"\{run\}/(\w+)", argument)} - {
                step.leaves.split("/")[0].split(".")[0]
            }
            assert read <= made
            made.add(step.leaves.split("/")[0])
        assert all(Path(ROOT, *step.arguments[0].split(".")).parent.is_dir() for step in steps)


def test_closing_words_give_the_figures(tmp_path):
    fractions = {"colour": 0.98, "shape": 0.8, "direction": 0.96}
    summary = {"seconds": 663.2, "peak_gib": 3.21, "vae_psnr_db": 28.64, "accuracy": fractions, "accuracy_unseen": None}
    said = quickstart.closing_words(tmp_path, summary)
    for figure in ("11 min 03 s", "3.21 GiB", "28.64 dB", "98.0%", "80.0%", "96.0%", "report.html", "summary.json"):
        assert figure in said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert subprocess.run([Path(sys.executable).parent / "shellcheck", "-x", script], check=False, cwd=ROOT).returncode == 0


def test_an_old_python_is_one_clear_error(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = os.environ | {"PYTHON": str(old), "VENV": str(tmp_path / "venv")}
    result = subprocess.run(["bash", ROOT / "launch" / "quickstart.sh"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Python 3.11 or later was expected" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_an_environment_is_installed_once_and_again_when_a_pin_changes(tmp_path):
    """With an empty requirements file in a copy of the scripts, so that nothing is downloaded."""
    (tmp_path / "launch").mkdir()
    for name in ("quickstart.sh", "environment.sh"):
        (tmp_path / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "quickstart.py").write_text("import sys; print('ran with', *sys.argv[1:])")
    (tmp_path / "requirements.txt").write_text("")

    def run():
        environment = os.environ | {"PYTHON": sys.executable}
        command = ["bash", tmp_path / "launch" / "quickstart.sh", "some where", "--from-scratch"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd="/").stdout

    first, second = run(), run()
    (tmp_path / "requirements.txt").write_text("# another pin\n")
    third = run()
    assert all("ran with some where --from-scratch" in said for said in (first, second, third))
    assert ["Making" in said for said in (first, second, third)] == [True, False, False]
    assert ["Installing" in said for said in (first, second, third)] == [True, False, True]


def test_every_requirement_is_pinned_once_for_each_python():
    for name in ("requirements.txt", "tests/requirements.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith(("#", "-r "))]
        assert all(re.fullmatch(r'[a-z0-9.-]+==[0-9a-z.]+(; python_version (<|>=) "3\.12")?', line) for line in lines)
        keys = [(line.split("==")[0], line.partition(";")[2]) for line in lines]
        assert len(set(keys)) == len(keys)
