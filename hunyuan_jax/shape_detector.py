"""The shapes world's vocabulary, and a detector that reads it back from frames: which colour, which shape, moving where.

Everything that draws, captions or judges shapes takes the words and their meaning from here. The detector is plain image
processing (no training), so that it can judge what a model generates:

    frames --colour--> hue of the saturated pixels --mask--> how much of that colour each pixel holds
           mask over time --direction--> a line fitted to the centre;  --shape--> aligned masks against ideal outlines

Screen coordinates: x to the right, y down. Lengths are in shorter sides of the frame, so they hold at any size.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 45),
    "yellow": (242, 215, 25),
    "green": (45, 180, 60),
    "cyan": (30, 195, 215),
    "blue": (60, 85, 250),
    "purple": (175, 45, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "up": (0.0, -1.0),
    "up right": (_DIAGONAL, -_DIAGONAL),
    "right": (1.0, 0.0),
    "down right": (_DIAGONAL, _DIAGONAL),
    "down": (0.0, 1.0),
    "down left": (-_DIAGONAL, _DIAGONAL),
    "left": (-1.0, 0.0),
    "up left": (-_DIAGONAL, -_DIAGONAL),
    "standing": (0.0, 0.0),
}
NOTHING = "nothing"  # what a reading says where the frames show no saturated shape

STANDING_BELOW = 0.06  # displacement over the whole clip, in shorter sides; the slowest motion of the shapes world is 0.15
_MIN_CHROMA = 24.0  # weaker colour than this (of 255) is taken for background
_CANVAS = 40  # pixels a side of the canvas on which masks are compared
_CANVAS_AREA = 18.0**2  # pixels that every mask covers there
_SOFTNESS = (0.03, 0.07, 0.11, 0.16, 0.21)  # sigmas, in diameters of the shape, from a sharp edge to a very blurred one


@dataclasses.dataclass(frozen=True)
class ShapeReading:
    """What a clip shows: words of `COLOURS`, `SHAPES` and `DIRECTIONS`, or `NOTHING` three times."""

    colour: str
    shape: str
    direction: str


def short_caption(colour: str, shape: str, direction: str) -> str:
    """The prompt for a combination: "a red circle moving up left", "a red circle standing still"."""
    return f"a {colour} {shape} " + ("standing still" if direction == "standing" else f"moving {direction}")


@functools.cache
def outline(shape: str) -> np.ndarray:
    """The shape's outline as float64 points [N, 2] (x, y) around its centre of mass, about 1 across. Shapes stand upright."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        return 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "square":
        return 0.44 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)
    if shape == "triangle":
        angles = np.deg2rad([-90, 30, 150])
        return 0.62 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "cross":
        arm, end = 0.17, 0.52
        quarter = np.array([(arm, -end), (arm, -arm), (end, -arm)])
        turn = np.array([(0.0, -1.0), (1.0, 0.0)])  # A quarter turn, clockwise on the screen.
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, k).T for k in range(4)])
    raise ValueError(f"No shape is called {shape!r}; there are {', '.join(SHAPES)}.")


def draw_mask(shape: str, *, centre: tuple[float, float], diameter: float, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel the shape covers: float32 [H, W] in [0, 1], antialiased. Lengths in pixels, pixel 0 spans [0, 1)."""
    finer, bits = 4, 6
    points = (outline(shape) * diameter + np.asarray(centre)) * finer - 0.5
    fine = np.zeros((size[0] * finer, size[1] * finer), np.uint8)
    cv2.fillPoly(fine, [np.round(points * 2**bits).astype(np.int32)], 255, shift=bits)
    return cv2.resize(fine, (size[1], size[0]), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


# Two orthonormal directions that are orthogonal to grey: a colour's coordinates in this plane are its hue and saturation.
_CHROMA_PLANE = np.array([(2, -1, -1) / np.sqrt(6), (0, 1, -1) / np.sqrt(2)], dtype=np.float32).T
_HUES = np.array(list(COLOURS.values()), np.float32) @ _CHROMA_PLANE
_HUES /= np.linalg.norm(_HUES, axis=1, keepdims=True)  # [colours, 2], unit vectors


def _quantile(values: np.ndarray, q: float) -> float:
    """The quantile of about 16,000 evenly spread values: all of them would take longer than everything else here."""
    step = (values.size // 16_000) | 1  # An odd step meets every column of a frame.
    return float(np.quantile(values.reshape(-1)[::step], q))


def _read_colour(chroma: np.ndarray) -> str:
    """The palette's colour nearest in hue to the most saturated pixels; float32 [T, H, W, 2] in the chroma plane."""
    strength = np.hypot(chroma[..., 0], chroma[..., 1])
    strong = strength >= max(_MIN_CHROMA, 0.6 * _quantile(strength, 0.98))
    if not strong.any():
        return NOTHING
    return list(COLOURS)[int(np.argmax(_HUES @ chroma[strong].mean(axis=0)))]


def _masks(chroma: np.ndarray, colour: str) -> np.ndarray:
    """How much of `colour` each pixel holds, float32 [T, H, W] in [0, 1]; only each frame's largest patch is kept."""
    amount = chroma @ _HUES[list(COLOURS).index(colour)]
    amount -= _quantile(amount, 0.5)
    masks = _saturated(amount, 0.7 * _quantile(amount, 0.98))
    for mask in masks:
        _, labels, stats, _ = cv2.connectedComponentsWithStats((mask > 0.25).astype(np.uint8))
        if len(stats) < 2:
            mask[:] = 0
            continue
        patch = (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
        mask *= cv2.dilate(patch, np.ones((5, 5), np.uint8))  # With the soft edge around it.
    return masks


def _saturated(amount: np.ndarray, inside: float) -> np.ndarray:
    """`amount` as a share of its mean over the values of at least `inside`, clipped to [0, 1]."""
    full = float(amount[amount >= inside].mean())
    return np.clip(amount / max(full, 1e-6), 0, 1)


def _moments(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas [T] in pixels and centres [T, 2] (x, y) in pixels of the masks."""
    areas = masks.sum(axis=(1, 2))
    x = masks.sum(axis=1) @ (np.arange(masks.shape[2]) + 0.5)
    y = masks.sum(axis=2) @ (np.arange(masks.shape[1]) + 0.5)
    return areas, np.stack([x, y], axis=1) / np.maximum(areas, 1e-6)[:, None]


def _read_direction(centres: np.ndarray, times: np.ndarray, *, length: int, side: int) -> str:
    """The direction of the straight line nearest to `centres` [N, 2] at frame numbers `times` [N] of a clip of `length` frames."""
    if len(times) < 2:
        return "standing"
    i, j = np.triu_indices(len(times), k=1)
    slopes = (centres[j] - centres[i]) / (times[j] - times[i])[:, None]
    # The median of all slopes (Theil and Sen): a frame in which the shape is lost or deformed does not turn the line.
    displacement = np.median(slopes, axis=0) * (length - 1) / side
    if np.linalg.norm(displacement) < STANDING_BELOW:
        return "standing"
    return max((name for name in DIRECTIONS if name != "standing"), key=lambda name: float(displacement @ np.asarray(DIRECTIONS[name])))


def _aligned(masks: np.ndarray) -> np.ndarray:
    """The mean [_CANVAS, _CANVAS] of masks [N, H, W], each moved to the middle and scaled to the same area."""
    total = np.zeros((_CANVAS, _CANVAS), np.float32)
    for mask, area, centre in zip(masks, *_moments(masks), strict=True):
        scale = math.sqrt(_CANVAS_AREA / float(area))
        shift = (_CANVAS - 1) / 2 - scale * (centre - 0.5)
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], np.float64)
        total += cv2.warpAffine(mask, matrix, (_CANVAS, _CANVAS), flags=cv2.INTER_LINEAR)
    return total / len(masks)


@functools.cache
def _ideal_masks() -> tuple[list[str], np.ndarray]:
    """Names [K] and masks [K, _CANVAS, _CANVAS] of every shape at every softness, made as the masks of frames are."""
    names, masks = [], []
    for shape in SHAPES:
        sharp = draw_mask(shape, centre=(48.0, 48.0), diameter=40.0, size=(96, 96))
        for sigma in _SOFTNESS:
            soft = cv2.GaussianBlur(sharp, (0, 0), sigma * 40.0)
            names.append(shape)
            masks.append(_aligned(_saturated(soft, 0.7 * float(soft.max()))[None]))
    return names, np.stack(masks)


def _read_shape(masks: np.ndarray) -> str:
    """The outline with the greatest overlap (soft intersection over union) with the mean of the aligned masks."""
    seen = _aligned(masks)
    names, ideal = _ideal_masks()
    overlap = np.minimum(ideal, seen).sum(axis=(1, 2)) / np.maximum(ideal, seen).sum(axis=(1, 2))
    return names[int(np.argmax(overlap))]


def detect_shape(frames: np.ndarray) -> ShapeReading:
    """Reads colour, shape and direction on screen from one clip: uint8 RGB [T, H, W, 3], from 9 x 32 x 32 upwards.

    Expects one saturated shape before a background of low saturation. Frames in which it cannot be seen are left out; if there
    are none in which it can, every field of the reading is `NOTHING`. Raises `ValueError` for another kind of array.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"Frames must be uint8 [T, H, W, 3] and not empty, not {frames.dtype} {frames.shape}.")
    length, height, width, _ = frames.shape
    pictures = np.stack([cv2.GaussianBlur(frame, (3, 3), 0.6) for frame in frames])
    chroma = pictures.astype(np.float32) @ _CHROMA_PLANE
    colour = _read_colour(chroma)
    if colour == NOTHING:
        return ShapeReading(NOTHING, NOTHING, NOTHING)
    masks = _masks(chroma, colour)
    areas, centres = _moments(masks)
    times = np.flatnonzero(areas > max(4.0, 0.3 * float(np.median(areas))))
    if len(times) == 0:
        return ShapeReading(NOTHING, NOTHING, NOTHING)
    direction = _read_direction(centres[times], times, length=length, side=min(height, width))
    return ShapeReading(colour, _read_shape(masks[times]), direction)
