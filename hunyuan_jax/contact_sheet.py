"""Many generated clips as one moving picture: `python -m hunyuan_jax.contact_sheet --videos DIR --output sheet.webp`.

Takes the first clips of a folder that `generate` wrote, in the order of its index, enlarged and with their prompts below.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from hunyuan_jax.data.dataset import replacing
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.video_io import read_video

SCALE = 2  # of a clip's pixels
MARGIN = 8
TEXT_SIZE = 10
TEXT_LINES = 2
TEXT_HEIGHT = TEXT_LINES * (TEXT_SIZE + 3) + 2
QUALITY = 85  # of WebP, up to 100
PAPER, INK = (255, 255, 255), (40, 40, 40)


def contact_sheet(clips: list[tuple[str, UInt8[np.ndarray, "T H W 3"]]], *, columns: int) -> list[Image.Image]:
    """The frames of a sheet of (prompt, frames), all of one size; shorter clips hold their last frame."""
    height, width = (SCALE * n for n in clips[0][1].shape[1:3])
    cell = width + MARGIN, height + TEXT_HEIGHT + MARGIN
    font = ImageFont.load_default(TEXT_SIZE)
    sheets = []
    for number in range(max(len(frames) for _, frames in clips)):
        sheet = Image.new("RGB", (columns * cell[0] + MARGIN, -(-len(clips) // columns) * cell[1] + MARGIN), PAPER)
        draw = ImageDraw.Draw(sheet)
        for index, (prompt, frames) in enumerate(clips):
            left, top = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
            frame = Image.fromarray(frames[min(number, len(frames) - 1)])
            sheet.paste(frame.resize((width, height), Image.Resampling.BICUBIC), (left, top))
            text = "\n".join(_wrapped(prompt, font, width))
            draw.text((left + width / 2, top + height + 2), text, INK, font, anchor="ma", align="center", spacing=2)
        sheets.append(sheet)
    return sheets


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text's words in lines that fit, as many as there is room for."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == TEXT_LINES:
            return [*lines[:-1], lines[-1] + "\u2026"]
        else:
            lines.append(word)
    return lines


def write_contact_sheet(videos: Path, output: Path, *, count: int, columns: int) -> None:
    """Writes the animated WebP of the first `count` clips in `videos`. Raises `UserError` where there are none."""
    try:
        entries = json.loads((videos / "index.json").read_text())[:count]
        read = [(str(entry["prompt"]), read_video(videos / Path(entry["file"]).name)) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{videos} holds no generated videos ({error!r}). Run hunyuan_jax.generate first, or name its --output.") from error
    if not read or len({video.frames.shape[1:] for _, video in read}) > 1:
        raise UserError(f"{videos} must hold at least one clip, and the first {count} must be of one size.")
    sheets = contact_sheet([(prompt, video.frames) for prompt, video in read], columns=min(columns, len(read)))
    with replacing(output) as temporary:
        milliseconds = round(1000 / read[0][1].fps)
        sheets[0].save(temporary, format="WEBP", save_all=True, append_images=sheets[1:], duration=milliseconds, loop=0, quality=QUALITY)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hunyuan_jax.contact_sheet", description="Writes a moving picture of generated clips.")
    parser.add_argument("--videos", required=True, type=Path, metavar="DIR", help="folder that hunyuan_jax.generate wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="WEBP")
    parser.add_argument("--count", type=int, default=10, help="clips shown (default: 10)")
    parser.add_argument("--columns", type=int, default=5, help="clips in a row (default: 5)")
    options = parser.parse_args(argv[1:])
    if options.count < 1 or options.columns < 1:
        raise UserError(f"--count and --columns must be at least 1, not {options.count} and {options.columns}.")
    write_contact_sheet(options.videos, options.output, count=options.count, columns=options.columns)
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
