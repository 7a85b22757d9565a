"""From records to arrays: decode a clip, take its frames, fit them to a bucket; pad text states to a length.

Randomness (the frame interval, the place of a crop) comes from the sample's id and the epoch alone.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.records import TextStates


def fit_to_size(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """Resizes frames so that they cover height x width, keeping their shape, and crops the centre."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = (max(width, round(frames.shape[2] * scale)), max(height, round(frames.shape[1] * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    resized = [frame if (frame.shape[1], frame.shape[0]) == size else cv2.resize(frame, size, interpolation=how) for frame in frames]
    return np.stack([frame[top : top + height, left : left + width] for frame in resized])


def take_frames(frames: UInt8[np.ndarray, "T H W 3"], bucket: Bucket, *, rng: np.random.Generator | None) -> UInt8[np.ndarray, "T2 H W 3"]:
    """The bucket's number of frames at one of its intervals, from the clip's start; at random where `rng` is given.

    An image bucket takes the first frame, the clear one, or with `rng` any.
    """
    if bucket.is_image:
        return frames[[0 if rng is None else int(rng.integers(len(frames)))]]
    fitting = [i for i in bucket.intervals if bucket.span(i) <= len(frames)]
    interval = fitting[0] if rng is None else int(rng.choice(fitting))
    start = 0 if rng is None else int(rng.integers(len(frames) - bucket.span(interval) + 1))
    return frames[start : start + bucket.span(interval) : interval]


def fit_to_bucket(
    frames: UInt8[np.ndarray, "T H W 3"], bucket: Bucket, *, rng: np.random.Generator | None = None
) -> Float[np.ndarray, "T2 H2 W2 3"]:
    """A clip's frames in the shape of the bucket, as float32 in [-1, 1]. Without `rng` always the same frames and crop."""
    taken = fit_to_size(take_frames(frames, bucket, rng=rng), *(bucket.resize or (bucket.height, bucket.width)))
    free = taken.shape[1] - bucket.height, taken.shape[2] - bucket.width
    top, left = (f // 2 if rng is None else int(rng.integers(f + 1)) for f in free)
    taken = taken[:, top : top + bucket.height, left : left + bucket.width]
    return taken.astype(np.float32) / 127.5 - 1.0


def to_uint8(frames: Float[np.ndarray, "*B T H W 3"]) -> UInt8[np.ndarray, "*B T H W 3"]:
    """Frames in [-1, 1], clipped, as bytes."""
    return np.round((np.clip(np.asarray(frames, np.float32), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def pad_texts(texts: Sequence[TextStates], *, length: int) -> tuple[Any, Any, Any]:
    """Text states of a batch as (txt [B, length, D], txt_mask [B, length], pooled [B, P]) in float32; longer ones are cut."""
    width, batch = texts[0].txt.shape[-1], len(texts)
    txt, mask = np.zeros((batch, length, width), np.float32), np.zeros((batch, length), bool)
    for row, text in enumerate(texts):
        valid = min(length, len(text.txt))
        txt[row, :valid], mask[row, :valid] = text.txt[:valid], True
    return txt, mask, np.stack([text.pooled.astype(np.float32) for text in texts])
