"""The damaged records that a run has met: which, why, and what took their places.

    WORKDIR/quarantine-00003.jsonl    of process 3, one JSON object a line: id, row, reason, step, epoch, host, substitute

A record stands there once, with the first step that needed it. Nothing is decided by these files: a damaged record is read again whenever
the plan asks for it, so samples are the same whether or not the files are there. They are for whoever mends the dataset, and for the
count. A run that resumes after step S continues them as if what was written after S had never been, as it does the metrics.

Of several processes each sees the records of its own devices. Each ends the run when it has met more than the limit by itself, and
process 0, which reads all files on the disk they share, when all have together; it looks when it logs.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from hunyuan_jax.data.dataset import replacing
from hunyuan_jax.errors import UserError

NAMED = 3  # records that the error names
REASON_CHARACTERS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged record as it was met: in which epoch, and the id of the record in its place, None where none was left."""

    id: str
    row: int
    reason: str
    epoch: int
    substitute: str | None


class Quarantine:
    """The list of one process in `workdir`, of which `most` records may be damaged; entries from after step `after` are forgotten."""

    def __init__(self, workdir: Path, *, most: int, after: int) -> None:
        self._workdir, self._most = workdir, most
        process = jax.process_index()
        self._path = workdir / f"quarantine-{process:05d}.jsonl"
        nobodys = [path for path in self._paths() if int(path.stem[-5:]) >= jax.process_count()] if process == 0 else []
        for path in {self._path, *nobodys}:
            _forget_after(path, after)
        self._rows = {entry["row"] for entry in read_entries([self._path])}

    def add(self, step: int, met: Iterable[Damage]) -> None:
        """Writes down what is new of what `step` (from 1) met. Raises `UserError` above the limit."""
        for damage in met:
            if damage.row in self._rows:
                continue
            self._rows.add(damage.row)
            reason = "".join(c if c.isprintable() else " " for c in damage.reason)[:REASON_CHARACTERS]
            entry = dataclasses.asdict(damage) | {"reason": reason, "step": step, "host": socket.gethostname()}
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            logging.warning("Record %s is damaged: %s. %s takes its place; see %s.", damage.id, reason, damage.substitute, self._path)
        if len(self._rows) > self._most:
            self._end(read_entries([self._path]))

    def count(self, step: int) -> int:
        """Records met by all processes up to `step`, on process 0; by this one on others. Raises `UserError` above the limit."""
        if jax.process_index() > 0:
            return len(self._rows)
        entries = [entry for entry in read_entries(self._paths()) if entry["step"] <= step]
        count = len({entry["row"] for entry in entries})
        if count > self._most:
            self._end(entries)
        return count

    def _paths(self) -> list[Path]:
        return sorted(self._workdir.glob("quarantine-" + 5 * "[0-9]" + ".jsonl"))

    def _end(self, entries: Sequence[dict[str, Any]]) -> None:
        first = "; ".join(f"{entry['id']}: {entry['reason'].rstrip('.')}" for entry in entries[:NAMED])
        raise UserError(
            f"{len({entry['row'] for entry in entries})} records are damaged, and data.quarantine_limit allows {self._most}. "
            f"{self._workdir}/quarantine-*.jsonl lists them; the first: {first}. Restore the dataset's shards or write it again, "
            "or raise the limit; the same command continues."
        )


def read_entries(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The entries of quarantine files in order. A line that a kill cut short is left out."""
    entries = []
    for path in paths:
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.keys() >= {"id", "row", "reason", "step"}:
                entries.append(entry)
    return entries


def _forget_after(path: Path, step: int) -> None:
    """Rewrites a file with its entries up to `step`, whole or not at all; one without entries is removed."""
    if kept := [json.dumps(entry) + "\n" for entry in read_entries([path]) if entry["step"] <= step]:
        with replacing(path) as temporary:
            temporary.write_text("".join(kept))
    else:
        path.unlink(missing_ok=True)
