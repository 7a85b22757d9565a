"""A record as a sample of a bucket: checked against its row of the manifest, decoded, fitted.

    Clip   -> frames [T, H, W, 3]
    Latent -> mean and logvar [T, Y, X, C] and one of its texts

Records are not trusted: whatever cannot be a sample is a `DamagedRecord` that says why.
"""

import dataclasses
from typing import Any

import numpy as np

from hunyuan_jax.data import transforms
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.records import Clip, DamagedRecord, Latent, TextStates
from hunyuan_jax.video_io import MediaError, read_video


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a batch; of a clip its frames, of a latent the rest. Arrays are float32."""

    frames: np.ndarray | None = None
    mean: np.ndarray | None = None
    logvar: np.ndarray | None = None
    text: TextStates | None = None


def make_sample(
    item: Clip | Latent | DamagedRecord, row: dict[str, Any], bucket: Bucket, *, rng: np.random.Generator | None, shapes: VideoBatch | None
) -> Sample:
    """The record of manifest row `row` as a sample; `rng` draws interval, crop and prompt, without it they are always the same.

    `shapes` is what a batch of the bucket looks like; latents need it. Raises `DamagedRecord`, also for an `item` that is one.
    """
    if isinstance(item, DamagedRecord):
        raise item
    _check_row(item, row)
    if isinstance(item, Clip):
        return Sample(frames=transforms.fit_to_bucket(_frames(item), bucket, rng=rng))
    assert shapes is not None
    _check_latent(item, shapes)
    text = item.texts[0 if rng is None else int(rng.integers(len(item.texts)))]
    return Sample(mean=item.mean.astype(np.float32), logvar=item.logvar.astype(np.float32), text=text)


def _check_row(item: Clip | Latent, row: dict[str, Any]) -> None:
    """The record is the one that its row speaks of."""
    said: dict[str, Any] = vars(item)
    if isinstance(item, Latent):
        said = said | dict(zip(("frames", "height", "width"), item.bucket, strict=False))
    for name in ("id", "source", "num_frames", "frames", "height", "width"):
        if name in row and said.get(name) != row[name]:
            raise DamagedRecord(f"its {name} is {said.get(name)!r}, and the manifest says {row[name]!r}")


def _frames(clip: Clip) -> np.ndarray:
    if not isinstance(clip.video, bytes):  # a text would be taken for the name of a file
        raise DamagedRecord(f"its video is of type {type(clip.video).__name__} and must be bytes")
    try:
        frames = read_video(clip.video).frames
    except MediaError as error:
        raise DamagedRecord(str(error)) from error
    if len(frames) != clip.num_frames:
        raise DamagedRecord(f"its video has {len(frames)} frames and should have {clip.num_frames}")
    return frames


def _check_latent(latent: Latent, shapes: VideoBatch) -> None:
    wanted = shapes.mean.shape[1:]
    for name, array in (("mean", latent.mean), ("logvar", latent.logvar)):
        if array.shape != wanted:
            raise DamagedRecord(f"its {name} is of shape {array.shape} and should be {wanted}")
        _check_numbers(name, array)
    if not latent.texts:
        raise DamagedRecord("it has no text")
    for text in latent.texts:
        if not isinstance(text.prompt, str):
            raise DamagedRecord(f"its prompt is of type {type(text.prompt).__name__} and must be text")
        if text.is_encoded:
            _check_text(text, width=shapes.txt.shape[-1], pooled=shapes.pooled.shape[-1])


def _check_text(text: TextStates, *, width: int, pooled: int) -> None:
    if text.txt.ndim != 2 or text.txt.shape[1] != width or text.pooled.shape != (pooled,):
        came, wanted = f"{text.txt.shape} and {text.pooled.shape}", f"(L, {width}) and ({pooled},)"
        raise DamagedRecord(f"its text states are of shapes {came} and should be {wanted}")
    _check_numbers("txt", text.txt)
    _check_numbers("pooled", text.pooled)


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype == np.uint8 or not np.isfinite(array).all():
        raise DamagedRecord(f"its {name} holds {'bytes' if array.dtype == np.uint8 else 'values that are not finite'}")
