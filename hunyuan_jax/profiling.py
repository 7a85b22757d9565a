"""Profiles of steps while a run goes on, for xprof or TensorBoard: WORKDIR/profile.

    train.profile_steps = (100, 104)    these steps, first and last
    kill -USR1 PID                      the next `train.profile_signal_steps` steps of that process

Each process writes its own. A profile begins and ends when the devices have done all they were given, so that its steps are whole; it
changes nothing that is computed. One that cannot be written is a warning, and the run goes on.
"""

import contextlib
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from absl import logging


class Profiler:
    """Profiles the steps `first` to `last` (from 1; 0: none), and on a signal the next `signal_steps`. A context manager.

    Outside the main thread it hears no signals.
    """

    def __init__(self, workdir: Path, *, steps: tuple[int, int], signal_steps: int) -> None:
        self._folder, self._steps, self._signal_steps = workdir / "profile", steps, signal_steps
        self._asked, self._last = False, 0  # the step that ends the profile under way
        self._before: Any = None

    def __enter__(self) -> "Profiler":
        self._hears = threading.current_thread() is threading.main_thread()
        if self._hears:
            self._before = signal.signal(signal.SIGUSR1, self._hear)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None) -> None:
        self.end()
        if self._hears:
            signal.signal(signal.SIGUSR1, self._before)

    def begins(self, step: int) -> bool:
        """Whether a profile is to begin with this step."""
        return not self._last and (self._asked or self._steps[0] <= step <= self._steps[1])

    def ends(self, step: int) -> bool:
        """Whether the profile under way has all its steps after this one."""
        return 0 < self._last <= step

    def begin(self, step: int, state: Any) -> None:
        """Begins a profile with `step`, when `state` is computed."""
        self._last = step + self._signal_steps - 1 if self._asked else self._steps[1]
        self._asked = False
        folder = self._folder / f"step_{step:08d}"
        if jax.process_count() > 1:  # several of one host would take one name
            folder /= f"process_{jax.process_index():04d}"
        jax.block_until_ready(state)
        try:
            jax.profiler.start_trace(folder)
            logging.info("Steps %d to %d are profiled: %s", step, self._last, folder)
        except (OSError, RuntimeError) as error:
            self._fail(error)

    def end(self, state: Any = None) -> None:
        """Writes the profile under way, if there is one, when `state` is computed."""
        if not self._last:
            return
        jax.block_until_ready(state)
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._fail(error)
        self._last = 0

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Marks a step in the profile."""
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _hear(self, *_: Any) -> None:
        self._asked = True

    def _fail(self, error: Exception) -> None:
        logging.warning("%s cannot be written: %s. The run goes on without it.", self._folder, error)
        self._last = 0
        self._steps = (0, 0)  # not at every step anew
