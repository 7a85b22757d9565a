"""The moving picture of generated clips: every clip in its place, in every frame."""

import json

import numpy as np
import pytest
from PIL import Image

from hunyuan_jax.contact_sheet import MARGIN, SCALE, TEXT_HEIGHT, write_contact_sheet
from hunyuan_jax.errors import UserError
from hunyuan_jax.video_io import write_video

COLOURS = ((200, 30, 30), (30, 160, 30), (30, 30, 200))


@pytest.fixture
def videos(tmp_path):
    """Three clips of one colour each that grow darker from frame to frame."""
    folder = tmp_path / "videos"
    folder.mkdir()
    index = []
    for number, colour in enumerate(COLOURS):
        frames = np.stack([np.full((32, 48, 3), colour, np.uint8) // (1 + t) for t in range(4)])
        write_video(folder / f"{number}.mp4", frames, fps=5, crf=1)
        index.append({"prompt": f"colour {number}, and a long explanation of it that no picture has room for", "file": f"{number}.mp4"})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_each_clip_stands_in_its_cell_in_every_frame(videos, tmp_path):
    write_contact_sheet(videos, tmp_path / "sheet.webp", count=10, columns=2)
    with Image.open(tmp_path / "sheet.webp") as sheet:
        assert sheet.n_frames == 4
        for time in range(sheet.n_frames):
            sheet.seek(time)
            sheet.load()
            assert sheet.info["duration"] == 200
            pixels = np.asarray(sheet.convert("RGB"))
            for number, colour in enumerate(COLOURS):
                column, row = number % 2, number // 2
                x = MARGIN + column * (48 * SCALE + MARGIN) + 48
                y = MARGIN + row * (32 * SCALE + TEXT_HEIGHT + MARGIN) + 32
                np.testing.assert_allclose(pixels[y, x], np.asarray(colour) // (1 + time), atol=12)


def test_a_folder_without_videos_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"hunyuan_jax\.generate"):
        write_contact_sheet(tmp_path, tmp_path / "sheet.webp", count=4, columns=2)
    assert not (tmp_path / "sheet.webp").exists()
