"""Gates: limits on scores. A shot fails every gate whose limit it misses, and all of them are recorded."""

import dataclasses

from data_prep.split import Shot


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The limits. Lengths are relative to the short side, speeds are short sides per second, shares lie in 0 .. 1."""

    min_seconds: float
    min_short_side: int  # pixels
    min_luma: float  # mean, 0 .. 255
    max_luma: float
    min_contrast: float  # standard deviation of the plane that varies most, 0 .. 255
    max_blur: float  # 0 sharp .. 1 blurred
    min_motion: float  # mean over all pixels
    max_motion: float
    max_border: float  # share of the area
    max_text: float  # share of the area, by a heuristic


@dataclasses.dataclass(frozen=True)
class Gate:
    """`reason` is what a report says of a shot whose `score` is on the wrong side of `limit`."""

    reason: str
    score: str
    limit: str  # a field of FilterConfig; its prefix says whether it is the least or the most

    def passes(self, shot: Shot, config: FilterConfig) -> bool:
        value, limit = shot.scores[self.score], getattr(config, self.limit)
        return value >= limit if self.limit.startswith("min_") else value <= limit


GATES = (
    Gate("too short", "seconds", "min_seconds"),
    Gate("too small", "short_side", "min_short_side"),
    Gate("too dark", "luma", "min_luma"),
    Gate("too bright", "luma", "max_luma"),
    Gate("no contrast", "contrast", "min_contrast"),
    Gate("blurred", "blur", "max_blur"),
    Gate("no motion", "motion_mean", "min_motion"),
    Gate("too fast", "motion_mean", "max_motion"),
    Gate("black borders", "border", "max_border"),
    Gate("large text", "text_heuristic", "max_text"),
)
NEAR_DUPLICATE = "near-duplicate"


def apply_gates(shot: Shot, config: FilterConfig) -> Shot:
    """The shot with the reasons of all gates it fails."""
    return dataclasses.replace(shot, failed=tuple(gate.reason for gate in GATES if not gate.passes(shot, config)))
