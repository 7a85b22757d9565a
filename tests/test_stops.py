"""Laws of stopping: however a run is stopped it goes on as if it had not been, and one that cannot go on says why and ends."""

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging

from hunyuan_jax import stops
from hunyuan_jax import train as training
from hunyuan_jax.bad_steps import LOOK_AFTER, BadSteps
from hunyuan_jax.data import loader
from hunyuan_jax.data.loader import sample_id
from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.train import LoopConfig, Setup, train
from tests.commands import ROOT
from tests.faults import hang_and_compare, kill_and_compare, table_of
from tests.tiny_trainings import STEPS, Left, Linear, flip_in_records, tiny_config, write_clips

LAST = 12
OFTEN = {"steps": LAST, "log_every": 3, "checkpoint_every": 4, "measure_every": 5, "rollback_after": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clips, a few of which are damaged: the laws hold with them."""
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder / "clips")
    flip_in_records(folder / "clips" / "clips-0.array_record", 0, 2, 4)
    return folder


@pytest.fixture
def run(data, monkeypatch):
    """Trains the linear task in a folder; steps of `poison` (from 1) have no loss."""

    def train_in(workdir: Path, *, poison: tuple[int, ...] = (), **loop) -> None:
        config = tiny_config("linear", data, **{**OFTEN, **loop})
        task = type("Poisoned", (Linear,), {"poison": tuple(i for step in poison for i in ids_of(config, step))})
        monkeypatch.setattr(training, "make_task", task.from_config)
        train(config, workdir)

    monkeypatch.setattr(training, "make_task", Linear.from_config)
    return train_in


def ids_of(config, step: int) -> list[int]:
    """The samples of a step of the plan."""
    setup = Setup.from_config(config)
    read = setup.schedule.step(step - 1)
    return [sample_id(setup.dataset.rows[row]["id"], epoch) for row, epoch in zip(read.rows, read.epochs, strict=True)]


def assert_equal(one: Left, other: Left) -> None:
    assert one.logged == other.logged
    assert one.position == other.position
    assert one.differing_bits(other) == 0


# --- Asked to stop -------------------------------------------------------------------------------------------------------------


def test_trainings_that_are_killed_at_random_moments_end_in_the_uninterrupted_ones_bits(tmp_path):
    seed = time.time_ns() % 1000
    tallies = kill_and_compare(tmp_path, tasks=["linear"], kills=2, seed=seed, say=print)
    assert [said for tally in tallies for said in tally.wrong] == [], f"seed {seed}\n{table_of(tallies)}"
    assert [(tally.kills, tally.runs > 0, tally.bits, tally.values) for tally in tallies] == [(1, True, 0, 0)] * 2


def test_a_run_that_stops_after_every_step_equals_one_that_never_does(run, tmp_path, monkeypatch):
    """With measures and averages over several steps, and with bad steps for which it goes back once."""
    poison = (6, 7)
    run(tmp_path / "whole", poison=poison)
    whole, lives = Left.by(tmp_path / "whole", LAST), 0
    monkeypatch.setattr(stops.Agreement, "reached", lambda self: True)
    while not (tmp_path / "often" / "checkpoints" / str(LAST)).exists():
        run(tmp_path / "often", poison=poison)
        lives += 1
        assert lives < 3 * LAST
    monkeypatch.undo()
    run(tmp_path / "often", poison=poison)  # the last step's measures are owed
    often = Left.by(tmp_path / "often", LAST)
    assert lives >= LAST
    assert often.position.pop("owed")
    assert not whole.position.pop("owed")
    assert often.position.pop("lines") == whole.position.pop("lines") - 1
    assert_equal(whole, often)
    assert [line["step"] for line in whole.logged] == [3, 5, 6, 9, 10, 12, 12]
    assert [line["quarantined"] for line in whole.logged if "loss" in line] == [1, 2, 2, 2]
    assert whole.position["rollbacks"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_in_which_a_signal_comes_is_finished_and_saved(run, tmp_path, monkeypatch, number):
    read = loader.Loader.__next__
    calls = itertools.count(1)

    def interrupted(self):
        if next(calls) == 7:
            signal.raise_signal(number)
            time.sleep(0.5)  # the thread that hears it has its turn
        return read(self)

    monkeypatch.setattr(loader.Loader, "__next__", interrupted)
    with contextlib.nullcontext() if number == signal.SIGTERM else pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 7]


def test_a_cluster_learns_by_the_exit_code_that_a_stopped_run_is_to_be_started_again(run, data, tmp_path, monkeypatch):
    config = tiny_config("linear", data, **OFTEN)
    with monkeypatch.context() as patch:
        patch.setattr(stops.Agreement, "reached", lambda self: self._stop.done == 5)
        with pytest.raises(SystemExit) as ended:
            train(config, tmp_path, stopped_code=143)
    assert ended.value.code == 143
    assert (tmp_path / "checkpoints" / "5").exists()
    train(config, tmp_path, stopped_code=143)  # all done: no code


def test_measures_that_a_stop_left_owing_are_written_once_whatever_comes_next(run, tmp_path, monkeypatch):
    read = loader.ReadStep.__call__

    def fail(self, number):
        if number == 6:
            raise ValueError
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(stops.Agreement, "reached", lambda self: self._stop.done == 5)
        run(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(loader.ReadStep, "__call__", fail)
        with pytest.raises(RuntimeError, match="step 7"):  # has measured, and saves nothing
            run(tmp_path / "stopped")
    run(tmp_path / "stopped")
    run(tmp_path / "whole")
    assert_equal(*(Left.by(tmp_path / name, LAST) for name in ("stopped", "whole")))


PROGRAM = """
import hashlib, sys
from hunyuan_jax.stops import Stop
with Stop(grace_seconds=1.0) as stop:
    stop.done, stop.saved = int(sys.argv[1]), lambda: int(sys.argv[2])
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as deaf to Python's handlers as a compiler
"""


@pytest.mark.parametrize(
    ("done", "saved", "signals", "code", "says"),
    [
        (0, 0, (signal.SIGTERM,), 0, "Stopped: there is no checkpoint of this run yet"),
        (8, 8, (signal.SIGINT,), 130, "Stopped: the newest checkpoint is of step 8"),
        (9, 8, (signal.SIGTERM,), 143, "1 s were not enough to save"),
        (9, 8, (signal.SIGINT, signal.SIGINT), 130, "Stopped at once: the newest checkpoint is of step 8"),
    ],
)
def test_signals_are_answered_while_the_main_thread_is_deaf(done, saved, signals, code, says):
    command = [sys.executable, "-c", PROGRAM, str(done), str(saved)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for number, sent in enumerate(signals):
            if number:  # the first Ctrl-C alone waits for the step
                time.sleep(0.5)
                assert process.poll() is None
            process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert says in said
    assert "the same command continues" in said


def test_a_signal_to_a_thread_that_can_hear_is_a_wish_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stops.Stop(grace_seconds=60) as stop:
        stop.done = 1
        assert not stop.wanted
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (stop.wanted, stop.interrupted, stop.cuts_short) == (True, False, True)
        stop.heed()
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_processes_stop_after_the_same_step_some_steps_after_the_wish():
    """One process in the part of several: the wish travels with the steps, and none waits for its answer."""
    mesh = make_mesh(MeshConfig())
    stop = stops.Stop(grace_seconds=60)
    agreement = stops.Agreement(stop, mesh)
    agreement._alone = False
    state, reached = jax.numpy.zeros(()), []
    step = agreement.jit(lambda state, batch: (state + batch, {"loss": state}), state=state, options={})
    for number in range(8):
        if number == 3:
            stop._signal = signal.SIGTERM
        state, values = step(state, 1.0)
        reached.append(agreement.reached())
    assert reached == [False] * (3 + stops.AGREE_AFTER) + [True] * (5 - stops.AGREE_AFTER)
    assert (float(state), set(values)) == (8.0, {"loss"})


# --- Something does not go on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "stall_seconds", "kind", "why"),
    [(0.5, 0, "step", "0 s (train.watchdog_seconds)"), (0.5, 50, "batch", "0 s (train.watchdog_seconds)"),
     (0.5, 50, None, "0 s (train.watchdog_seconds)"), (50, 0.5, "step", "0 s (train.stall_seconds)")],
)  # fmt: skip
def test_a_run_that_hangs_says_where_and_ends(tmp_path, seconds, stall_seconds, kind, why):
    program = f"""
import time
from pathlib import Path
from hunyuan_jax.stops import Watchdog
def read_forever():
    time.sleep(1000)
with Watchdog(Path({str(tmp_path)!r}), seconds={seconds}, stall_seconds={stall_seconds}) as watchdog:
    for step in range(4):
        watchdog.doing(f"step {{step}}", "step")
    watchdog.doing("the reading of the batch of step 3", {kind!r})
    read_forever()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == stops.HUNG
    for said in (done.stderr, (tmp_path / "hang.txt").read_text()):
        assert f"Nothing has moved for {why} during the reading of the batch of step 3." in said
        assert "in read_forever" in said


@pytest.fixture
def hung(monkeypatch):
    """What watchdogs end for."""
    said = []
    monkeypatch.setattr(stops.Watchdog, "_end", lambda self, why: said.append(why))
    return said


def test_the_watchdog_counts_anew_with_each_thing_and_may_be_off(tmp_path, hung):
    with stops.Watchdog(tmp_path, seconds=1.0, stall_seconds=1.0) as watchdog:
        for number in range(8):
            watchdog.doing(f"step {number}", "step")
            time.sleep(0.2)
    with stops.Watchdog(tmp_path, seconds=0, stall_seconds=0) as watchdog:
        watchdog.doing("nothing")
        time.sleep(0.2)
    assert hung == []


def test_what_was_long_before_may_be_long_again_but_not_ten_times(tmp_path, hung):
    with stops.Watchdog(tmp_path, seconds=60, stall_seconds=0.2) as watchdog:
        for seconds in (0.8, 0.3, 0.5, 0.0):  # the first compiles, the second is the first to count
            watchdog.doing("step", "step")
            time.sleep(seconds)
        assert hung == []
        watchdog.doing("step 5", "step")
        until = time.monotonic() + 20
        while not hung and time.monotonic() < until:
            time.sleep(0.05)
        assert re.fullmatch(r"Nothing has moved for [56] s \(10 times the longest before\) during step 5\.", hung[0])


def test_while_the_devices_finish_steps_the_loop_may_wait_for_them(tmp_path, hung):
    """A line of the log waits for all that is in flight, which may be longer than any single step."""
    with stops.Watchdog(tmp_path, seconds=60, stall_seconds=0.5) as watchdog:
        for number in range(12):
            watchdog.doing(f"line {number}", "line")
        ends = [time.monotonic() + 0.1 * n for n in range(40)] + [float("inf")]
        for number, end in enumerate(ends):
            watchdog.doing(f"the start of step {number}", "step")
            watchdog.started(f"step {number}", "bucket", lambda end=end: time.monotonic() > end)
        watchdog.doing("the line", "line")
        time.sleep(3.8)
        assert hung == []
        until = time.monotonic() + 20
        while not hung and time.monotonic() < until:
            time.sleep(0.05)
        assert hung[0].endswith(" during the line, the devices at step 40.")


def test_a_step_that_may_wait_for_what_another_process_does_is_of_another_kind(tmp_path):
    watchdog = stops.Watchdog(tmp_path, seconds=100, stall_seconds=1)
    watchdog._alone = False
    limits = []
    for kind in ("batch", "preview", "batch", "preview", None, "batch"):
        watchdog.doing("it", kind)
        watchdog.started("step", "bucket", lambda: True)
        limits.append(watchdog._limit(watchdog._in_flight[-1].kind)[0])
        watchdog._note(watchdog._in_flight[-1])
    watchdog.doing("it", "batch")
    watchdog.started("step", "bucket", lambda: True)
    assert limits == [100, 100, 100, 100, 100, 1]


def test_time_in_which_the_process_stood_still_itself_is_no_hang(tmp_path):
    program = f"""
from pathlib import Path
from hunyuan_jax.stops import Watchdog
with Watchdog(Path({str(tmp_path)!r}), seconds=6, stall_seconds=6) as watchdog:
    watchdog.doing("something")
    print("ready", flush=True)
    input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)  # it has begun to count
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert (process.communicate("\n", timeout=30)[1], process.returncode) == ("", 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_hangs_in_a_training_ends_it_soon_and_costs_what_was_done_since_the_checkpoint(tmp_path, processes):
    tallies = hang_and_compare(tmp_path, hangs=4, seed=0, processes=[processes], loop={"stall_seconds": 3.0}, say=print)
    assert [said for tally in tallies for said in tally.wrong] == []
    assert sum(tally.hangs for tally in tallies) == 4
    assert all(tally.longest < 20 for tally in tallies)


def test_the_watchdog_is_told_of_all_that_may_take_long(run, tmp_path, monkeypatch):
    kinds = {}
    monkeypatch.setattr(stops.Watchdog, "doing", lambda self, what, kind=None: kinds.update({what: kind}))
    run(tmp_path, steps=5)
    told = list(kinds)
    step = ["the reading of the batch of step {}", "the start of step {}"]
    assert told[1:5] == [text.format(n) for n in (1, 2) for text in step]
    last = ["the start of step 5", "the line of the log after step 5", "measuring after step 5", "the saving of step 5"]
    assert told[-5:] == [*last, "the saving of the last step"]
    readings = [kinds[step[0].format(n)] for n in (1, 2, 3)]
    assert readings == [None, ("batch", 0), ("batch", 0)]  # the first has nothing that was read ahead


@pytest.mark.parametrize(("error", "kind"), [(ValueError("odd bytes"), RuntimeError), (UserError("It is damaged."), UserError)])
def test_a_batch_that_cannot_be_made_is_an_error_that_names_it_and_what_was_saved_continues(run, tmp_path, monkeypatch, error, kind):
    read = loader.ReadStep.__call__

    def fail(self, number):
        if number == 6:
            raise error
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loader.ReadStep, "__call__", fail)
        says = rf"The batch of step 7 \(bucket 3x16x16, samples clip-\d+, clip-\d+\) could not be made: .*{error}"
        with pytest.raises(kind, match=says):
            run(tmp_path / "broken")
    run(tmp_path / "broken")
    run(tmp_path / "whole")
    assert_equal(*(Left.by(tmp_path / name, LAST) for name in ("broken", "whole")))


# --- Numbers that are not finite -----------------------------------------------------------------------------------------------


def test_bad_steps_in_a_row_lead_back_to_the_checkpoint_before_and_on_with_the_data_after(run, data, tmp_path, monkeypatch):
    seen, read = [], loader.Loader.__next__

    def record(self):
        batch = read(self)
        seen.append([int(i) for i in batch.sample_id])
        return batch

    monkeypatch.setattr(loader.Loader, "__next__", record)
    run(tmp_path, poison=(6, 7))
    config = tiny_config("linear", data, **OFTEN)
    forward = [ids_of(config, step) for step in range(1, 8 + LOOK_AFTER)]
    back = seen.index(ids_of(config, 8), 8)  # the batch of step 8 comes first as a step to be forgotten
    assert seen[:back] == forward[:back]
    assert seen[back:] == [ids_of(config, step) for step in range(8, 8 + LAST - 4)]  # steps 5 to 12, on the data of 8 to 15
    (row,) = json.loads((tmp_path / "bad_steps.json").read_text())
    assert row["back_to"] == 4
    assert [(step["step"], step["bucket"], step["loss"]) for step in row["steps"]] == [(6, "3x16x16", "nan"), (7, "3x16x16", "nan")]
    setup = Setup.from_config(config)
    assert row["steps"][0]["samples"] == [setup.dataset.rows[i]["id"] for i in setup.schedule.step(5).rows]
    left = Left.by(tmp_path, LAST)
    assert (left.position["left_out"], left.position["rollbacks"]) == (3, 1)
    assert [line["skipped"] for line in left.logged if "skipped" in line] == [0.0] * 4


def test_bad_steps_before_the_first_checkpoint_lead_back_to_the_beginning(run, tmp_path):
    run(tmp_path, poison=(2, 3))
    assert json.loads((tmp_path / "bad_steps.json").read_text())[0]["back_to"] == 0
    assert [line["step"] for line in Left.by(tmp_path, LAST).logged] == [3, 5, 6, 9, 10, 12, 12]


def test_single_bad_steps_change_the_count_alone(run, tmp_path):
    run(tmp_path, poison=(2, 4, 6))
    assert not (tmp_path / "bad_steps.json").exists()
    assert Left.by(tmp_path, LAST).logged[-2]["skipped"] == 3.0


def test_a_run_that_has_gone_back_as_often_as_it_may_ends_with_the_list(run, tmp_path):
    with pytest.raises(UserError, match=r"of steps 5 to 6 was not finite .*bad_steps\.json\), and the run has gone back 1 times before"):
        run(tmp_path, poison=(6, 7, 8, 9), rollbacks=1)
    first, second = json.loads((tmp_path / "bad_steps.json").read_text())
    assert [step["step"] for step in first["steps"]] == [6, 7]
    assert [step["step"] for step in second["steps"]] == [5, 6]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}


def test_steps_are_looked_at_later_and_those_after_too_many_are_not():
    bad = BadSteps(limit=2, skipped=7)
    for step, skipped in enumerate((7, 8, 9, 9, 9, 9), start=1):
        bad.add(step, {"skipped": np.float32(skipped), "loss": np.float32("nan"), "grad_norm": np.float32("inf")})
    assert [row.step for row in bad.in_a_row] == [2]
    bad.look_at_all()
    assert [row.step for row in bad.in_a_row] == [2, 3]
    assert bad.too_many


# --- What must not change ------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_seed_or_not_at_all(run, data, tmp_path):
    run(tmp_path, steps=4)
    config = tiny_config("linear", data, **OFTEN)
    config.seed = 1
    with pytest.raises(UserError, match="begun with seed 0, not 1"):
        train(config, tmp_path)


def test_the_best_checkpoint_stays_and_its_metric_must_be_known(run, tmp_path):
    how = {"keep_best": "held_out/psnr/3x16x16_db", "keep_best_most": False, "keep": 1, "measure_every": 4}
    run(tmp_path / "run", **how)  # the lowest figure is the first, since the model learns
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"4", "12"}
    with pytest.raises(UserError, match=r"no held-out metric 'held_out/psnr/3x16x16'. Did you mean 'held_out/psnr/3x16x16_db'"):
        run(tmp_path / "other", **{**how, "keep_best": "held_out/psnr/3x16x16"})
    with pytest.raises(UserError, match="a multiple of measure_every"):
        LoopConfig(steps=1, keep_best="x", measure_every=3, checkpoint_every=4)


def test_a_state_that_is_not_finite_is_not_saved_and_the_run_goes_on(run, tmp_path, monkeypatch, caplog):
    """An update that overflows after a finite gradient: the guard of the step cannot know."""
    take = training.configured_step

    def overflowing(*args, **kwargs):
        step = take(*args, **kwargs)

        def spoiled(state, batch):
            state, values = step(state, batch)
            ema = jax.tree.map(lambda x: jax.numpy.where((state.step >= 4) & (state.step < 8), jax.numpy.inf, x), state.params)
            return state.replace(ema=ema), values

        return spoiled

    monkeypatch.setattr(training, "configured_step", overflowing)
    logging.use_python_logging()
    run(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"8", "12"}
    assert "The state after step 4 is not saved: ema has values that are not finite." in caplog.text
    assert STEPS["linear"] > LAST
