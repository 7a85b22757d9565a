"""Captions: from the sidecar file beside a video where it has one, else a template filled with what was measured.

    NAME.json: {"shots": [{"start_seconds", "end_seconds", "camera", "caption": {"short", "dense", ...}}]}

A sidecar is not trusted. One that is malformed costs its clips their captions (they get the template), never the clips, and is
listed with the errors. `caption["source"]` says where a caption is from: "sidecar" or "template".
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam

from data_prep.split import Shot
from hunyuan_jax.data.captions import PROMPT_FIELDS, Caption
from hunyuan_jax.errors import UserError

CAMERA_LABELS = (
    *("zoom in", "zoom out", "pan up", "pan down", "pan left", "pan right", "tilt up", "tilt down", "tilt left", "tilt right"),
    *("around left", "around right", "static shot", "handheld shot"),
)
_MAX_BYTES = 4 * 2**20


class SidecarError(Exception):
    """What is wrong with a sidecar file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How well a sidecar's span has to agree with a shot's."""

    min_overlap: float  # intersection over union in time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """One entry of a sidecar file."""

    start_seconds: float
    end_seconds: float
    camera: str
    caption: dict[str, Any]


def read_sidecar(path: Path) -> list[Described]:
    """The entries of a sidecar file; none where there is no file. Raises `SidecarError` for one that is malformed."""
    try:
        if not path.is_file():
            return []
        if path.stat().st_size > _MAX_BYTES:
            raise SidecarError(f"The sidecar is larger than {_MAX_BYTES} bytes.")
        content = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"The sidecar is no JSON in UTF-8 ({error}).") from error
    except OSError as error:
        raise SidecarError(f"The sidecar cannot be read ({error.strerror}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("shots"), list):
        raise SidecarError('The sidecar should be {"shots": [...]}.')
    return [_described(number, entry) for number, entry in enumerate(content["shots"])]


def _described(number: int, entry: Any) -> Described:
    where = f"Shot {number} of the sidecar"
    if not isinstance(entry, dict):
        raise SidecarError(f"{where} should be an object.")
    start, end = entry.get("start_seconds"), entry.get("end_seconds")
    if not isinstance(start, int | float) or not isinstance(end, int | float) or not -math.inf < start < end < math.inf:
        raise SidecarError(f"{where} should have start_seconds before end_seconds.")
    camera, caption = entry.get("camera", ""), entry.get("caption")
    if camera and camera not in CAMERA_LABELS:
        raise SidecarError(f"{where} has the camera {str(camera)[:40]!r}, which is none of the {len(CAMERA_LABELS)} labels.")
    if not isinstance(caption, dict) or not isinstance(caption.get("short"), str) or not caption["short"].strip():
        raise SidecarError(f'{where} should have a caption with at least "short".')
    try:
        checked = Caption(**{name: caption[name] for name in PROMPT_FIELDS if name in caption})
    except UserError as error:
        raise SidecarError(f"{where}: {error}") from error
    fields = {name: value for name in PROMPT_FIELDS if (value := getattr(checked, name))}
    return Described(start_seconds=float(start), end_seconds=float(end), camera=camera, caption=fields)


def overlap(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Intersection over union of two spans of time."""
    inside = min(first[1], second[1]) - max(first[0], second[0])
    return max(0.0, inside) / max(first[1] - first[0] + second[1] - second[0] - max(0.0, inside), 1e-9)


def template(scores: dict[str, float]) -> dict[str, str]:
    """A caption that says no more than what was measured."""
    motion = "hardly any" if scores["motion_mean"] < 0.002 else "a little" if scores["motion_mean"] < 0.02 else "much"
    light = "dim light" if scores["luma"] < 60 else "bright light" if scores["luma"] > 180 else "even light"
    return {
        "short": f"A video clip in {light} with {motion} motion.",
        "dense": f"A video clip of {scores['seconds']:.0f} seconds in {light} with {motion} motion.",
        "lighting": light,
    }


def described_shot(shot: Shot, entries: Iterable[Described], config: CaptionConfig) -> Shot:
    """The shot with the caption of the entry that agrees best with it in time, or with the template."""
    spans = [(overlap(shot.whole_shot, (entry.start_seconds, entry.end_seconds)), entry) for entry in entries]
    agreement, best = max(spans, key=lambda pair: pair[0], default=(0.0, None))
    if best is None or agreement < config.min_overlap:
        return dataclasses.replace(shot, caption={**template(shot.scores), "source": "template"}, camera="")
    return dataclasses.replace(shot, caption={**best.caption, "source": "sidecar"}, camera=best.camera)


class CaptionFile(beam.DoFn):
    """(source, shots) -> (source, shots with captions); tagged "errors": what is wrong with its sidecar."""

    def __init__(self, folder: str, config: CaptionConfig) -> None:
        self._folder, self._config = folder, config

    def process(self, element: tuple[str, Iterable[Shot]]) -> Iterator[Any]:
        source, shots = element
        entries: list[Described] = []
        try:
            entries = read_sidecar((Path(self._folder) / source).with_suffix(".json"))
        except SidecarError as error:
            yield beam.pvalue.TaggedOutput("errors", {"source": source, "stage": "caption", "reason": str(error)})
        yield source, [described_shot(shot, entries, self._config) for shot in sorted(shots, key=lambda shot: shot.first_frame)]
