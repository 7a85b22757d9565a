"""What is written is read back, and whatever is wrong with a file ends in one clear `MediaError`."""

import io
import os
import subprocess
import sys

import av
import numpy as np
import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.video_io import MAX_SIDE, MediaError, encode_mp4, read_video, write_video


def moving_square(*, num_frames: int = 24, height: int = 48, width: int = 64) -> np.ndarray:
    frames = np.full((num_frames, height, width, 3), (60, 70, 90), np.uint8)
    for index, frame in enumerate(frames):
        frame[10:30, index : index + 20] = (220, 60, 40)
    return frames


def mux(write_streams) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        write_streams(container)
    return file.getvalue()


def add_video(container, *, codec: str, frames: np.ndarray, rate: int = 12) -> None:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    for picture in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


@pytest.mark.parametrize("fps", [12, 23.976, 30000 / 1001])
def test_frames_and_rate_survive_the_round_trip(fps):
    frames = moving_square()
    video = read_video(encode_mp4(frames, fps=fps, crf=1))
    assert video.frames.shape == frames.shape
    assert video.frames.dtype == np.uint8
    assert video.fps == pytest.approx(fps, rel=1e-4)
    flat = np.s_[:, 34:, :, :]  # Away from edges, where 4:2:0 keeps less colour.
    assert np.abs(video.frames[flat].astype(int) - frames[flat]).max() <= 3
    assert np.abs(video.frames.astype(int) - frames).mean() < 3


def test_colours_are_not_shifted_by_a_wrong_matrix():
    for colour in [(230, 40, 45), (45, 180, 60), (60, 85, 250)]:
        frames = np.full((3, 32, 32, 3), colour, np.uint8)
        decoded = read_video(encode_mp4(frames, fps=12, crf=1)).frames
        assert np.abs(decoded.astype(int) - frames).max() <= 4


def test_equal_frames_give_equal_bytes_with_the_index_first():
    data = encode_mp4(moving_square(), fps=12)
    assert data == encode_mp4(moving_square(), fps=12)
    assert data.find(b"moov") < data.find(b"mdat")


def test_bytes_do_not_depend_on_what_memory_held_before():
    """x264 with its usual settings reads memory it never wrote; glibc fills memory with a given byte on request."""
    code = (
        "import hashlib, numpy as np; from hunyuan_jax.video_io import encode_mp4;"
        "from data_prep.shapes_world import World, draw_shot, plan_world, render_shot;"
        "shots = [draw_shot(plan, 0) for file in plan_world(World(clips=20))[:2] for plan in file.shots];"
        "data = encode_mp4(np.concatenate([render_shot(shot, 96) for shot in shots]), fps=12);"
        "print(hashlib.sha256(data).hexdigest())"
    )
    hashes = set()
    for fill in ("1", "77", "171"):
        environment = os.environ | {"MALLOC_PERTURB_": fill}
        hashes.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(hashes) == 1


def test_odd_sides_are_padded_by_repeating_the_edge():
    frames = moving_square(height=33, width=47)
    decoded = read_video(encode_mp4(frames, fps=12, crf=1)).frames
    assert decoded.shape == (24, 34, 48, 3)
    assert np.abs(decoded[:, 33].astype(int) - decoded[:, 32]).max() <= 8


def test_one_frame_is_a_video():
    assert read_video(encode_mp4(moving_square(num_frames=1), fps=12)).frames.shape[0] == 1


def test_max_frames_gives_the_beginning():
    data = encode_mp4(moving_square(), fps=12)
    assert np.array_equal(read_video(data, max_frames=5).frames, read_video(data).frames[:5])
    assert len(read_video(data, max_frames=1000).frames) == 24


def test_path_and_bytes_read_the_same(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(), fps=12)
    data = (tmp_path / "a.mp4").read_bytes()
    assert np.array_equal(read_video(tmp_path / "a.mp4").frames, read_video(data).frames)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", moving_square().astype(np.float32), fps=12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8])
def test_a_truncated_file_is_recognised(share):
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    data = encode_mp4(noise, fps=12)
    with pytest.raises(MediaError, match=r"truncated|cut off"):
        read_video(data[: int(len(data) * share)])


def test_a_truncated_file_can_still_give_its_beginning():
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    data = encode_mp4(noise, fps=12)
    assert len(read_video(data[: len(data) * 6 // 10], max_frames=4).frames) == 4


def test_damaged_content_is_an_error_or_frames_and_never_a_crash():
    data = bytearray(encode_mp4(moving_square(), fps=12))
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 12):
            damaged[place] = rng.integers(256)
        try:
            frames = read_video(bytes(damaged)).frames
        except MediaError:
            continue
        assert frames.dtype == np.uint8


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("data", [b"", b"plain text\n" * 100, b"\0" * 4096, PLAYLIST, b"ffconcat version 1.0\nfile a.mp4\n"])
def test_what_is_no_video_is_a_media_error(data):
    with pytest.raises(MediaError, match="no video file"):
        read_video(data)


def test_a_missing_file_and_a_folder_are_media_errors(tmp_path):
    for path in (tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(MediaError, match="cannot be opened"):
            read_video(path)


def test_sound_alone_is_no_video():
    def write(container):
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))

    with pytest.raises(MediaError, match="no video stream"):
        read_video(mux(write))


def test_the_first_of_several_video_streams_is_taken():
    def write(container):
        streams = []
        for size in (32, 64):
            stream = container.add_stream("mpeg4", rate=12)
            stream.height = stream.width = size
            stream.pix_fmt = "yuv420p"
            streams.append((stream, size))
        for stream, size in streams:
            for _ in range(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode(None))

    assert read_video(mux(write)).frames.shape == (5, 32, 32, 3)


def test_a_file_without_frames_is_a_media_error():
    def write(container):
        stream = container.add_stream("mpeg4", rate=12)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()

    with pytest.raises(MediaError, match=r"no frame|no video"):
        read_video(mux(write))


def test_a_frame_beyond_the_limit_is_refused():
    width = MAX_SIDE + 2
    data = mux(lambda container: add_video(container, codec="ffv1", frames=np.zeros((1, 2, width, 3), np.uint8)))
    with pytest.raises(MediaError, match=str(width)):
        read_video(data)


def test_more_frames_than_memory_allows_are_refused(monkeypatch):
    monkeypatch.setattr("hunyuan_jax.video_io.MAX_BYTES", 10 * 48 * 64 * 3)
    data = encode_mp4(moving_square(), fps=12)
    with pytest.raises(MediaError, match="more than"):
        read_video(data)
    assert len(read_video(data, max_frames=10).frames) == 10


def test_other_containers_are_read():
    data = mux(lambda container: add_video(container, codec="libvpx-vp9", frames=moving_square()))
    assert read_video(data).frames.shape == (24, 48, 64, 3)


def test_a_media_error_is_a_user_error():
    assert issubclass(MediaError, UserError)
