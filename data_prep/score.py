"""What is measured on a shot, without learned weights: clear start, sharpness, motion, borders, text, light, and looks.

    Picture --FrameMeter--> FrameMeasure --score_clip--> scores          blur            0 sharp .. 1 blurred (sharpest tile)
                                        --clear_start--> first frame     motion_mean     short sides per second
                                        --embed--------> unit vector     motion_p95      short sides per second
                                                                         border          share of the area
    `MeasureFile` does all of it for one file: it decodes once           text_heuristic  share of the area, low trust
    and hands on numbers, a thumbnail and an embedding per shot.         luma, contrast, seconds, short_side

Lengths are relative to the short side of the picture, so the same thresholds serve 96 and 1080 pixels.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import cv2
import numpy as np

from data_prep.split import Picture, Piece, Shot, ShotSplitter, SplitConfig, clip_id, pictures, rate_of
from data_prep.write import mark_progress

_LAPLACIAN_START_SHARE = 0.8
_VERIFIED_GAIN = 1.5  # grey levels by which following the flow must improve the match
_EDGE = 3.0  # levels between neighbours, after a slight blur, from which on an edge is an edge
_TINY = 32  # pixels a side of the picture an embedding is made from


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """At which sizes and rates things are measured."""

    flow_short_side: int  # pixels
    flow_fps: float  # pairs of frames a second
    slowest_seconds: float  # what stands still for so long between two frames stands
    blur_short_side: int  # pixels
    sample_fps: float  # pictures a second kept for what changes slowly (blur, borders, text)
    samples: int  # at most so many of them are used of one clip
    start_seconds: float  # the clear start frame lies within so many seconds


@dataclasses.dataclass(frozen=True)
class FrameMeasure:
    """What stays of one frame: numbers and small pictures."""

    number: int
    pts: int
    seconds: float
    height: int
    width: int
    laplacian: float
    luma: float
    tiny: np.ndarray  # uint8 [32, 32, 3] BGR
    motion_from: int = -1  # number of the frame the motion was measured from; -1 where it was not
    motion: tuple[float, float] = (0.0, 0.0)  # mean and 95th percentile, short sides per second
    motion_seconds: float = 0.0  # over which it was measured
    sample: np.ndarray | None = None  # BGR, at the size blur is measured at


class FrameMeter:
    """Measures frames one after the other; remembers the last one that motion was measured at."""

    def __init__(self, config: ScoreConfig) -> None:
        self._config = config
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        # The finest level matters at 96 pixels, where half a pixel is a slow motion; it costs nothing there.
        self._flow.setFinestScale(1)
        self._last: tuple[Picture, Sequence[np.ndarray]] | None = None
        self._last_sample = -np.inf

    def measure(self, picture: Picture) -> tuple[FrameMeasure, np.ndarray]:
        """The measure of a frame and its small BGR picture."""
        bgr = picture.scaled(self._config.flow_short_side, layout="bgr24")
        planes = cv2.split(cv2.cvtColor(bgr, cv2.COLOR_BGR2YCrCb))
        moved = self._motion(picture, planes)
        measure = FrameMeasure(
            number=picture.number,
            pts=picture.pts,
            seconds=picture.seconds,
            height=picture.frame.height,
            width=picture.frame.width,
            laplacian=float(cv2.meanStdDev(cv2.Laplacian(planes[0], cv2.CV_16S))[1][0, 0]) ** 2,
            luma=float(cv2.mean(planes[0])[0]),
            tiny=cv2.resize(bgr, (_TINY, _TINY), interpolation=cv2.INTER_AREA),
            sample=self._sample(picture, bgr),
            **moved,
        )
        return measure, bgr

    def _sample(self, picture: Picture, bgr: np.ndarray) -> np.ndarray | None:
        if picture.seconds - self._last_sample < 1 / self._config.sample_fps - 1e-6:
            return None
        self._last_sample = picture.seconds
        if min(picture.frame.height, picture.frame.width) <= min(bgr.shape[:2]):
            return bgr
        return picture.scaled(self._config.blur_short_side, layout="bgr24")

    def _motion(self, picture: Picture, planes: Sequence[np.ndarray]) -> dict[str, Any]:
        """The motion fields of a frame, empty where none is measured."""
        if self._last is None:
            self._last = (picture, planes)
            return {}
        before, before_planes = self._last
        elapsed = picture.seconds - before.seconds
        if elapsed < 1 / self._config.flow_fps - 1e-6:
            return {}
        # A red shape may be as bright as the grey behind it: motion is looked for in the plane that changes most.
        changes = [cv2.norm(old, new, cv2.NORM_L1) for old, new in zip(before_planes, planes, strict=True)]
        plane = int(np.argmax(changes))
        pixels = verified_motion(self._flow, before_planes[plane], planes[plane]) / (min(planes[0].shape) * elapsed)
        moves = bool(pixels.any())
        # What moves too slowly to be seen between two frames is waited for.
        if not moves and elapsed < self._config.slowest_seconds:
            return {}
        self._last = (picture, planes)
        motion = (float(pixels.mean()), float(np.percentile(pixels, 95)) if moves else 0.0)
        return {"motion_from": before.number, "motion": motion, "motion_seconds": elapsed}


def verified_motion(flow: cv2.DISOpticalFlow, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Length of the optical flow in pixels [H, W], zero where it is not to be believed.

    Dense flow invents motion on flat regions. It counts where the flow back agrees and where following it improves the match.
    """
    unmoved = cv2.blur(cv2.absdiff(before, after).astype(np.float32), (7, 7))
    if unmoved.max() <= _VERIFIED_GAIN:
        return np.zeros(before.shape, np.float32)
    forward, backward = (flow.calc(*pair, None) for pair in ((before, after), (after, before)))  # type: ignore[call-overload]
    rows, columns = np.indices(before.shape, dtype=np.float32)
    to_x, to_y = columns + forward[..., 0], rows + forward[..., 1]
    back = cv2.remap(backward, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    moved = cv2.remap(after, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    length = cv2.magnitude(forward[..., 0], forward[..., 1])
    error = cv2.magnitude(forward[..., 0] + back[..., 0], forward[..., 1] + back[..., 1])
    gain = unmoved - cv2.blur(cv2.absdiff(before, moved).astype(np.float32), (7, 7))
    return np.where((error < 1 + 0.05 * length) & (gain > _VERIFIED_GAIN), length, np.float32(0))


def clear_start(frames: Sequence[FrameMeasure], *, within_seconds: float, min_seconds: float) -> int:
    """Index of the first frame that is nearly as sharp as the clip's median, so that a clip does not open in a blur.

    The variance of the Laplacian depends on content and size, so it ranks the frames of one clip and nothing else.
    """
    end = frames[-1].seconds
    candidates = [
        i
        for i, frame in enumerate(frames)
        if frame.seconds - frames[0].seconds <= within_seconds and (i == 0 or end - frame.seconds >= min_seconds)
    ]
    wanted = _LAPLACIAN_START_SHARE * float(np.median([frame.laplacian for frame in frames]))
    return next((i for i in candidates if frames[i].laplacian >= wanted), max(candidates, key=lambda i: frames[i].laplacian))


def score_clip(frames: Sequence[FrameMeasure], config: ScoreConfig) -> dict[str, float]:
    """All scores of a clip, rounded so that they read the same everywhere."""
    pairs = [frame for frame in frames if frame.motion_from >= frames[0].number]
    motion = np.average([pair.motion for pair in pairs], axis=0, weights=[pair.motion_seconds for pair in pairs]) if pairs else (0, 0)
    samples = _samples(frames, config.samples)
    grays = np.stack([cv2.cvtColor(_limited(bgr, config.flow_short_side), cv2.COLOR_BGR2GRAY) for bgr in samples])
    height, width = frames[0].height, frames[0].width
    scores = {
        "seconds": (frames[-1].seconds - frames[0].seconds) * len(frames) / max(len(frames) - 1, 1),
        "short_side": min(height, width),
        "blur": float(np.median([blur_of_sharpest_tile(bgr) for bgr in samples])),
        "motion_mean": motion[0],
        "motion_p95": motion[1],
        "border": border_share(grays.max(axis=0)),
        "text_heuristic": text_share(grays),
        "luma": float(np.mean([frame.luma for frame in frames])),
        "contrast": float(np.mean([cv2.meanStdDev(cv2.cvtColor(bgr, cv2.COLOR_BGR2YCrCb))[1].max() for bgr in samples])),
    }
    return {name: round(float(value), 5) for name, value in scores.items()}


def _samples(frames: Sequence[FrameMeasure], count: int) -> list[np.ndarray]:
    found = [frame.sample for frame in frames if frame.sample is not None] or [frames[len(frames) // 2].tiny]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)]


def _limited(picture: np.ndarray, short_side: int) -> np.ndarray:
    scale = short_side / min(picture.shape[:2])
    return picture if scale >= 1 else cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def blur_of_sharpest_tile(bgr: np.ndarray) -> float:
    """How blurred the strongest edges are, in the sharpest of 3 x 3 tiles: 0 is sharp, 1 is blurred.

    After Crete et al. 2007: what share of the difference between neighbours is still there after a further blur? Much of it in
    a picture that was blurred, little in a sharp one, in any light and contrast. Only the strongest edges of a tile are asked,
    since steps of one level (quantised gradients, noise) look sharp. The sharpest tile counts, for a soft background is no
    fault, and the sharpest of luma and the colour planes, since some edges differ in colour only. Without any edge it is 1.
    """
    planes = cv2.split(cv2.GaussianBlur(cv2.cvtColor(bgr, cv2.COLOR_BGR2YCrCb).astype(np.float32), (0, 0), 1.0))
    return min(_least_blur(plane) for plane in planes)


def _least_blur(plane: np.ndarray) -> float:
    rows, columns = (np.linspace(0, size, 4).astype(int) for size in plane.shape)
    soft = (cv2.blur(plane, (1, 9)), cv2.blur(plane, (9, 1)))
    changes = [(np.abs(np.diff(plane, axis=axis)), np.abs(np.diff(soft[axis], axis=axis))) for axis in (0, 1)]
    least = 1.0
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            tile = np.s_[top:bottom, left:right]
            blurs = [blur for sharp, soft in changes if (blur := _blur_of_edges(sharp[tile], soft[tile])) is not None]
            least = min(least, max(blurs, default=1.0))
    return least


def _blur_of_edges(sharp: np.ndarray, soft: np.ndarray) -> float | None:
    """Share of the strongest edges' height that remains, or None where the tile has no edge worth the name."""
    rank = max(4, sharp.size // 200)
    if sharp.size <= rank:
        return None
    strongest = float(np.partition(sharp, -rank, axis=None)[-rank])
    if strongest < _EDGE:
        return None
    edges = sharp >= 0.5 * strongest
    return float(np.minimum(sharp, soft)[edges].sum() / sharp[edges].sum())


def border_share(brightest: np.ndarray) -> float:
    """Share of the area that black borders take, from the brightest value each pixel has in the clip, [H, W].

    Borders come in equal pairs (above and below, left and right) and end in a step; a dark scene does neither.
    """
    inside = 1.0
    for axis, size in ((1, brightest.shape[0]), (0, brightest.shape[1])):
        profile = np.percentile(brightest, 98, axis=axis)
        dark = profile < 28
        if dark.all():
            return 0.0
        first, last = int(np.argmin(dark)), int(np.argmin(dark[::-1]))
        steps = min(profile[min(first + 1, size - 1)] - profile[max(first - 1, 0)], profile[-min(last + 2, size)] - profile[-max(last, 1)])
        if min(first, last) > 0 and abs(first - last) <= max(2, 0.25 * max(first, last)) and steps > 10:
            inside *= 1 - (first + last) / size
    return 1 - inside


def text_share(grays: np.ndarray) -> float:
    """Share of the area under standing lines of text, from grey pictures [N, H, W] of one clip: a heuristic.

    Edges that stay in place (20th percentile over time), joined sideways into lines, kept where many strokes cross a row.
    """
    short = min(grays.shape[1:])
    edges = np.stack([cv2.morphologyEx(gray, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) for gray in grays])
    rank = int(0.2 * (len(edges) - 1))
    strokes = (np.partition(edges, rank, axis=0)[rank] > 60).astype(np.uint8)
    joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, max(3, round(0.08 * short))), np.uint8))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined)
    area = 0
    for left, top, width, height, _ in boxes[1:count]:
        if 0.05 * short <= height <= 0.4 * short and width >= 2 * height:
            inner = strokes[top : top + height, left : left + width]
            crossings = np.count_nonzero(np.diff(inner, axis=1) == 1, axis=1)
            if np.percentile(crossings, 75) >= max(4, 0.9 * width / height) and 0.15 < inner.mean() < 0.95:
                area += int(width) * int(height)
    return area / grays[0].size


def embed(frames: Sequence[FrameMeasure]) -> np.ndarray:
    """How a clip looks and moves, as a unit vector: low frequencies of luma and colour at four moments.

    Luma is standardised and its mean left out, so that copies in another brightness, size or codec stay near. It finds near
    copies, not like subjects.
    """
    moments = [frames[round(share * (len(frames) - 1))].tiny for share in (0.05, 0.35, 0.65, 0.95)]
    parts = []
    for tiny in moments:
        luma, red, blue = cv2.split(cv2.cvtColor(tiny, cv2.COLOR_BGR2YCrCb).astype(np.float32))
        low = cv2.dct((luma - luma.mean()) / (luma.std() + 4))[:8, :8].ravel()[1:]
        colour = np.concatenate([cv2.dct((plane - 128) / 32)[:4, :4].ravel() for plane in (red, blue)])
        parts += [low, colour]
    vector = np.concatenate(parts)
    return vector / (np.linalg.norm(vector) + 1e-6)


def thumbnail(frames: Sequence[FrameMeasure]) -> bytes:
    """A JPEG of the clip's middle, with a short side of at most 96 pixels."""
    samples = _samples(frames, 3)
    small = _limited(samples[len(samples) // 2], 96)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One file after measuring: its content's name, how many frames it has, and its shots."""

    source: str
    sha256: str
    frames: int
    shots: tuple[Shot, ...]


def measure_file(folder: Path, source: str, *, sha256: str, split: SplitConfig, score: ScoreConfig) -> Measured:
    """Decodes a file once and measures every shot in it. Raises `MediaError` for a file that cannot be used."""
    path = folder / source
    fps = rate_of(path)
    splitter: ShotSplitter[FrameMeasure] = ShotSplitter(split, fps=fps)
    meter = FrameMeter(score)
    shots: list[tuple[int, Shot]] = []
    frames = 0
    for picture in pictures(path):
        frames += 1
        shots += [_shot(piece, source, sha256, fps, split, score) for piece in splitter.push(*meter.measure(picture))]
    shots += [_shot(piece, source, sha256, fps, split, score) for piece in splitter.finish()]
    return Measured(source=source, sha256=sha256, frames=frames, shots=tuple(_with_whole_shots(shots)))


def _shot(piece: Piece[FrameMeasure], source: str, sha256: str, fps: float, split: SplitConfig, score: ScoreConfig) -> tuple[int, Shot]:
    whole = piece.frames
    start = clear_start(whole, within_seconds=score.start_seconds, min_seconds=split.min_seconds)
    frames = whole[start:]
    elapsed = frames[-1].seconds - frames[0].seconds
    # A file with an uneven rate plays at the rate it really has here.
    actual = (len(frames) - 1) / elapsed if elapsed > 0 else fps
    fps = fps if abs(actual - fps) <= 0.03 * fps else round(actual, 3)
    shot = Shot(
        id=clip_id(sha256, first_pts=frames[0].pts, last_pts=frames[-1].pts),
        source=source,
        first_frame=frames[0].number,
        num_frames=len(frames),
        start_seconds=round(frames[0].seconds, 6),
        end_seconds=round(frames[-1].seconds + 1 / fps, 6),
        whole_shot=(whole[0].seconds, whole[-1].seconds + 1 / fps),
        fps=fps,
        height=frames[0].height,
        width=frames[0].width,
        scores=score_clip(frames, score),
        embedding=embed(whole).astype(np.float16).tobytes(),
        thumbnail=thumbnail(frames),
    )
    return piece.shot, shot


def _with_whole_shots(numbered: Sequence[tuple[int, Shot]]) -> Iterator[Shot]:
    """Gives each piece of a long shot the span of all of it, which is what a caption speaks of."""
    spans: dict[int, tuple[float, float]] = {}
    for number, shot in numbered:
        start, end = spans.get(number, shot.whole_shot)
        spans[number] = (min(start, shot.whole_shot[0]), max(end, shot.whole_shot[1]))
    for number, shot in numbered:
        yield dataclasses.replace(shot, whole_shot=spans[number])


class MeasureFile(beam.DoFn):
    """(source, sha256) -> `Measured`. Decoding fails by exception; the pipeline turns that into a dead letter."""

    def __init__(self, folder: str, work: str, *, split: SplitConfig, score: ScoreConfig) -> None:
        self._folder, self._work, self._split, self._score = Path(folder), Path(work), split, score
        self._milliseconds = beam.metrics.Metrics.distribution("curate", "measure_ms")

    def setup(self) -> None:
        # Beam runs one process a core; OpenCV's own threads would fight over them.
        cv2.setNumThreads(1)

    def process(self, element: tuple[str, str]) -> Iterator[Measured]:
        source, sha256 = element
        began = time.perf_counter()
        try:
            yield measure_file(self._folder, source, sha256=sha256, split=self._split, score=self._score)
        finally:
            mark_progress(self._work)
        self._milliseconds.update(round(1000 * (time.perf_counter() - began)))


def content_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
