"""Steps whose loss or gradient is not finite: they change nothing (`train_step.py`), and too many in a row lead back to a checkpoint.

Steps skipped for a spike (`spikes.py`) are none of these, since the parameters that made them are sound and the next step is taken from
them; in a row of bad steps they are passed over.

    WORKDIR/bad_steps.json    each time the run went back: to which step, and of the bad steps: loss, gradient norm, bucket, samples

What steps return is looked at a few steps later, so that the devices never wait. When that is does not matter: all that follows
depends on the number of the step alone, and so a run that was stopped meanwhile takes the same course.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from hunyuan_jax.data.dataset import write_json

LOOK_AFTER = 4  # steps
FILE = "bad_steps.json"


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step that changed nothing; `step` counts from 1, as in the metrics."""

    step: int
    loss: float
    grad_norm: float


class BadSteps:
    """Counts bad steps in a row. `limit` of them are too many; 0 means never. `skipped` is how many there were, spikes not counted."""

    def __init__(self, *, limit: int, skipped: int, spikes: int = 0, in_a_row: tuple[BadStep, ...] = ()) -> None:
        self._limit, self._skipped, self._spikes = limit, skipped, spikes
        self._unseen: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self.in_a_row = list(in_a_row)

    @property
    def too_many(self) -> bool:
        return 0 < self._limit <= len(self.in_a_row)

    def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Takes what a step returned, and looks at what one LOOK_AFTER steps before did."""
        self._unseen.append((step, {name: values[name] for name in ("skipped", "spikes", "loss", "grad_norm") if name in values}))
        self._look(leave=LOOK_AFTER)

    def look_at_all(self) -> None:
        """Waits for the devices and looks at every step so far."""
        self._look(leave=0)

    def _look(self, *, leave: int) -> None:
        while len(self._unseen) > leave and not self.too_many:
            step, on_device = self._unseen.popleft()
            values = {name: float(value) for name, value in jax.device_get(on_device).items()}
            spikes = int(values.get("spikes", 0))
            bad = int(values["skipped"]) - spikes
            if bad > self._skipped:
                self.in_a_row.append(BadStep(step, values["loss"], values["grad_norm"]))
            elif spikes == self._spikes:
                self.in_a_row.clear()
            self._skipped, self._spikes = bad, spikes


def write(workdir: Path, steps: list[BadStep], *, back_to: int, time: int, samples: Callable[[int], Mapping[str, Any]]) -> None:
    """Writes that the run goes back for the `time`-th time (from 0), or would have to. `samples` says what a step read."""
    path = workdir / FILE
    before = json.loads(path.read_text())[:time] if path.exists() else []
    rows = [{**dataclasses.asdict(step), **samples(step.step)} for step in steps]
    plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
    write_json(path, [*before, {"back_to": back_to, "steps": plain}])


def _plain(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
