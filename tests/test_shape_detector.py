"""The detector reads ground truth right, at the sizes it judges, and through blur and noise."""

import cv2
import numpy as np
import pytest

from data_prep.shapes_world import ALL_TRIPLES, ShotPlan, draw_shot, render_shot
from hunyuan_jax.shape_detector import COLOURS, DIRECTIONS, NOTHING, SHAPES, ShapeReading, detect_shape, draw_mask, outline, short_caption
from hunyuan_jax.video_io import encode_mp4, read_video

NUM_CLIPS = 162


def fit(frames: np.ndarray, *, size: int, length: int, stride: int) -> np.ndarray:
    return np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames[::stride][:length]])


@pytest.fixture(scope="module")
def clips() -> list[tuple[ShapeReading, np.ndarray]]:
    """Decoded mp4 shots under every camera, three of every four combinations."""
    triples = [ALL_TRIPLES[k] for k in np.random.default_rng(3).permutation(len(ALL_TRIPLES))[:NUM_CLIPS]]
    shots = [draw_shot(ShotPlan(number=k, triple=triple, dark=k % 2 == 0), 5) for k, triple in enumerate(triples)]
    return [(ShapeReading(*shot.triple), read_video(encode_mp4(render_shot(shot, 96), fps=12)).frames) for shot in shots]


def num_wrong(clips, make) -> int:
    return sum(detect_shape(make(frames)) != truth for truth, frames in clips)


@pytest.mark.parametrize(("size", "length", "stride"), [(64, 9, 2), (64, 17, 1), (32, 9, 2), (32, 9, 1), (96, 20, 1)])
def test_clean_clips_are_read_right(clips, size, length, stride):
    assert num_wrong(clips, lambda frames: fit(frames, size=size, length=length, stride=stride)) <= 0.01 * NUM_CLIPS


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 25.0), (0.03, 0.0), (0.05, 12.0)])
def test_blurred_and_noisy_clips_are_read_right(clips, blur, noise):
    rng = np.random.default_rng(0)

    def spoil(frames):
        clean = fit(frames, size=32, length=9, stride=2)
        soft = np.stack([cv2.GaussianBlur(frame, (0, 0), blur * 32) for frame in clean]) if blur else clean
        return np.clip(soft + rng.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)

    assert num_wrong(clips, spoil) <= 0.02 * NUM_CLIPS


def test_mirrored_clips_are_read_mirrored(clips):
    opposite = {"left": "right", "right": "left"}
    for truth, frames in clips[:40]:
        reading = detect_shape(np.ascontiguousarray(fit(frames, size=32, length=9, stride=2)[:, :, ::-1]))
        assert reading.direction == " ".join(opposite.get(word, word) for word in truth.direction.split())
        assert (reading.colour, reading.shape) == (truth.colour, truth.shape)


def test_a_clip_played_backwards_moves_the_other_way(clips):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for truth, frames in clips[:40]:
        reading = detect_shape(np.ascontiguousarray(fit(frames, size=64, length=9, stride=2)[::-1]))
        assert reading.direction == " ".join(opposite.get(word, word) for word in truth.direction.split())


def test_one_lost_frame_changes_nothing(clips):
    for truth, frames in clips[:40]:
        clip = fit(frames, size=32, length=9, stride=2)
        clip[4] = 128
        assert detect_shape(clip) == truth


@pytest.mark.parametrize("level", [0, 128, 255])
def test_frames_without_colour_show_nothing(level):
    assert detect_shape(np.full((9, 32, 32, 3), level, np.uint8)) == ShapeReading(NOTHING, NOTHING, NOTHING)


def test_noise_alone_is_read_without_failing():
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    assert detect_shape(frames).shape in (*SHAPES, NOTHING)


@pytest.mark.parametrize(
    "frames", [np.zeros((9, 32, 32), np.uint8), np.zeros((9, 32, 32, 3), np.float32), np.zeros((0, 32, 32, 3), np.uint8)]
)
def test_other_arrays_are_refused(frames):
    with pytest.raises(ValueError, match="uint8"):
        detect_shape(frames)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_turn_around_their_centre_of_mass(shape):
    mask = draw_mask(shape, centre=(40.5, 24.25), diameter=30.0, size=(60, 80))
    x, y = np.arange(80) + 0.5, np.arange(60) + 0.5
    assert mask.sum(axis=0) @ x / mask.sum() == pytest.approx(40.5, abs=0.1)
    assert mask.sum(axis=1) @ y / mask.sum() == pytest.approx(24.25, abs=0.1)
    assert np.ptp(outline(shape), axis=0).max() == pytest.approx(1.0, abs=0.15)


def test_directions_are_unit_vectors_with_y_down():
    for name, vector in DIRECTIONS.items():
        assert np.hypot(*vector) == pytest.approx(0.0 if name == "standing" else 1.0)
    assert DIRECTIONS["up"][1] < 0 < DIRECTIONS["right"][0]


def test_captions_are_short_and_all_different():
    captions = {short_caption(*triple) for triple in ALL_TRIPLES}
    assert len(captions) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) == 216
    assert max(map(len, captions)) <= 40
    assert {"a red circle moving up left", "a red circle standing still"} <= captions
