"""How a run is asked to end, and how one that hangs ends by itself.

    SIGTERM            the step at hand is finished and saved, exit code 0 or what `--stopped_code` says; where that takes longer than
                       the grace time, 143 at once
    SIGINT (Ctrl-C)    the step at hand is finished and saved, exit code 130; a second one: 130 at once
    nothing moves      after `stall_seconds`, or `watchdog_seconds` where there may be something to compile, the stacks of all threads
                       go to stderr and to WORKDIR/hang.txt, exit code 3

To end at once leaves what is on disk as it is: a checkpoint counts only when it is whole. Signals are heard by a thread, so they are
answered even while the main thread compiles; where it has nothing new to save, which is so until the first step is done, the process
ends at once. Of several processes all stop after the same step, whichever of them was told.
"""

import collections
import dataclasses
import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

HUNG = 3  # exit code of a run that its watchdog ended
AGREE_AFTER = 2  # steps from a process's wish to stop until all know of it; none waits for the devices meanwhile
POLL_SECONDS = 0.2
USUAL = 2  # times that something is done before the watchdog knows how long it takes; the first may compile
TIMES = 10  # the longest so far, after which it is taken to hang


class Stop:
    """Hears SIGTERM and SIGINT, as a context manager, and keeps the grace time; outside the main thread it hears nothing.

    The loop says which step it has `done`, and `saved` tells the newest step that is safe on disk. A `grace_seconds` of 0 is no limit;
    `code` is the exit code after SIGTERM.
    """

    def __init__(self, *, grace_seconds: float, code: int = 0) -> None:
        self._grace, self.code = grace_seconds, code
        self._signal = 0
        self._heeded = False
        self._before: dict[int, Any] = {}
        self.done = 0
        self.saved: Callable[[], int] = lambda: 0

    @property
    def wanted(self) -> bool:
        """Whether this process was told to stop."""
        return self._signal != 0

    @property
    def interrupted(self) -> bool:
        """Whether it was told by Ctrl-C."""
        return self._signal == signal.SIGINT

    @property
    def cuts_short(self) -> bool:
        """Whether the wish is reason enough to leave what is under way: not where other processes would go on with it."""
        return self.wanted and jax.process_count() == 1

    def heed(self) -> None:
        """The loop's word that it has seen the wish and is about to save and end."""
        self._heeded = True

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._heard, self._told = os.pipe()
            os.set_blocking(self._told, False)
            # What wakes the thread is written when the signal comes; a Python handler would wait for the main thread.
            self._wakeup_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._told)
            self._thread.join()
            os.close(self._heard)

    def _listen(self) -> None:
        deadline, interrupts = None, 0
        while True:
            ready, _, _ = select.select([self._heard], [], [], POLL_SECONDS if self._signal else None)
            if ready:
                numbers = os.read(self._heard, 64)
                if not numbers:  # the context has ended
                    return
                for number in numbers:
                    interrupts += number == signal.SIGINT
                    if not self._signal and number in (signal.SIGTERM, signal.SIGINT):
                        self._signal = number
                        deadline = time.monotonic() + self._grace if self._grace and number == signal.SIGTERM else None
                        self._say()
            if interrupts > 1:
                self._end(130, "Stopped at once")
            if self._signal and not self._heeded and self._nothing_new():
                self._end(self.code if self._signal == signal.SIGTERM else 130, "Stopped")
            if deadline is not None and time.monotonic() > deadline:
                self._end(143, f"{self._grace:.0f} s were not enough to save; train.grace_seconds sets that time. Stopped at once")

    def _nothing_new(self) -> bool:
        # One process alone must not leave others in the middle of a step that all could still save.
        return self.done <= self.saved() and (self.done == 0 or jax.process_count() == 1)

    def _say(self) -> None:
        name = signal.Signals(self._signal).name
        again = "; Ctrl-C again stops at once" if self.interrupted else f"; it has {self._grace:.0f} s" if self._grace else ""
        print(f"\n{name}: the run finishes its step, saves and stops{again}.", file=sys.stderr, flush=True)

    def _end(self, code: int, why: str) -> None:
        saved = self.saved()
        where = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint of this run yet"
        print(f"{why}: {where}; the same command continues.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


class Agreement:
    """After which step to stop: at once where there is one process; where there are several, after the same one in all.

    Each step takes along whether any process wishes to stop; its answer is looked at AGREE_AFTER steps later.
    """

    def __init__(self, stop: Stop, mesh: jax.sharding.Mesh) -> None:
        self._stop, self._alone = stop, jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._answers: collections.deque[jax.Array] = collections.deque()

    def jit(self, step: Callable[..., Any], *, state: Any, options: Mapping[str, str]) -> Callable[..., Any]:
        """The step, compiled, with its state donated and left where it lies; among several processes it carries their wishes along.

        `state` has its arrays' shardings: a compiler that chose others for the result would have to compile the next step again.
        """
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        if self._alone:
            return jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options={**options})

        def with_wishes(state: Any, batch: Any, wishes: jax.Array) -> Any:
            return (*step(state, batch), jnp.max(wishes))

        compiled = jax.jit(with_wishes, donate_argnums=0, out_shardings=(places, None, None), compiler_options={**options})

        def run(state: Any, batch: Any) -> Any:
            state, values, answer = compiled(state, batch, self._wishes())
            self._answers.append(answer)
            return state, values

        return run

    def reached(self) -> bool:
        """Whether all are to stop after the step that was just started."""
        if self._alone:
            return self._stop.wanted
        return len(self._answers) > AGREE_AFTER and bool(self._answers.popleft() > 0)

    def _wishes(self) -> jax.Array:
        """One number for each device: 1 for those of processes that were told to stop."""
        here, count = float(self._stop.wanted), self._sharding.num_devices

        def piece(index: Any) -> np.ndarray:
            return np.full(len(range(count)[index[0]]), here, np.float32)

        return jax.make_array_from_callback((count,), self._sharding, piece)


@dataclasses.dataclass
class _Begun:
    """Something under way: what, of which kind, since when, and how the watchdog learns that it is done if the loop does not say so."""

    what: str
    kind: Hashable
    done: Callable[[], bool] = lambda: False
    since: float = dataclasses.field(default_factory=time.monotonic)


class Watchdog:
    """Ends a process in which nothing moves, as a context manager: the loop begins nothing new, and the devices finish no step.

    What has been done USUAL times may take TIMES times the longest so far, but for the first, and `stall_seconds` at least; all else,
    which may have to be compiled, `seconds`. 0 is no limit. Time in which this process itself stood still does not count.
    """

    def __init__(self, workdir: Path, *, seconds: float, stall_seconds: float) -> None:
        self._path, self._seconds, self._stall_seconds = workdir / "hang.txt", seconds, stall_seconds
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._doing: _Begun | None = None
        self._in_flight: collections.deque[_Begun] = collections.deque()
        self._between: set[Hashable] = set()  # the kinds of what was done since the last step was started
        self._times: collections.Counter[Hashable] = collections.Counter()
        self._longest: dict[Hashable, float] = {}
        self._moved, self._alone = False, jax.process_count() == 1

    def doing(self, what: str, kind: Hashable = None) -> None:
        """The loop is done with what it did last and begins `what`; the kind None is of what takes another time each time."""
        with self._lock:
            if self._doing is not None:
                self._note(self._doing)
            self._doing, self._moved = _Begun(what, kind), True
            self._between.add(kind)

    def started(self, what: str, kind: Hashable, done: Callable[[], bool]) -> None:
        """The devices were given a step, and `done` says whether they have done it.

        Among several processes, what the loop did before it belongs to its kind: the step may wait for one that takes longer for that.
        """
        with self._lock:
            if not self._alone:
                kind = None if None in self._between else (kind, frozenset(self._between))
            self._in_flight.append(_Begun(what, kind, done))
            self._between.clear()

    def __enter__(self) -> "Watchdog":
        limits = [seconds for seconds in (self._seconds, self._stall_seconds) if seconds]
        if limits:
            self._thread = threading.Thread(target=self._watch, args=(min(1.0, min(limits) / 4),), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None) -> None:
        self._ended.set()

    def _watch(self, poll: float) -> None:
        silent, before = 0.0, time.monotonic()
        while not self._ended.wait(poll):
            now = time.monotonic()
            silent, before = silent + min(now - before, 2 * poll), now
            with self._lock:
                while self._in_flight and self._in_flight[0].done():
                    self._note(self._in_flight.popleft())
                    self._moved = True
                    if self._in_flight:
                        self._in_flight[0].since = max(now, self._in_flight[0].since)
                if self._moved:
                    silent, self._moved = 0.0, False
                under_way = [thing for thing in (self._doing, *list(self._in_flight)[:1]) if thing]
                limit, why = max((self._limit(thing.kind) for thing in under_way), default=(math.inf, ""))
            if silent > limit:
                self._end(f"Nothing has moved for {limit:.0f} s ({why}) during {', the devices at '.join(it.what for it in under_way)}.")

    def _note(self, thing: _Begun) -> None:
        """Remembers how long something took that is done; not the first of a kind, which may have been compiled."""
        self._times[thing.kind] += 1
        if self._times[thing.kind] > 1:
            self._longest[thing.kind] = max(self._longest.get(thing.kind, 0.0), time.monotonic() - thing.since)

    def _limit(self, kind: Hashable) -> tuple[float, str]:
        if kind is None or self._times[kind] < USUAL or not self._stall_seconds:
            return self._seconds or math.inf, "train.watchdog_seconds"
        if (usual := TIMES * self._longest[kind]) > self._stall_seconds:
            return usual, f"{TIMES} times the longest before"
        return self._stall_seconds, "train.stall_seconds"

    def _end(self, why: str) -> None:
        said = f"{why} The stacks of all threads:\n"
        for open_file in (lambda: os.fdopen(os.dup(2), "w"), lambda: self._path.open("w")):
            try:
                with open_file() as file:
                    file.write(said)
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError as error:
                print(f"{self._path} cannot be written: {error}", file=sys.stderr)
        print(f"\nerror: {why} See {self._path}; the same command continues.", file=sys.stderr, flush=True)
        os._exit(HUNG)
