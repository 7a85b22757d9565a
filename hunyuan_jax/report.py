"""The report of a run: `python -m hunyuan_jax.report --run DIR` writes report.html and summary.json into the run directory.

    run directory --read--> Run (plain JSON values and paths) --sections--> one HTML page, nothing loaded from elsewhere

Every part of a run directory is optional; the page says what is missing. Captions, prompts and file names are not trusted and
are escaped. Charts are inline SVG, videos are embedded, and the few lines of script only start and stop them.
"""

import argparse
import base64
import collections
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hunyuan_jax.charts import Series, chart, number, text
from hunyuan_jax.data.dataset import replacing, write_json
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.metrics import read_metrics
from hunyuan_jax.video_io import MediaError, read_video

ATTRIBUTES = ("colour", "shape", "direction")
EMBEDDED_BYTES = 24 * 2**20  # of video in one page; what is beyond stays in its folder
PREVIEWS_SHOWN = 8
CLIPS_SHOWN_FIRST = 24
UNKNOWN = "\u2013"  # stands where a figure is not known

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory says. A part that is missing or damaged is empty, and `missing` says so by file name."""

    folder: Path
    timings: Sequence[Row]
    evaluation: Row
    curation: Row
    clips: Sequence[Row]  # generated: videos/index.json with what evaluation.json read from each
    metrics: Mapping[str, Sequence[Row]]  # by training, "vae" and "t2v"
    configs: Mapping[str, Any]
    environment: Row
    missing: Mapping[str, str]


def read_run(folder: Path) -> Run:
    """Reads a run directory. Raises `UserError` if it is none."""
    if not folder.is_dir():
        raise UserError(
            f"A run directory was expected at {folder}, but there is none. Run launch/quickstart.sh, or name another with --run."
        )
    missing: dict[str, str] = {}

    def read(name: str, otherwise: Any) -> Any:
        try:
            value = json.loads((folder / name).read_text())
        except FileNotFoundError:
            missing[name] = f"{name} is missing."
            return otherwise
        except ValueError as error:
            missing[name] = f"{name} cannot be read: {error}."
            return otherwise
        if isinstance(value, type(otherwise)):
            return value
        missing[name] = f"{name} does not hold what it should."
        return otherwise

    def read_lines(name: str) -> Sequence[Row]:
        if (folder / name).is_file():
            return read_metrics(folder / name)
        missing[name] = f"{name} is missing."
        return []

    evaluation = read("evaluation.json", {})
    judged = {row["file"]: row for row in evaluation.get("videos", [])}
    return Run(
        folder=folder,
        timings=read("timings.json", []),
        evaluation=evaluation,
        curation=read("clips/report.json", {}),
        clips=[{**row, **judged.get(row["file"], {})} for row in read("videos/index.json", [])],
        metrics={name: read_lines(f"{name}/metrics.jsonl") for name in ("vae", "t2v")},
        configs={name: config for name in ("vae", "t2v") if (config := read(f"{name}/config.json", {}))},
        environment=read("t2v/environment.json", {}) or read("vae/environment.json", {}),
        missing=missing,
    )


def summarise(run: Run) -> dict[str, Any]:
    """The headline figures, as in summary.json; what is not known is None."""
    accuracy = run.evaluation.get("accuracy", {})
    return {
        "seconds": round(sum(row["seconds"] for row in run.timings), 1) if run.timings else None,
        "peak_gib": max((row["peak_gib"] for row in run.timings if row.get("peak_gib")), default=None),
        "vae_psnr_db": run.evaluation.get("vae_psnr_db"),
        "accuracy": {name: accuracy.get("all", {}).get(name) for name in ATTRIBUTES},
        "accuracy_unseen": {name: accuracy.get("unseen", {}).get(name) for name in ATTRIBUTES},
    }


# Words and numbers


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _section(anchor: str, title: str, lead: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>'


def _nothing(run: Run, name: str) -> str:
    """What stands where a part is missing."""
    return f'<p class="missing">Nothing to show: {text(run.missing.get(name, f"{name} is empty."))}</p>'


# Charts


_TITLES = {
    "loss": ("Loss", ""),
    "loss/": ("Loss by bucket", ""),
    "l1": ("L1 distance", ""),
    "lpips": ("LPIPS", ""),
    "kl": ("KL divergence", "nats"),
    "psnr_db": ("PSNR while training", "dB"),
    "adversarial": ("Adversarial loss of the VAE", ""),
    "d_loss": ("Hinge loss of the critic", ""),
    "balance": ("Critic: logit of data less that of copies", ""),
    "adaptive_weight": ("Adaptive weight", ""),
    "grad_norm": ("Gradient norm", ""),
    "critic_grad_norm": ("Gradient norm of the critic", ""),
    "learning_rate": ("Learning rate", ""),
    "time/_per_second": ("Throughput", "per second"),
    "time/mfu": ("MFU, the share of the devices' peak", ""),
    "time/goodput": ("Goodput, the share of time that the model kept", ""),
    "memory/": ("Memory of a process", "GiB"),
    "data/share/": ("Share of samples by bucket", ""),
    "data/mean/": ("Mean of a batch's values by bucket", ""),
    "data/std/": ("Standard deviation of a batch's values by bucket", ""),
    "data/text_tokens/": ("Text tokens of a prompt by bucket", ""),
    "held_out/psnr/_db": ("PSNR on held-out clips", "dB"),
    "held_out/ssim/": ("SSIM on held-out clips", ""),
    "held_out/lpips/": ("LPIPS on held-out clips", ""),
    "held_out/sharpness/": ("Sharpness of held-out clips, 1 as the original", ""),
    "held_out/seam_error/": ("Seams: tiled against whole, held-out clips", "grey levels"),
    "held_out/loss/": ("Loss on held-out clips", ""),
    "skipped": ("Skipped steps", ""),
    "spikes": ("Of these for a spike", ""),
}
BLOCKS = ("grad_norm/", "param_norm/")
LINES_OF_LAYERS = 5  # of a stack's, in one chart


def _chart_of(name: str) -> tuple[str, str]:
    """Which chart a metric belongs to, and its label there: `loss/9x64x64` is the line `9x64x64` of the chart `loss/`."""
    unit = "_db" if name.endswith("_db") else ""
    if "/" not in name or name in _TITLES:
        return name, "last"
    if name.startswith("time/") and name.endswith("_per_second"):
        return "time/_per_second", name.removeprefix("time/").removesuffix("_per_second")
    chart_name, label = name.removesuffix(unit).rsplit("/", 1)
    return f"{chart_name}/{unit}", label


def _metric_charts(lines: Sequence[Row], *, of_blocks: bool = False) -> list[str]:
    """All charts of a metrics.jsonl: the known ones first, in a fixed order, then any other number found there; or those of blocks."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in lines:
        for name, value in line.items():
            if name in ("step", "seconds") or name.startswith(BLOCKS) != of_blocks or _PHASE.fullmatch(name):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                chart_name, label = _chart_of(name)
                charts[chart_name][label].append((line["step"], value))
    # A count that stayed at zero tells nothing.
    shown = [name for name, series in charts.items() if name not in ("skipped", "spikes") or any(y for _, y in series["last"])]
    order = list(_TITLES)
    shown.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    parts = []
    for name in shown:
        title, unit = _TITLES.get(name, (name.removesuffix("_db").strip("/").replace("_", " "), "dB" if name.endswith("_db") else ""))
        labels = _evenly(list(charts[name]), LINES_OF_LAYERS) if of_blocks else list(charts[name])
        parts.append(chart(title, unit, [Series(label, charts[name][label]) for label in labels]))
    return parts


_PHASE = re.compile(r"time/(\w+?)_seconds")


def _time_spent(lines: Sequence[Row]) -> str:
    """Where the wall time of a training went, until its last line of the log."""
    last = next((line for line in reversed(lines) if "time/goodput" in line), {})
    spent = [(found[1], value) for name, value in last.items() if (found := _PHASE.fullmatch(name)) and isinstance(value, int | float)]
    total = sum(seconds for _, seconds in spent)
    if not total:
        return ""
    css = {"productive": "good", "lost": "drop", "skipped": "drop", "stalled": "drop"}
    rows = [
        (phase, seconds, total, f"{_duration(seconds)}, {_percent(seconds / total)}", css.get(phase, ""))
        for phase, seconds in sorted(spent, key=lambda row: -row[1])
        if seconds >= 0.05
    ]
    return f"<h3>Where the time went, over all processes of the run</h3>{_bars(rows)}"


def _norms(lines: Sequence[Row]) -> str:
    charts = _metric_charts(lines, of_blocks=True)
    said = "Norms of gradients and parameters by block; of a stack of layers a few, from its first to its last"
    return f'<details><summary>{said}</summary><div class="charts">{"".join(charts)}</div></details>' if charts else ""


# Videos


class _Embedder:
    """Puts video files into the page as long as `EMBEDDED_BYTES` lasts."""

    def __init__(self) -> None:
        self._left = EMBEDDED_BYTES

    def __call__(self, path: Path) -> str:
        try:
            data = path.read_bytes()
            first = read_video(data, max_frames=1).frames[0]
        except (OSError, MediaError):
            return f'<p class="missing">{text(path.name)} cannot be read</p>'
        if len(data) > self._left:
            return f'<p class="missing">{text(path.name)} lies beside this page</p>'
        self._left -= len(data)
        picture = io.BytesIO()
        Image.fromarray(first).save(picture, format="WEBP", quality=85)
        height, width = first.shape[:2]
        poster, video = (base64.b64encode(part).decode() for part in (picture.getvalue(), data))
        return (
            f'<video controls loop muted playsinline preload="none" width="{width}" height="{height}" '
            f'poster="data:image/webp;base64,{poster}" src="data:video/mp4;base64,{video}"></video>'
        )


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `items`, spread evenly, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _previews(run: Run, name: str, embed: _Embedder) -> str:
    paths = sorted((run.folder / name / "previews").glob("step_*.mp4"))
    if not paths:
        return f'<p class="missing">Nothing to show: {name}/previews is empty.</p>'
    figures = []
    for path in _evenly(paths, PREVIEWS_SHOWN):
        step = path.stem.removeprefix("step_").lstrip("0") or "0"
        figures.append(f'<figure><figcaption class="step">step {text(step)}</figcaption>{embed(path)}</figure>')
    return f'<div class="previews">{"".join(figures)}</div>'


def _reading(clip: Row, name: str) -> str:
    expected, read = clip["expected"].get(name), clip["read"].get(name)
    if expected == read:
        return f'<span class="right">✓ {text(read)}</span>'
    return f'<span class="wrong">✗ {text(read)}</span>'


def _card(clip: Row, embed: _Embedder, *, first: bool) -> str:
    judged = "expected" in clip and "read" in clip
    wrong = judged and any(clip["expected"].get(name) != clip["read"].get(name) for name in ATTRIBUTES)
    seen = clip.get("seen", True)
    classes = [word for word, holds in (("first", first), ("unseen", not seen), ("seen", seen), ("mistake", wrong)) if holds]
    badge = "" if seen else '<span class="badge">unseen</span>'
    reading = f'<div class="reading">{"".join(_reading(clip, name) for name in ATTRIBUTES)}</div>' if judged else ""
    video = embed(clip["path"])
    caption = f"<figcaption>{text(clip.get('prompt', ''))}{reading}</figcaption>"
    return f'<figure class="card {" ".join(classes)}"><div class="screen">{video}{badge}</div>{caption}</figure>'


def _gallery(run: Run, embed: _Embedder) -> str:
    lead = "Each was made from its prompt alone. Beneath it stands what the detector read from the frames."
    if not run.clips:
        return _section("clips", "Generated clips", lead, _nothing(run, "videos/index.json"))
    clips = [{**clip, "path": run.folder / "videos" / Path(clip["file"]).name} for clip in run.clips]
    first = {id(clip) for clip in _evenly(clips, CLIPS_SHOWN_FIRST)}
    cards = [_card(clip, embed, first=id(clip) in first) for clip in clips]
    counts = {css: sum(f" {css}" in card.split(">", 1)[0] for card in cards) for css in ("first", "seen", "unseen", "mistake")}
    choices = [
        ("first", f"A selection ({counts['first']})"),
        ("every", f"All ({len(cards)})"),
        ("seen", f"Seen together ({counts['seen']})"),
        ("unseen", f"Never seen together ({counts['unseen']})"),
        ("mistake", f"With a mistake ({counts['mistake']})"),
    ]
    inputs = "".join(
        f'<input type="radio" name="show" id="show-{css}"{" checked" if css == "first" else ""}><label for="show-{css}">{label}</label>'
        for css, label in choices
    )
    return _section("clips", "Generated clips", lead, f'<div class="chooser">{inputs}<div class="gallery">{"".join(cards)}</div></div>')


# The other sections


def _tiles(summary: Row) -> str:
    def tile(name: str, value: str, note: str) -> str:
        return f'<div class="tile"><span>{name}</span><b>{value}</b><small>{note}</small></div>'

    psnr, seconds, peak = summary["vae_psnr_db"], summary["seconds"], summary["peak_gib"]
    tiles = [
        tile(f"{name.capitalize()} right", _percent(summary["accuracy"][name]), f"unseen {_percent(summary['accuracy_unseen'][name])}")
        for name in ATTRIBUTES
    ]
    tiles.append(tile("VAE PSNR", UNKNOWN if psnr is None else f"{psnr:.2f} dB", "held-out clips"))
    tiles.append(tile("Time", UNKNOWN if seconds is None else _duration(seconds), "until this report"))
    tiles.append(tile("Peak memory", UNKNOWN if peak is None else f"{peak:.2f} GiB", "all processes"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _meter(share: float, css: str = "") -> str:
    return f'<span class="meter {css}"><i style="width:{100 * min(max(share, 0), 1):.1f}%"></i></span>'


def _accuracy_table(run: Run) -> str:
    counts = {
        "all": len(run.clips),
        "seen": sum(bool(clip.get("seen", True)) for clip in run.clips),
        "unseen": sum(not clip.get("seen", True) for clip in run.clips),
    }
    rows = []
    labels = {"all": "All prompts", "seen": "Seen together in training", "unseen": "Never seen together"}
    for key, label in labels.items():
        values = run.evaluation["accuracy"].get(key) or {}
        cells = "".join(f"<td>{_percent(values.get(name))}{_meter(values.get(name) or 0)}</td>" for name in ATTRIBUTES)
        rows.append(f"<tr><th>{label}<small>{counts[key]} clips</small></th>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ATTRIBUTES)
    return f'<div class="wide"><table class="accuracy"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _by_word(run: Run) -> str:
    """How often each word of the prompts is read back, and what is read most often instead."""
    columns = []
    judged = [clip for clip in run.clips if "expected" in clip and "read" in clip]
    for name in ATTRIBUTES:
        readings: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for clip in judged:
            readings[str(clip["expected"].get(name))][str(clip["read"].get(name))] += 1
        rows = []
        for word, read in sorted(readings.items()):
            instead = next((f"{other} ({count})" for other, count in read.most_common() if other != word), "")
            share = read[word] / read.total()
            rows.append(
                f"<tr><th>{text(word)}</th><td>{read[word]} / {read.total()}{_meter(share)}</td>"
                f"<td><small>{text(instead)}</small></td></tr>"
            )
        columns.append(f'<table class="words"><caption>{name}</caption><tbody>{"".join(rows)}</tbody></table>')
    return f'<details><summary>Word by word, and what was read instead</summary><div class="columns">{"".join(columns)}</div></details>'


def _accuracy(run: Run) -> str:
    lead = "How often a detector, reading the generated frames alone, finds what the prompt asked for."
    if not run.evaluation.get("accuracy"):
        return _section("accuracy", "Accuracy", lead, _nothing(run, "evaluation.json"))
    return _section("accuracy", "Accuracy", lead, _accuracy_table(run) + _by_word(run))


def _flow_loss(run: Run) -> list[str]:
    points = [(row["t"], row["loss"]) for row in run.evaluation.get("flow_loss_by_time", [])]
    return [chart("Held-out flow loss by time", "", [Series("", points)], x_label="t, from data (0) to noise (1)")] if points else []


def _training(run: Run, name: str, *, title: str, lead: str, embed: _Embedder) -> str:
    charts = _metric_charts(run.metrics[name]) + (_flow_loss(run) if name == "t2v" else [])
    curves = f'<div class="charts">{"".join(charts)}</div>' if charts else _nothing(run, f"{name}/metrics.jsonl")
    said = "".join(f"<p>{text(words)}</p>" for words in _left_out(run, name))
    watched = _norms(run.metrics[name]) + _time_spent(run.metrics[name])
    previews = f"<h3>Previews, step by step</h3>{_previews(run, name, embed)}"
    return _section(name, title, lead, f"{said}{curves}{watched}{_reconstruction(run, name)}{previews}")


# PSNR in dB as published for other VAEs (paper, table 1), of ImageNet at 256 x 256 and of MCL-JCV at 33 x 360 x 640.
PUBLISHED_VAES = (
    ("FLUX-VAE", "1 x 8 x 8", 16, 32.70, None),
    ("OpenSora-1.2", "4 x 8 x 8", 4, 28.11, 30.15),
    ("CogVideoX-1.5", "4 x 8 x 8", 16, 31.73, 33.22),
    ("Cosmos-VAE", "4 x 8 x 8", 16, 30.07, 32.76),
    ("HunyuanVideo", "4 x 8 x 8", 16, 33.14, 35.39),
)
_MEASURED = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "sharpness": "sharpness", "seam_error": "seams, grey levels"}


def _reconstruction(run: Run, name: str) -> str:
    """Held-out clips through the VAE, by bucket, at the first and the last measurement; and what others have published."""
    measured: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in run.metrics[name]:
        for key, value in line.items():
            _, metric, bucket = f"{key.removesuffix('_db')}//".split("/", 2)
            if key.startswith("held_out/") and isinstance(value, int | float):
                measured[bucket.removesuffix("//")][metric].append(value)
    if (run.configs.get(name) or {}).get("task") != "vae" or not measured:
        return ""

    def cell(values: Sequence[float]) -> str:
        if not values:
            return f"<td>{UNKNOWN}</td>"
        before = f" <small>from {number(values[0])}</small>" if len(values) > 1 else ""
        return f"<td><b>{number(values[-1])}</b>{before}</td>"

    shown = [metric for metric in _MEASURED if any(metric in row for row in measured.values())]
    head = "".join(f"<th>{_MEASURED[metric]}</th>" for metric in shown)
    rows = "".join(
        f"<tr><th>{text(bucket)}</th>{''.join(cell(row.get(metric, [])) for metric in shown)}</tr>" for bucket, row in measured.items()
    )
    ours = f'<table class="figures"><thead><tr><th>held-out clips</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    published = "".join(
        f"<tr><th>{vae}</th><td>{factors}</td><td>{channels}</td><td>{image}</td><td>{UNKNOWN if video is None else video}</td></tr>"
        for vae, factors, channels, image, video in PUBLISHED_VAES
    )
    theirs = (
        '<table class="figures"><thead><tr><th>published</th><th>compression</th><th>channels</th><th>ImageNet 256, PSNR dB</th>'
        f"<th>MCL-JCV 33 x 360 x 640, PSNR dB</th></tr></thead><tbody>{published}</tbody></table>"
    )
    said = "<p>Of other clips than ours, so no PSNR of one table can be set against one of the other; the paper's table 1.</p>"
    return f"<h3>Reconstruction</h3>{ours}{said}{theirs}"


def _left_out(run: Run, name: str) -> list[str]:
    """Terms of the paper's loss that a training of the VAE did without."""
    config = run.configs.get(name) or {}
    if config.get("task") != "vae":
        return []
    loss = config.get("loss")
    parts = [] if isinstance(loss, dict) and loss.get("lpips_files") else ["LPIPS was off: loss.lpips_files names no weights for it."]
    return parts if config.get("critic") else [*parts, "The adversary was off: the config has no section critic."]


def _bars(rows: Iterable[tuple[str, float, float, str, str]]) -> str:
    """Rows of a bar chart: label, value, the value of a full bar, words behind it, class."""
    parts = [
        f'<div class="bar"><span>{text(label)}</span>{_meter(value / full if full else 0, css)}<span>{text(words)}</span></div>'
        for label, value, full, words, css in rows
    ]
    return f'<div class="bars">{"".join(parts)}</div>'


def _curation(run: Run) -> str:
    lead = "From files to clips fit for training; a shot may fail several gates and is then counted at each."
    counts = run.curation
    if not counts:
        return _section("curation", "Curation", lead, _nothing(run, "clips/report.json"))
    files, shots = counts.get("files", {}), counts.get("shots", 0)
    rows = [("files found", files.get("found", 0), files.get("found", 0), "")]
    rows += [
        (f"files {said}", files.get(key, 0), files.get("found", 0), "drop")
        for key, said in (("bad", "that are bad"), ("copies", "that are copies"))
    ]
    rows += [("shots found", shots, shots, ""), ("shots past all gates", counts.get("passed_gates", 0), shots, "")]
    rows += [(f"dropped: {reason}", count, shots, "drop") for reason, count in counts.get("dropped_for", {}).items()]
    rows += [("clips kept", counts.get("kept", 0), shots, "good")]
    bars = _bars((label, value, full, number(value), css) for label, value, full, css in rows)
    link = '<p>Pictures of what was kept and dropped are in <a href="clips/report.html">clips/report.html</a>, beside this page.</p>'
    return _section("curation", "Curation", lead, bars + link)


def _timings(run: Run) -> str:
    lead = "Seconds from start to end of each step, kills and second attempts included, and the most memory all its processes held at once."
    if not run.timings:
        return _section("timings", "Time and memory", lead, _nothing(run, "timings.json"))
    longest = max(row["seconds"] for row in run.timings)

    def words(row: Row) -> str:
        return _duration(row["seconds"]) + (f", {row['peak_gib']:.2f} GiB" if row.get("peak_gib") else "")

    return _section(
        "timings", "Time and memory", lead, _bars((row["step"], row["seconds"], longest, words(row), "") for row in run.timings)
    )


def _setup(run: Run) -> str:
    parts = []
    for name, config in run.configs.items():
        parts.append(f"<details><summary>{name}/config.json</summary><pre>{text(json.dumps(config, indent=2))}</pre></details>")
    versions = {**{k: v for k, v in run.environment.items() if k != "packages"}, **run.environment.get("packages", {})}
    rows = "".join(
        f"<tr><th>{text(k)}</th><td>{text(', '.join(map(str, v)) if isinstance(v, list) else v)}</td></tr>" for k, v in versions.items()
    )
    parts.append(f'<table class="versions"><tbody>{rows}</tbody></table>' if rows else _nothing(run, "t2v/environment.json"))
    return _section("setup", "Configuration and versions", "What it takes to do this again.", "".join(parts))


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16191d; --dim: #667080; --line: #dfe3e8;
  --good: #16875a; --bad: #c93a3a; --c0: #2f6fde; --c1: #d9730d; --c2: #16875a; --c3: #9a4dd0; --c4: #c2347f; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1e24; --ink: #e7eaee; --dim: #98a2b0; --line: #2c323b;
  --good: #4cc38a; --bad: #f27272; --c0: #6ea2ff; --c1: #f0a04b; --c2: #4cc38a; --c3: #c08cf0; --c4: #f07ab3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header { padding: 2.5rem 0 .5rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0; }
h3 { font-size: 1rem; margin: 1.75rem 0 .6rem; }
nav { display: flex; gap: 1.1rem; overflow-x: auto; padding: .7rem 0; position: sticky; top: 0; z-index: 2; background: var(--page);
  border-bottom: 1px solid var(--line); white-space: nowrap; font-size: .9rem; scrollbar-width: none; }
a { color: var(--c0); text-decoration: none; }
a:hover { text-decoration: underline; }
section { padding-top: 3.2rem; scroll-margin-top: 1rem; }
figure { margin: 0; }
small { color: var(--dim); font-weight: 400; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.4; margin: .5rem 0 0; }
table { border-collapse: collapse; overflow-wrap: normal; }
th { text-align: left; font-weight: 600; vertical-align: top; }
details { padding: .7rem 1rem; margin-top: .75rem; }
summary { cursor: pointer; }
.lead, header p { color: var(--dim); margin: .15rem 0 1rem; max-width: 48rem; }
.missing { color: var(--dim); font-style: italic; }
.tile, .chart, .card, details, .bars, .accuracy, .figures, .versions {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.2rem, 1fr)); gap: .75rem; margin: 1.25rem 0 1.5rem; }
.tile { padding: .8rem 1rem; }
.tile span, .tile small { display: block; color: var(--dim); font-size: .85rem; }
.tile b { font-size: 1.5rem; letter-spacing: -.02em; font-variant-numeric: tabular-nums; line-height: 1.35; white-space: nowrap; }

.chooser input { position: absolute; opacity: 0; }
.chooser label { display: inline-block; padding: .25rem .8rem; margin: 0 .3rem .5rem 0; border: 1px solid var(--line);
  border-radius: 99px; background: var(--card); font-size: .88rem; cursor: pointer; }
.chooser input:checked + label { background: var(--ink); color: var(--page); border-color: var(--ink); }
.chooser input:focus-visible + label { outline: 2px solid var(--c0); outline-offset: 2px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.4rem, 1fr)); gap: .75rem; margin-top: .5rem; }
.card { overflow: hidden; display: none; }
#show-every:checked ~ .gallery .card, #show-first:checked ~ .gallery .first, #show-seen:checked ~ .gallery .seen,
#show-unseen:checked ~ .gallery .unseen, #show-mistake:checked ~ .gallery .mistake { display: block; }
video { display: block; width: 100%; height: auto; background: #0003; cursor: pointer; }
.screen { position: relative; }
.badge { position: absolute; top: .4rem; left: .4rem; padding: 0 .45rem; border-radius: 99px; background: #000a; color: #fff;
  font-size: .7rem; pointer-events: none; }
.card figcaption { padding: .5rem .65rem .6rem; font-size: .84rem; line-height: 1.3; }
.reading { display: flex; flex-wrap: wrap; gap: 0 .55rem; margin-top: .3rem; font-size: .78rem; }
.right { color: var(--good); white-space: nowrap; }
.wrong { color: var(--bad); font-weight: 600; white-space: nowrap; }

.wide { overflow-x: auto; }
.accuracy { width: 100%; border-collapse: separate; border-spacing: 0; }
.accuracy th, .accuracy td { padding: .7rem 1rem; border-top: 1px solid var(--line); }
.accuracy thead th { border: 0; }
.accuracy thead th, .words caption { text-transform: capitalize; }
.accuracy small { display: block; }
.accuracy td { font-size: 1.15rem; font-variant-numeric: tabular-nums; min-width: 5rem; white-space: nowrap; }
.meter { display: block; height: .4rem; border-radius: 9px; background: var(--line); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--c0); border-radius: 9px; }
.meter.drop i { background: var(--bad); }
.meter.good i { background: var(--good); }
.columns { display: flex; flex-wrap: wrap; gap: 1.5rem 3rem; padding-top: .8rem; align-items: start; }
.words caption { text-align: left; color: var(--dim); }
.words th, .words td { padding: .15rem .9rem .15rem 0; font-size: .88rem; font-weight: 400; font-variant-numeric: tabular-nums; }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .75rem; margin-bottom: .75rem; }
.chart { padding: .8rem .8rem .5rem; display: flex; flex-direction: column; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 .5rem; font-size: .92rem; align-items: baseline; }
.unit { color: var(--dim); }
.keys { margin-left: auto; display: flex; flex-wrap: wrap; gap: 0 .8rem; font-size: .82rem; color: var(--dim); }
.keys b { color: var(--ink); font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: .55rem; height: .55rem; border-radius: 9px; margin-right: .3rem;
  background: var(--colour); }
svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: .3rem; }
svg text { font-size: 11px; fill: var(--dim); }
.c0 { --colour: var(--c0); } .c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); } .c3 { --colour: var(--c3); }
.c4 { --colour: var(--c4); }
.grid { stroke: var(--line); }
.axis, .tick { stroke: var(--dim); }
polyline { fill: none; stroke: var(--colour); stroke-linejoin: round; stroke-width: 2; }
polyline.raw { stroke-width: 1; opacity: .28; }
circle { fill: var(--colour); }
.previews { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: .75rem; }
.previews video { border-radius: 8px; }
.step { font-size: .82rem; color: var(--dim); font-variant-numeric: tabular-nums; }

.bars { padding: .8rem 1rem; }
.bar { display: grid; grid-template-columns: 12rem 1fr 9.5rem; gap: .8rem; align-items: center; padding: .18rem 0; font-size: .92rem; }
.bar .meter { height: .7rem; }
.bar span:last-child { font-variant-numeric: tabular-nums; color: var(--dim); }
.figures { padding: .6rem 1rem; border-collapse: separate; border-spacing: 1rem .2rem; font-size: .9rem; display: block; overflow-x: auto; }
.figures th { text-align: left; font-weight: 400; color: var(--dim); }
.figures td { font-variant-numeric: tabular-nums; }
.versions { padding: .6rem 1rem; margin-top: .75rem; border-collapse: separate; width: 100%; font-size: .88rem; }
.versions th { width: 11rem; font-weight: 400; color: var(--dim); }
.versions td { overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile b { font-size: 1.35rem; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: .5rem; }
  .bar { grid-template-columns: 8rem 1fr 5rem; gap: .5rem; font-size: .82rem; }
  .accuracy th, .accuracy td { padding: .55rem .5rem; font-size: .92rem; min-width: 0; }
  .versions th { width: 7.5rem; }
}
"""

# Videos play while they are in view. Away from it they give their player back: browsers allow only a few dozen at a time.
_SCRIPT = """
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
  const sources = new Map();
  const watcher = new IntersectionObserver(entries => {
    for (const {target: video, isIntersecting} of entries) {
      if (isIntersecting) {
        if (!video.hasAttribute("src")) video.src = sources.get(video);
        video.play().catch(() => {});
      } else if (video.hasAttribute("src")) {
        video.pause();
        video.removeAttribute("src");
        video.load();
      }
    }
  });
  for (const video of document.querySelectorAll("video")) {
    sources.set(video, video.getAttribute("src"));
    video.removeAttribute("controls");
    video.title = "Click to stop or go on";
    video.addEventListener("click", () => video.paused ? video.play() : video.pause());
    watcher.observe(video);
  }
}
"""


def make_page(run: Run) -> str:
    """The whole page. Its content security policy allows no request and no script but its own."""
    summary, embed = summarise(run), _Embedder()
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    titles = {
        "clips": "Clips",
        "accuracy": "Accuracy",
        "t2v": "Transformer",
        "vae": "VAE",
        "curation": "Curation",
        "timings": "Time",
        "setup": "Setup",
    }
    sections = [
        _gallery(run, embed),
        _accuracy(run),
        _training(
            run,
            "t2v",
            title="Training the diffusion transformer",
            lead="Flow matching on latents; previews show held-out clips and what averaged, raw and first weights make of their prompts.",
            embed=embed,
        ),
        _training(
            run,
            "vae",
            title="Training the VAE",
            lead="Frames to latents and back; each preview shows clips and their reconstructions.",
            embed=embed,
        ),
        _curation(run),
        _timings(run),
        _setup(run),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>hunyuan_jax: {text(run.folder.name)}</title><style>{_STYLE}</style></head>"
        "<body><header><h1>From raw video to generated video</h1>"
        f"<p>hunyuan_jax, run <b>{text(run.folder.name)}</b>: {text(_story(run))}</p></header>"
        f"{_tiles(summary)}<nav>{''.join(f'<a href=#{anchor}>{title}</a>' for anchor, title in titles.items())}</nav>"
        f"<main>{''.join(sections)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _story(run: Run) -> str:
    """The run in one sentence, as far as it went."""
    parts = []
    if run.curation.get("kept"):
        parts.append(f"{number(run.curation.get('files', {}).get('found', 0))} raw files became {number(run.curation['kept'])} clips")
    if run.metrics["t2v"]:
        parts.append(f"a transformer learned from their latents for {number(run.metrics['t2v'][-1]['step'])} steps")
    if run.clips:
        unseen = sum(not clip.get("seen", True) for clip in run.clips)
        parts.append(f"it made {len(run.clips)} videos from prompts, {unseen} of them with words never seen together in training")
    return (", ".join(parts) + ".") if parts else "nothing has been done yet."


def write_report(folder: Path) -> dict[str, Any]:
    """Writes report.html and summary.json into the run directory, each whole or not at all; returns the summary."""
    run = read_run(folder)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(make_page(run), encoding="utf-8")
    summary = summarise(run)
    write_json(folder / "summary.json", summary)
    return summary


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hunyuan_jax.report", description="Writes report.html and summary.json of a run.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory, as launch/quickstart.sh makes it")
    folder = Path(parser.parse_args(argv[1:]).run)
    write_report(folder)
    print(f"Wrote {folder / 'report.html'} and {folder / 'summary.json'}")


if __name__ == "__main__":
    run_command(main)
