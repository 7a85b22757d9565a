"""From a video file to single shots: one pass of decoding, cuts by PySceneDetect, long shots cut into pieces.

    file --pictures--> Picture, Picture, ... --ShotSplitter--> Piece (a run of frames within one shot)

Everything streams: memory holds the pieces that are open, never the file. A `Shot` is what a piece becomes once it is scored;
it is the element that travels through the rest of the pipeline, and it carries numbers and a thumbnail, never frames.

Files are not trusted: only real containers are opened (no playlists, which name other files or addresses), and whatever is
wrong with one is a `MediaError`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from scenedetect import AdaptiveDetector, FrameTimecode

from hunyuan_jax.video_io import MAX_SIDE, TOLERATED_LOSS, MediaError

VERSION = 1  # of what the job computes: a change makes other clip ids and asks for a new output folder
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,h264,hevc,ivf,m4v,mxf,nut"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Where a file is cut. The detector's values are those that were best on average in PySceneDetect's own benchmark."""

    adaptive_threshold: float  # a cut changes this many times as much as the frames around it
    min_content: float  # and at least this much (mean of hue, saturation and luma, 0 to 255)
    window_frames: int  # frames on each side that a cut is compared with
    min_shot_seconds: float  # two cuts are never closer than this
    min_seconds: float  # no piece of a long shot is shorter
    max_seconds: float  # longer shots are cut into pieces of this length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """A span of one file, from its clear start frame on, and what is known about it so far."""

    id: str
    source: str  # relative to the input folder
    first_frame: int  # counted over the decoded frames of the file
    num_frames: int
    start_seconds: float
    end_seconds: float
    whole_shot: tuple[float, float]  # seconds of the uncut shot this was cut from
    fps: float
    height: int
    width: int
    scores: dict[str, float]
    embedding: bytes  # float16, unit length
    thumbnail: bytes  # JPEG
    caption: dict[str, str] = dataclasses.field(default_factory=dict)
    camera: str = ""
    failed: tuple[str, ...] = ()
    duplicate_of: str = ""


class Timed(Protocol):
    """Anything that stands for one frame: what `ShotSplitter` sorts into pieces."""

    @property
    def seconds(self) -> float: ...


F = TypeVar("F", bound=Timed)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One decoded frame. `number` counts from 0; `seconds` counts from the file's first frame."""

    number: int
    pts: int
    seconds: float
    frame: av.VideoFrame
    scalers: dict[tuple[int, str], VideoReformatter]  # of the file: making one takes longer than using it

    def scaled(self, short_side: int, *, layout: str) -> np.ndarray:
        """The picture, upright, as uint8 [H, W, 3] or [H, W] ("gray"), made smaller where its short side is longer."""
        width, height = self.frame.width, self.frame.height
        scale = min(1.0, short_side / min(width, height))
        size = {"width": max(1, round(width * scale)), "height": max(1, round(height * scale))}
        scaler = self.scalers.setdefault((short_side, layout), VideoReformatter())
        array = scaler.reformat(self.frame, format=layout, interpolation="AREA", threads=1, **size).to_ndarray()
        return np.ascontiguousarray(np.rot90(array, round(self.frame.rotation / 90) % 4))


def clip_id(content_sha256: str, *, first_pts: int, last_pts: int) -> str:
    """The name of a span of a file's content: the same wherever the file lies and whenever it is read."""
    return hashlib.sha256(f"{content_sha256}/{first_pts}/{last_pts}/{VERSION}".encode()).hexdigest()[:32]


def rate_of(path: Path) -> float:
    """Frames per second the file declares. Raises `MediaError`."""
    with _opened(path) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
        if not rate or not 0 < rate <= 1000:
            raise MediaError(f"It declares a rate of {rate} frames per second; more than 0 and at most 1000 were expected.")
        return float(rate)


def pictures(path: Path) -> Iterator[Picture]:
    """Every frame of the first video stream in order of display, on one thread.

    Raises `MediaError` on opening what is no video, and at the end for a file that is cut off or damaged.
    """
    with _opened(path) as container:
        stream = _video_stream(container)
        packets, broken, number, first, last_end, size = 0, 0, 0, None, None, None
        scalers: dict[tuple[int, str], VideoReformatter] = {}
        for packet in _packets(container, stream):
            packets += 1
            try:
                decoded = stream.codec_context.decode(packet if packet.size else None)
            except av.FFmpegError:
                broken += 1
                continue
            for frame in decoded:
                if size is not None and (frame.width, frame.height) != size:
                    raise MediaError(f"Its frame size changes after {number} frames. Convert it to one size first.")
                size = _checked_size(frame.width, frame.height)
                pts = number if frame.pts is None else frame.pts
                first = pts if first is None else first
                last_end = pts + (frame.duration or 0)
                yield Picture(number, pts, float((pts - first) * (stream.time_base or 0)), frame, scalers)
                number += 1
        if not number:
            raise MediaError("No frame of it decodes: it is empty, cut off or damaged.")
        if broken > TOLERATED_LOSS * packets:
            raise MediaError(f"It is damaged: {broken} of its {packets} packets do not decode.")
        _check_whole(stream, (last_end or 0) - (first or 0), number)


def _opened(path: Path) -> av.container.InputContainer:
    try:
        return av.open(str(path), options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"It is no video file that can be read, or it is cut off ({error.strerror}).") from error


def _video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams or streams[0].codec_context is None:
        raise MediaError("It has no video stream in a known codec.")
    stream = streams[0]
    _checked_size(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.thread_count = 1
    return stream


def _checked_size(width: int, height: int) -> tuple[int, int]:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"It is {width} x {height} pixels; between 1 and {MAX_SIDE} a side were expected.")
    return width, height


def _packets(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[av.Packet]:
    """Packets up to the end, or to where the container breaks, and the empty one that drains the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.FFmpegError:
        pass  # What is missing shows in the duration that decodes.
    yield av.Packet()


def _check_whole(stream: av.video.stream.VideoStream, present_pts: int, number: int) -> None:
    """Containers round their durations, so a loss of two frames or 5 % is accepted; more means the file is cut off."""
    if not stream.duration or not stream.time_base:
        return
    frame_pts = stream.duration / max(stream.frames or number, 1)
    if stream.duration - present_pts > max(TOLERATED_LOSS * stream.duration, 2 * frame_pts):
        declared, present = (float(pts * stream.time_base) for pts in (stream.duration, present_pts))
        raise MediaError(f"It is cut off: it declares {declared:.2f} s of video but only {present:.2f} s decode.")


@dataclasses.dataclass(frozen=True)
class Piece(Generic[F]):
    """Consecutive frames of shot number `shot`."""

    shot: int
    frames: list[F]


class ShotSplitter(Generic[F]):
    """Sorts a stream of frames into pieces: no piece crosses a cut, none is much longer than `max_seconds`.

    A long shot gives pieces of `max_seconds`; where the rest would be shorter than `min_seconds`, its last two are halves.
    """

    def __init__(self, config: SplitConfig, *, fps: float) -> None:
        self._config, self._fps = config, fps
        self._detector = AdaptiveDetector(
            adaptive_threshold=config.adaptive_threshold,
            min_content_val=config.min_content,
            window_width=config.window_frames,
            min_scene_len=max(1, round(config.min_shot_seconds * fps)),
        )
        self._number = 0
        self._shot = 0
        self._open: list[F] = []

    def push(self, frame: F, bgr: np.ndarray) -> list[Piece[F]]:
        """Takes the next frame and its small BGR picture; returns the pieces that are complete now."""
        cuts = self._detector.process_frame(FrameTimecode(self._number, self._fps), bgr)
        self._open.append(frame)
        self._number += 1
        done: list[Piece[F]] = []
        for cut in cuts:
            keep = self._number - cut.frame_num
            done += self._close(len(self._open) - keep)
            self._shot += 1
        # Frames younger than the detector's window may still turn out to lie behind a cut.
        settled = self._open[: len(self._open) - self._config.window_frames - 1]
        if settled and settled[-1].seconds - settled[0].seconds >= self._config.max_seconds + self._config.min_seconds:
            done.append(self._take(_count_within(self._open, self._config.max_seconds)))
        return done

    def finish(self) -> list[Piece[F]]:
        """The pieces still open at the end of the file."""
        return self._close(len(self._open))

    def _close(self, count: int) -> list[Piece[F]]:
        seconds = self._open[count - 1].seconds - self._open[0].seconds if count else 0.0
        if seconds > self._config.max_seconds:
            return [self._take(count // 2), self._take(count - count // 2)]
        return [self._take(count)] if count else []

    def _take(self, count: int) -> Piece[F]:
        piece = Piece(self._shot, self._open[:count])
        self._open = self._open[count:]
        return piece


def _count_within(frames: list[F], seconds: float) -> int:
    return sum(frame.seconds - frames[0].seconds < seconds for frame in frames)
