"""Frames to and from video files, with PyAV: H.264 mp4 out, anything FFmpeg can demux in.

    file or bytes --read_video--> Video(frames, fps) --encode_mp4--> bytes --write_video--> file, whole or not at all

Files that are read are not trusted. They are opened as plain streams, by demuxers that follow no references to other files or
addresses, and limits on size stop them before memory does. Whatever is wrong with one is a `MediaError`.

What is read: the first video stream (cover pictures aside), every frame in order of display. Rotation flags are ignored:
frames come as stored. Variable frame rates come as stored too, with the average rate as `fps`.

When a file counts as truncated: when its container declares an end which the last frame that decodes misses by more than two
frames and more than 5 % of the duration, or when more than 5 % of its packets do not decode. A smaller loss is accepted, since
containers round their durations. A file whose container declares no duration can only fail if nothing decodes.
"""

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from hunyuan_jax.errors import UserError

MAX_SIDE = 16384  # pixels
MAX_BYTES = 8 * 2**30  # of decoded frames in one call
TOLERATED_LOSS = 0.05  # of the duration or of the packets
# Demuxers of real containers. Playlists (hls, concat, dash) are left out: they would open what an untrusted file names.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,h264,hevc,ivf,m4v,mxf,nut,rm,dv"


class MediaError(UserError):
    """A video file that cannot be used, and why."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded video: `frames` uint8 [T, H, W, 3] in RGB, at `fps` frames per second."""

    frames: np.ndarray
    fps: float


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[av.container.InputContainer]:
    """The demuxed container; everything FFmpeg dislikes inside the block becomes a `MediaError`."""
    with contextlib.ExitStack() as stack:
        try:
            stream = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(Path(source).open("rb"))
            container = av.open(
                stream, "r", metadata_errors="replace", options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
            )
            yield stack.enter_context(container)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise MediaError(f"A video file was expected at {name}, but it cannot be opened ({error.strerror}).") from error
        except av.FFmpegError as error:
            raise MediaError(f"{name} is no video file that can be read, or it is cut off ({error.strerror}).") from error


def _first_video_stream(container: av.container.InputContainer, name: str) -> av.video.stream.VideoStream:
    """The first video stream that is no cover picture, with its size checked and its decoder set to one thread."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise MediaError(f"{name} has no video stream. Only files with pictures that move can be used.")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{name} holds video in a codec that is not known here. Convert it to H.264 first.")
    _check_size(stream.codec_context.width, stream.codec_context.height, name)
    stream.codec_context.thread_count = 1
    return stream


def _check_size(width: int, height: int, name: str) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"{name} is {width} x {height} pixels; between 1 and {MAX_SIDE} a side were expected.")


@dataclasses.dataclass
class _Decoding:
    """What decoding one stream gave so far: pictures, and the evidence of whether all of it was there."""

    pictures: list[np.ndarray]
    first_pts: int | None = None
    end_pts: int | None = None  # end of the last picture, in the stream's time base
    packets: int = 0  # the empty one at the end apart
    broken_packets: int = 0  # the empty one at the end apart
    finished: bool = False  # False while packets may be left


def _packets(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[av.Packet]:
    """Packets up to the end or to where the container breaks, then the empty packet that drains the decoder."""
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    yield av.Packet()


def _decode(container: av.container.InputContainer, stream: av.video.stream.VideoStream, name: str, limit: int | None) -> _Decoding:
    """Decodes up to `limit` pictures. A packet that does not decode is counted and skipped."""
    seen = _Decoding(pictures=[])
    to_rgb = av.video.reformatter.VideoReformatter()  # making one, or threads for it, costs more than a picture
    size = 0
    for packet in _packets(container, stream):
        seen.packets += bool(packet.size)
        try:
            decoded = stream.codec_context.decode(packet if packet.size else None)
        except av.FFmpegError:
            seen.broken_packets += 1
            continue
        for frame in decoded:
            if limit is not None and len(seen.pictures) >= limit:
                return seen
            _check_size(frame.width, frame.height, name)
            size += frame.width * frame.height * 3
            if size > MAX_BYTES:
                raise MediaError(f"{name} decodes to more than {MAX_BYTES / 2**30:.0f} GiB of frames. Cut it, or read fewer frames.")
            if seen.pictures and seen.pictures[0].shape[:2] != (frame.height, frame.width):
                raise MediaError(f"{name} changes its frame size after {len(seen.pictures)} frames. Convert it to one size first.")
            seen.pictures.append(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
            _note_times(seen, frame)
    seen.finished = True
    return seen


def _note_times(seen: _Decoding, frame: av.VideoFrame) -> None:
    if frame.pts is None:
        return
    seen.first_pts = frame.pts if seen.first_pts is None else seen.first_pts
    seen.end_pts = frame.pts + (frame.duration or 0)


def _declared_seconds(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> float | None:
    """How long the video stream says it is. The whole container is asked only where no sound could outlast the pictures."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _check_whole(seen: _Decoding, declared: float | None, stream: av.video.stream.VideoStream, fps: float, name: str) -> None:
    """Raises `MediaError` for a truncated or damaged stream, by the rule in this file's docstring."""
    if declared is not None and seen.first_pts is not None and seen.end_pts is not None and stream.time_base:
        # Times begin at the first picture: what lies before it was never meant to be shown.
        present = float((seen.end_pts - seen.first_pts) * stream.time_base)
        if declared - present > max(TOLERATED_LOSS * declared, 2 / fps):
            raise MediaError(f"{name} is truncated: it declares {declared:.2f} s of video but only {present:.2f} s decode.")
    if seen.broken_packets > TOLERATED_LOSS * seen.packets:
        raise MediaError(f"{name} is damaged: {seen.broken_packets} of its {seen.packets} packets do not decode.")


def _rate(stream: av.video.stream.VideoStream, name: str) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not rate or not 0 < rate <= 1000:
        raise MediaError(f"{name} declares a rate of {rate} frames per second; more than 0 and at most 1000 were expected.")
    return float(rate)


def read_video(source: str | Path | bytes, *, max_frames: int | None = None) -> Video:
    """Decodes the first video stream of a file, or of a file's bytes, from its beginning.

    `max_frames` stops early; what lies behind it is not looked at. The same bytes give the same frames (one thread).
    Raises `MediaError` for what cannot be opened, is no video, has no frames, is too large, damaged or truncated.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, not {max_frames}.")
    name = f"The video of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    with _opened(source, name) as container:
        stream = _first_video_stream(container, name)
        seen = _decode(container, stream, name, max_frames)
        if not seen.pictures:
            raise MediaError(f"{name} has no frame that decodes: it is empty, truncated or damaged.")
        fps = _rate(stream, name)
        if seen.finished:
            _check_whole(seen, _declared_seconds(container, stream), stream, fps, name)
    return Video(np.stack(seen.pictures), fps)


def encode_mp4(frames: np.ndarray, *, fps: float, crf: int = 18) -> bytes:
    """Encodes uint8 RGB `frames` [T, H, W, 3] as H.264 in mp4 (yuv420p, BT.601, index first so that it streams).

    4:2:0 needs even sides: an odd one is padded by repeating its last row or column. One thread, no clock and no version
    strings of ours go in, so equal frames give equal bytes.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"Frames must be uint8 [T, H, W, 3] and not empty, not {frames.dtype} {frames.shape}.")
    _, height, width, _ = frames.shape
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # Moving the index to the front makes the muxer read its output again, which needs a real file.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with av.open(path, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
            _mux(container, padded, Fraction(fps).limit_denominator(65535), crf)
        return path.read_bytes()


def _mux(container: av.container.OutputContainer, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    # Macroblock-tree rate control is off: on processors with AVX-512 x264 reads memory there that it never wrote, and equal
    # frames then give different bytes from one call to the next.
    options = {"crf": str(crf), "preset": "fast", "mbtree": "0", "threads": "1", "flags": "+bitexact"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    for name in ("color_primaries", "color_trc", "colorspace"):
        setattr(stream.codec_context, name, 6)  # SMPTE 170M, the matrix of the conversion below: players then show equal colours.
    stream.codec_context.color_range = 1
    for index, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_video(path: str | Path, frames: np.ndarray, *, fps: float, crf: int = 18) -> None:
    """Writes `frames` (see `encode_mp4`) to `path`, whole or not at all."""
    path = Path(path)
    data = encode_mp4(frames, fps=fps, crf=crf)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
