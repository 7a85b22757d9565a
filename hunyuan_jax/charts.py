"""Charts of a report: lines over an axis as inline SVG, with the last value of each line beside its name.

The classes of lines, `c0` to `c4`, and of axes get their colours from the page's style. Whatever is not ours is escaped.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence
from typing import Any


def text(value: Any) -> str:
    return html.escape(str(value))


def number(value: float) -> str:
    """A number for an axis or a caption: three digits that matter, thousands with a thin space."""
    if value and (abs(value) < 1e-2 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a chart: (x, y) in order of x."""

    label: str
    points: Sequence[tuple[float, float]]


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 220, 46, 12, 10, 34


@dataclasses.dataclass(frozen=True)
class Scale:
    """One axis: from values to units of the drawing, straight or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            mantissas = (1, 2, 5) if high - low <= 2 else (1,)
            every = max(1, (high - low) // 5)
            marks = [m * 10.0**e for e in range(low, high + 1, every) for m in mantissas]
        else:
            rough = (self.high - self.low) / 4
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
            marks = [step * n for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        return [mark for mark in marks if self.low * (1 - 1e-9) - 1e-12 <= mark <= self.high * (1 + 1e-9) + 1e-12]


def _scale_y(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high / low > 30:
        return Scale(low / 1.1, high * 1.1, _HEIGHT - _BOTTOM, _TOP, log=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if 0 <= low < 0.3 * high else low - margin
    return Scale(floor, high + margin, _HEIGHT - _BOTTOM, _TOP)


def _axes(x: Scale, y: Scale, x_label: str) -> str:
    parts = []
    for value in y.ticks():
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{number(value)}</text>')
    for value in x.ticks():
        at = f"{x(value):.1f}"
        parts.append(f'<line class="tick" x1="{at}" x2="{at}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM + 4}"/>')
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>')
    parts.append(f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">{text(x_label)}</text>')
    return "".join(parts)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a window of about a twentieth of the points, centred, so that the line does not lag behind."""
    half = max(1, len(points) // 40)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    out = []
    for n, (x, _) in enumerate(points):
        first, end = max(0, n - half), min(len(points), n + half + 1)
        out.append((x, (sums[end] - sums[first]) / (end - first)))
    return out


def _polyline(points: Sequence[tuple[float, float]], x: Scale, y: Scale, css: str) -> str:
    every = max(1, len(points) // 400)
    shown = [*points[::every], points[-1]]
    return f'<polyline class="{css}" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in shown)}"/>'


def _lines(series: Sequence[Series], x: Scale, y: Scale) -> str:
    parts = []
    for place, line in enumerate(series):
        colour = f"c{place % 5}"
        if len(line.points) >= 40:
            parts.append(_polyline(line.points, x, y, f"raw {colour}"))
            parts.append(_polyline(smoothed(line.points), x, y, colour))
            continue
        parts.append(_polyline(line.points, x, y, colour))
        parts += [f'<circle class="{colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>' for a, b in line.points]
    return "".join(parts)


def chart(title: str, unit: str, series: Sequence[Series], *, x_label: str = "step") -> str:
    """A figure with axes, their units, the raw and the smoothed line of each series, and the last value of each."""
    series = [line for line in series if line.points]
    xs = [a for line in series for a, _ in line.points]
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, _LEFT, _WIDTH - _RIGHT)
    y = _scale_y([b for line in series for _, b in line.points])
    last = [
        f'<span class="key c{n % 5}">{text(line.label)} <b>{number(line.points[-1][1])}</b></span>'
        for n, line in enumerate(series)
        if line.label
    ]
    drawing = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)}">{_axes(x, y, x_label)}{_lines(series, x, y)}</svg>'
    )
    head = f"<b>{text(title)}</b>" + (f' <span class="unit">{text(unit)}</span>' if unit else "")
    return f'<figure class="chart"><figcaption>{head}<span class="keys">{"".join(last)}</span></figcaption>{drawing}</figure>'
