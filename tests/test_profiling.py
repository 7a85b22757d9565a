"""Laws of profiles: they begin and end with the steps that were asked for, and one that cannot be written stops nothing."""

import signal

import pytest

from hunyuan_jax.profiling import Profiler


@pytest.fixture
def profiled(tmp_path, monkeypatch):
    """Takes steps from `start` on, and a signal before each of `signals`; gives the first and the last step of each profile."""
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: None)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: None)

    def take(*, steps=(0, 0), signals=(), start=1, end=30):
        found = []
        with Profiler(tmp_path, steps=steps, signal_steps=3) as profiler:
            for step in range(start, end):
                if step in signals:
                    signal.raise_signal(signal.SIGUSR1)
                if profiler.begins(step):
                    profiler.begin(step, None)
                    found.append([step])
                if profiler.ends(step):
                    profiler.end(None)
                    found[-1].append(step)
        return found

    return take


@pytest.mark.parametrize(
    ("how", "profiles"),
    [
        ({}, []),
        ({"steps": (5, 8)}, [[5, 8]]),
        ({"steps": (5, 8), "start": 7}, [[7, 8]]),
        ({"steps": (5, 8), "start": 9}, []),
        ({"signals": (4, 20)}, [[4, 6], [20, 22]]),
        ({"signals": (4, 5)}, [[4, 6], [7, 9]]),  # one that comes during a profile asks for the next
        ({"steps": (5, 8), "signals": (12,)}, [[5, 8], [12, 14]]),
    ],
)
def test_profiles_have_the_steps_that_were_asked_for(profiled, how, profiles):
    assert profiled(**how) == profiles


def test_a_profile_that_cannot_be_written_is_given_up_and_not_tried_at_every_step(profiled, monkeypatch):
    tried = []

    def fail(folder):
        tried.append(folder.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax.profiler.start_trace", fail)
    profiled(steps=(5, 8))
    assert tried == ["step_00000005"]
