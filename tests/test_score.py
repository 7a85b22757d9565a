"""Laws of the parts of curation: splitting, scores, near-duplicates and captions."""

import dataclasses
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import curation
from data_prep import caption, curate, dedup
from data_prep.score import (
    FrameMeasure,
    blur_of_sharpest_tile,
    border_share,
    clear_start,
    embed,
    measure_file,
    text_share,
    verified_motion,
)
from data_prep.split import ShotSplitter, pictures
from hunyuan_jax.video_io import MediaError, encode_mp4

SETTINGS = curate.as_settings(curation.get_config())


def texture(seed: int, size: int = 96) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (size, size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return cv2.normalize(smooth, None, 20, 235, cv2.NORM_MINMAX).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Moment:
    seconds: float


def split(flags: list[int], fps: float = 12.0) -> list[tuple[int, int]]:
    """(shot, frames) of each piece of a stream whose picture is texture number `flags[i]`."""
    splitter: ShotSplitter[Moment] = ShotSplitter(SETTINGS.split, fps=fps)
    shades = {flag: texture(flag, 48) for flag in set(flags)}
    pieces = [piece for i, flag in enumerate(flags) for piece in splitter.push(Moment(i / fps), shades[flag])] + splitter.finish()
    return [(piece.shot, len(piece.frames)) for piece in pieces]


def test_pieces_end_exactly_at_cuts() -> None:
    assert split([1] * 20 + [2] * 25 + [3] * 30) == [(0, 20), (1, 25), (2, 30)]


@pytest.mark.parametrize("frames", [119, 121, 125, 130, 200, 250, 500])
def test_long_shots_are_cut_into_pieces_within_the_limits_and_no_frame_is_lost(frames: int) -> None:
    pieces = split([1] * frames)
    assert {shot for shot, _ in pieces} == {0}
    assert sum(count for _, count in pieces) == frames
    assert all(12 <= count <= 121 for _, count in pieces)


def test_a_moved_texture_has_its_true_motion_and_a_still_one_has_none() -> None:
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    flow.setFinestScale(1)
    gray = cv2.cvtColor(texture(0), cv2.COLOR_BGR2GRAY)
    moved = verified_motion(flow, gray[:, 8:88].copy(), gray[:, 5:85].copy())
    assert np.median(moved[moved > 0]) == pytest.approx(3, abs=0.1)
    assert (moved > 0).mean() > 0.8
    noisy = np.clip(gray + np.random.default_rng(1).normal(0, 1, gray.shape), 0, 255).astype(np.uint8)
    assert not verified_motion(flow, gray, noisy).any()
    flat = [np.random.default_rng(seed).normal(120, 4, (96, 96)).astype(np.uint8) for seed in (1, 2)]
    assert (verified_motion(flow, *flat) > 0).mean() < 0.05


def test_blur_grows_with_blurring_and_hardly_with_light() -> None:
    squares = np.kron(np.random.default_rng(0).integers(0, 255, (6, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    scores = [blur_of_sharpest_tile(cv2.GaussianBlur(squares, (0, 0), sigma) if sigma else squares) for sigma in (0, 1, 2, 4)]
    assert scores == sorted(scores)
    assert scores[0] < 0.4 < SETTINGS.filter.max_blur < scores[-1]
    assert blur_of_sharpest_tile((squares * 0.4).astype(np.uint8)) == pytest.approx(scores[0], abs=0.05)


def test_an_edge_in_colour_alone_is_an_edge() -> None:
    ycrcb = np.full((96, 96, 3), 128, np.uint8)
    ycrcb[30:70, 30:70, 1] = 190
    assert blur_of_sharpest_tile(cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2BGR)) < 0.5


@pytest.mark.parametrize(("top", "left"), [(0, 0), (10, 0), (0, 12), (8, 6)])
def test_border_share_is_the_share_of_the_borders(top: int, left: int) -> None:
    gray = np.zeros((96, 128), np.uint8)
    gray[top : 96 - top, left : 128 - left] = 120
    assert border_share(gray) == pytest.approx(1 - (96 - 2 * top) * (128 - 2 * left) / (96 * 128))


def test_darkness_without_two_equal_borders_is_no_border() -> None:
    gray = np.full((96, 96), 120, np.uint8)
    gray[:30] = 5
    assert border_share(gray) == 0
    gray[-4:] = 5
    assert border_share(gray) == 0
    assert border_share(np.full((96, 96), 3, np.uint8)) == 0


def test_large_letters_are_text_and_shapes_are_not() -> None:
    plain = np.full((4, 96, 96), 90, np.uint8)
    shapes, letters = plain.copy(), plain.copy()
    for picture in shapes:
        cv2.circle(picture, (48, 48), 20, 220, -1)
    for picture in letters:
        cv2.putText(picture, "SALE", (6, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.2, 255, 3)
    assert text_share(shapes) == 0
    assert text_share(letters) > SETTINGS.filter.max_text


def frame(number: int, *, sharp: float = 100.0, tiny: np.ndarray | None = None) -> FrameMeasure:
    tiny = np.zeros((32, 32, 3), np.uint8) if tiny is None else tiny
    return FrameMeasure(number, number, number / 10, 96, 96, laplacian=sharp, luma=1.0, tiny=tiny)


def test_a_clip_starts_at_the_first_frame_that_is_clear() -> None:
    def start(sharp: list[float], min_seconds: float = 0.0) -> int:
        return clear_start([frame(i, sharp=s) for i, s in enumerate(sharp)], within_seconds=0.5, min_seconds=min_seconds)

    assert start([100] * 20) == 0
    assert start([10, 40, 81, 100] + [100] * 16) == 2
    assert start([10, 20, 30, 40, 50, 60] + [100] * 14) == 5, "the sharpest one, where none is clear in time"
    assert start([10, 40, 81, 100] + [100] * 8, min_seconds=1.1) == 0, "a clip is not made too short"


def test_copies_in_another_brightness_and_size_stay_near_and_other_clips_do_not() -> None:
    def clip(seed: int, gain: float = 1.0) -> np.ndarray:
        small = cv2.resize(texture(seed), (32, 32), interpolation=cv2.INTER_AREA)
        return embed([frame(i, tiny=np.clip(np.roll(small, i, 1) * gain, 0, 255).astype(np.uint8)) for i in range(12)])

    assert clip(1) @ clip(1, gain=0.95) > SETTINGS.dedup.similarity
    assert clip(1) @ clip(2) < 0.9
    assert np.linalg.norm(clip(1)) == pytest.approx(1, abs=1e-4)


def test_of_near_copies_the_best_stays_in_any_order() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 64))
    vectors = {"a": one, "b": one + 0.01 * other, "c": one - 0.01 * other, "d": other}
    packed = {name: (v / np.linalg.norm(v)).astype(np.float16).tobytes() for name, v in vectors.items()}
    points = [((1, -96.0, blur, name), packed[name]) for name, blur in (("a", 0.3), ("b", 0.2), ("c", 0.4), ("d", 0.1))]
    for order in itertools.permutations(points):
        assert {worse for worse, _ in dedup.near_copies(list(order), 0.99)} == {"a", "c"}
    old = dedup.kept_point("c", packed["c"])
    assert {worse for worse, _ in dedup.near_copies([*points[:2], points[3], old], 0.99)} == {"a", "b"}, "what is kept stays"
    assert not list(dedup.near_copies([old, dedup.kept_point("a", packed["a"])], 0.99)), "whatever else is kept"


def test_clips_at_the_threshold_are_nearly_always_compared() -> None:
    config = SETTINGS.dedup
    assert dedup.expected_recall(config, config.similarity) > 0.999
    rng = np.random.default_rng(0)
    planes = rng.standard_normal((config.bands * config.band_bits, 64))
    met = 0
    for _ in range(300):
        one, other = np.linalg.qr(rng.standard_normal((64, 2)))[0].T
        near = config.similarity * one + np.sqrt(1 - config.similarity**2) * other
        keys = [set(dedup.bands_of(v.astype(np.float16).tobytes(), planes, config.bands)) for v in (one, near)]
        met += bool(keys[0] & keys[1])
    assert met >= 299


def test_a_caption_is_taken_only_where_the_spans_agree() -> None:
    assert caption.overlap((0, 2), (0, 2)) == 1
    assert caption.overlap((0, 2), (1, 3)) == pytest.approx(1 / 3)
    assert caption.overlap((0, 1), (1, 2)) == 0


def test_cut_off_and_empty_files_are_media_errors(tmp_path: Path) -> None:
    whole = encode_mp4(np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3)).astype(np.uint8), fps=12)
    for name, data in (("half", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello " * 100)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError):
            list(pictures(tmp_path / name))
    (tmp_path / "whole").write_bytes(whole)
    assert [picture.number for picture in pictures(tmp_path / "whole")] == list(range(30))


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real.mp4").write_bytes(encode_mp4(np.zeros((30, 64, 64, 3), np.uint8), fps=12))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.5,\nreal.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "hls.mp4"):
        with pytest.raises(MediaError):
            list(pictures(tmp_path / name))


def test_a_file_with_odd_sides_and_no_motion_is_measured(tmp_path: Path) -> None:
    (tmp_path / "one.mp4").write_bytes(encode_mp4(np.full((3, 65, 67, 3), 90, np.uint8), fps=12))
    measured = measure_file(tmp_path, "one.mp4", sha256="0", split=SETTINGS.split, score=SETTINGS.score)
    (shot,) = measured.shots
    assert (measured.frames, shot.num_frames, shot.scores["motion_mean"], shot.scores["blur"]) == (3, 3, 0, 1)
