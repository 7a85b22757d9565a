"""Laws of the ledger: each second of a run counts once, and what was lost or waited for is not productive."""

import contextlib
import json
import random

import pytest

from hunyuan_jax.goodput import FEWEST, PHASES, STALL, Ledger


class Clock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def seconds_of(ledger: Ledger) -> dict[str, float]:
    return {phase: seconds for phase, seconds in ledger.to_json()["seconds"].items() if seconds}


def test_every_second_counts_once_however_phases_lie_within_each_other():
    clock, draw = Clock(), random.Random(0)
    ledger = Ledger(clock)

    def spend(depth: int) -> None:
        for _ in range(draw.randint(1, 3)):
            clock.now += draw.uniform(0, 5)
            with ledger.spending(draw.choice(PHASES), hidden=lambda: draw.random() < 0.3):
                clock.now += draw.uniform(0, 5)
                if depth < 4:
                    spend(depth + 1)

    with contextlib.suppress(KeyError), ledger.spending("productive"):
        spend(0)
        clock.now += 1
        raise KeyError
    ledger.close_interval(steps=7, skipped=3)
    ledger.go_back(None)
    clock.now += 1
    said = ledger.scalars()
    assert sum(said[f"time/{phase}_seconds"] for phase in PHASES) == pytest.approx(clock.now - 1000.0)
    assert said["time/goodput"] == pytest.approx(ledger.seconds["productive"] / (clock.now - 1000.0))


def test_waiting_for_data_behind_devices_at_work_is_productive():
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.spending("productive"):
        for at_work in (True, False):
            with ledger.spending("data", hidden=lambda at_work=at_work: at_work):
                clock.now += 3 if at_work else 5
    assert seconds_of(ledger) == {"productive": 3.0, "data": 5.0}


def test_steps_that_are_taken_again_are_lost():
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.spending("productive"):
        clock.now += 10
        saved = json.loads(json.dumps(ledger.to_json()))
        clock.now += 4
    ledger.go_back(saved)
    assert seconds_of(ledger) == {"productive": 10.0, "lost": 4.0}
    ledger.go_back(None)
    assert seconds_of(ledger) == {"lost": 14.0}


@pytest.mark.parametrize(("last_sign", "lost", "away"), [(1013.0, 3.0, 47.0), (0.0, 0.0, 50.0), (1009.0, 0.0, 50.0), (2000.0, 50.0, 0.0)])
def test_a_resumed_run_goes_on_counting_and_knows_what_a_kill_cost(last_sign, lost, away):
    clock = Clock()
    first = Ledger(clock)
    with first.spending("productive"):
        clock.now = 1010.0
    saved = first.to_json()
    clock.now = 1060.0  # the next process
    second = Ledger(clock)
    clock.now += 2
    second.resume(saved, last_sign=last_sign)
    with second.spending("productive"):
        clock.now += 8
        second.close_interval(steps=1, skipped=0)
    expected = {"start": 2.0, "productive": 18.0, "lost": lost, "away": away}
    assert seconds_of(second) == {phase: seconds for phase, seconds in expected.items() if seconds}
    assert sum(second.seconds.values()) == clock.now - 1000.0


def test_an_interval_far_longer_than_the_usual_was_stalled_and_skipped_steps_are_no_progress():
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.spending("productive"):
        for _ in range(FEWEST):
            clock.now += 20
            ledger.close_interval(steps=10, skipped=0)
        clock.now += 100
        ledger.close_interval(steps=10, skipped=0)
        clock.now += 20
        ledger.close_interval(steps=10, skipped=3)
    kept = STALL * 20
    assert seconds_of(ledger) == pytest.approx({"productive": 20 * FEWEST + kept + 14, "stalled": 100 - kept, "skipped": 6.0})
