"""The report of a curation: `report.json` with the funnel in counts, `report.html` with the same and pictures of what went where.

Both are made from the tables of a dataset folder, so they can be made again at any time. The page is one file without external
resources; every word that comes from file names, sidecars or decoders is escaped.
"""

import base64
import collections
import dataclasses
import html
import json
from collections.abc import Sequence
from typing import Any

from data_prep.filter import GATES, NEAR_DUPLICATE

Row = dict[str, Any]
_KEPT_SHOWN, _DROPPED_SHOWN, _ERRORS_SHOWN = 24, 6, 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """Everything known about a curated folder: one row each for kept clips, their features, dropped clips, files and errors."""

    manifest: Sequence[Row]
    features: Sequence[Row]
    rejected: Sequence[Row]
    files: Sequence[Row]
    errors: Sequence[Row]


def funnel(tables: Tables) -> dict[str, Any]:
    """Counts, from files to clips. A clip may fail several gates; `dropped_for` counts each, `dropped` the clip once."""
    states = collections.Counter(row["state"] for row in tables.files)
    reasons = collections.Counter(reason for row in tables.rejected for reason in row["failed"])
    duplicates = sum(row["failed"] == [NEAR_DUPLICATE] for row in tables.rejected)
    shots = sum(row["shots"] for row in tables.files)
    order = [*(gate.reason for gate in GATES), NEAR_DUPLICATE]
    return {
        "files": {"found": len(tables.files), "bad": states["bad"], "copies": states["copy"], "read": states["read"]},
        "frames": sum(row["frames"] for row in tables.files),
        "shots": shots,
        "passed_gates": shots - len(tables.rejected) + duplicates,
        "kept": len(tables.manifest),
        "dropped": len(tables.rejected),
        "dropped_for": {reason: reasons[reason] for reason in order if reasons[reason]},
        "captions": dict(sorted(collections.Counter(json.loads(row["caption"])["source"] for row in tables.manifest).items())),
        "errors": dict(sorted(collections.Counter(row["stage"] for row in tables.errors).items())),
        "kept_seconds": round(sum(row["num_frames"] / row["fps"] for row in tables.manifest), 3),
    }


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #3b7dd8; --dim: #777; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.funnel div.row { display: grid; grid-template-columns: 11rem 1fr 4.5rem; gap: .5rem; align-items: center; padding: .15rem 0; }
.bar { background: var(--bar); height: 1rem; border-radius: 3px; min-width: 1px; }
.drop .bar { background: #c8553d; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .75rem; }
figure { margin: 0; } figure img { width: 100%; aspect-ratio: 4/3; object-fit: contain; background: #8882; border-radius: 4px; }
figcaption { font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; color: var(--dim); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; } .wide { overflow-x: auto; }
td, th { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); }
td, th { vertical-align: top; overflow-wrap: anywhere; }
.dim { color: var(--dim); }
@media (max-width: 30rem) { .funnel div.row { grid-template-columns: 7.5rem 1fr 3.5rem; font-size: .85rem; } }
"""


def page(tables: Tables, *, seconds: dict[str, float]) -> str:
    """The page, as HTML. `seconds` says how long the parts of the last run took."""
    counts = funnel(tables)
    parts = [
        f"<h1>Curation: {counts['kept']} clips from {counts['files']['found']} files</h1>",
        f'<p class="dim">{counts["kept_seconds"] / 60:.1f} minutes of video kept. '
        f"Last run: {html.escape(', '.join(f'{name} {value:.1f} s' for name, value in seconds.items()))}.</p>",
        _funnel_section(counts),
        "<h2>Kept</h2>",
        _kept_section(tables),
        *(_dropped_section(tables, reason, count) for reason, count in counts["dropped_for"].items()),
        _errors_section(tables),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Curation</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _bar(name: str, count: int, most: int, kind: str = "") -> str:
    width = 100 * count / max(most, 1)
    bar = f'<span class="bar" style="width:{width:.2f}%"></span>'
    return f'<div class="row {kind}"><span>{html.escape(name)}</span>{bar}<span class="number">{count}</span></div>'


def _funnel_section(counts: dict[str, Any]) -> str:
    files, shots = counts["files"], counts["shots"]
    rows = [_bar("files found", files["found"], files["found"])]
    rows += [
        _bar(f"files: {name}", files[key], files["found"], "drop") for name, key in (("bad", "bad"), ("copies", "copies")) if files[key]
    ]
    rows += [
        _bar("shots found", shots, shots),
        _bar("passed all gates", counts["passed_gates"], shots),
        _bar("kept", counts["kept"], shots),
    ]
    rows += [_bar(reason, count, shots, "drop") for reason, count in counts["dropped_for"].items()]
    captions = ", ".join(f"{count} from the {source}" for source, count in counts["captions"].items()) or "none"
    note = "A shot may fail several gates and is then counted at each."
    return f'<h2>Funnel</h2><div class="funnel">{"".join(rows)}</div><p class="dim">{note} Captions: {html.escape(captions)}.</p>'


def _picture(jpeg: bytes, text: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}"><figcaption>{html.escape(text)}</figcaption></figure>'


def _evenly(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, spread over all of them."""
    return [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))] if rows else []


def _kept_section(tables: Tables) -> str:
    pictures = {row["id"]: row["thumbnail"] for row in tables.features}
    shown = [(row, json.loads(row["caption"])) for row in _evenly(tables.manifest, _KEPT_SHOWN)]
    figures = [
        _picture(pictures[row["id"]], f"{_shortened(caption['short'])} ({row['source']})")
        for row, caption in shown
        if row["id"] in pictures
    ]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else "<p>No clip was kept.</p>"


def _dropped_section(tables: Tables, reason: str, count: int) -> str:
    shown = _evenly([row for row in tables.rejected if reason in row["failed"]], _DROPPED_SHOWN)
    score = next((gate.score for gate in GATES if gate.reason == reason), None)
    figures = []
    for row in shown:
        why = f"{score} {row[f'score_{score}']:.4g}" if score else f"like {row['duplicate_of'][:8]}"
        figures.append(_picture(row["thumbnail"], f"{row['source']} at {row['start_seconds']:.2f} s, {why}"))
    return f'<h2>Dropped: {html.escape(reason)} ({count})</h2><div class="pictures">{"".join(figures)}</div>'


def _errors_section(tables: Tables) -> str:
    if not tables.errors:
        return "<h2>Errors</h2><p>None.</p>"
    cells = [
        "".join(f"<td>{html.escape(_shortened(str(row[key]), 300))}</td>" for key in ("source", "stage", "reason"))
        for row in tables.errors[:_ERRORS_SHOWN]
    ]
    more = len(tables.errors) - len(cells)
    rest = f'<p class="dim">and {more} more in errors.jsonl</p>' if more > 0 else ""
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    head = "<tr><th>file</th><th>stage</th><th>reason</th></tr>"
    return f'<h2>Errors ({len(tables.errors)})</h2><div class="wide"><table>{head}{rows}</table></div>{rest}'


def _shortened(text: str, letters: int = 120) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
