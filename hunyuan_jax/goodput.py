"""Where the wall time of a run goes, from its beginning on, over all its processes.

    start        until the first step, restoring apart: data, task, first state
    restoring    reading checkpoints and verifying them
    compiling    the first step of each bucket in each process
    productive   steps that the model keeps
    data         waiting for a batch while the devices have nothing to do
    saving       what checkpoints hold steps up for
    measuring    measures of held-out clips, and previews
    profiling    what profiles hold steps up for
    skipped      steps that changed nothing
    lost         steps that were taken and are taken again, after a roll back or a kill
    stalled      what an interval between two lines of the log took beyond `STALL` times the usual
    away         no process, as far as the log can tell

Goodput is the productive share of all of it. Each second counts once. The host's clock is read and devices are never waited for: while
steps are in flight their time is that of the host, which is at most a few steps ahead. What a run did before its first checkpoint is
not known after a kill. Each checkpoint has the sums of process 0, which are the ones written.
"""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PHASES = (
    "start", "restoring", "compiling", "productive", "data", "saving", "measuring", "profiling", "skipped", "lost", "stalled", "away",
)  # fmt: skip
STALL = 1.5  # of the median interval
INTERVALS = 20  # that the median is of
FEWEST = 5  # before which nothing is usual


class Ledger:
    """Seconds by phase. A phase lasts until another begins within it; `clock` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began = self._since = clock()
        self._phases = ["start"]
        self._interval_began = 0.0  # of the productive seconds
        self._intervals: collections.deque[float] = collections.deque(maxlen=INTERVALS)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def spending(self, phase: str, *, hidden: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """What is done in this context belongs to `phase`; if it is `hidden` when it ends, behind devices at work, to the phase around."""
        self._settle()
        before = self.seconds[phase]
        self._phases.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()
            if hidden():
                self._move(self.seconds[phase] - before, phase, self._phases[-1])

    def close_interval(self, *, steps: int, skipped: int) -> None:
        """Of the productive seconds since the last call, in which so many `steps` were taken: what was stalled, and what was skipped."""
        self._settle()
        took = self.seconds["productive"] - self._interval_began
        usual = statistics.median(self._intervals) if len(self._intervals) >= FEWEST else float("inf")
        stalled = max(0.0, took - STALL * usual * steps)
        self._intervals.append((took - stalled) / steps)
        self._move(stalled, "productive", "stalled")
        self._move((took - stalled) * skipped / steps, "productive", "skipped")
        self._interval_began = self.seconds["productive"]

    def go_back(self, said: Mapping[str, Any] | None) -> None:
        """The run goes on from where it was when `to_json` gave `said` (None: the beginning): productive steps since then are lost."""
        self._settle()
        kept = said["seconds"]["productive"] if said else 0.0
        self._move(max(0.0, self.seconds["productive"] - kept), "productive", "lost")
        self._interval_began = self.seconds["productive"]

    def resume(self, said: Mapping[str, Any], *, last_sign: float) -> None:
        """Goes on counting where an earlier process was when it said this; `last_sign` is when it, or a later one, last wrote something."""
        gap = max(0.0, self._began - said["at"])
        lost = min(gap, max(0.0, last_sign - said["at"]))
        for phase, seconds in said["seconds"].items():
            self.seconds[phase] += seconds
        self.seconds["lost"] += lost
        self.seconds["away"] += gap - lost
        self._interval_began = self.seconds["productive"]

    def to_json(self) -> dict[str, Any]:
        self._settle()
        return {"at": self._since, "seconds": dict(self.seconds)}

    def scalars(self) -> dict[str, float]:
        """For the log: `time/goodput`, and `time/PHASE_seconds`."""
        self._settle()
        share = self.seconds["productive"] / max(sum(self.seconds.values()), 1e-9)
        return {"time/goodput": share} | {f"time/{phase}_seconds": seconds for phase, seconds in self.seconds.items()}

    def _settle(self) -> None:
        now = self._clock()
        self.seconds[self._phases[-1]] += max(0.0, now - self._since)  # a clock may be set back
        self._since = now

    def _move(self, seconds: float, source: str, target: str) -> None:
        self.seconds[source] -= seconds
        self.seconds[target] += seconds
