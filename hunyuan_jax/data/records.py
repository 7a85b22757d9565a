"""What a record on disk is: `Clip` (written by curation) and `Latent` (written by encoding), to and from bytes.

A record is one msgpack map. Arrays are stored as `[dtype, shape, bytes]`, bfloat16 included, and are read back as zero-copy
views. Every record carries the version of its format; bytes of another version or kind are a `DamagedRecord`, not a guess.

    Clip    one shot of video as H.264 mp4 bytes, its caption fields, camera label and scores
    Latent  one clip fitted to one bucket: the VAE posterior and the text states of its prompts
"""

import dataclasses
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from hunyuan_jax.errors import UserError

VERSION = 1
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "uint8": np.dtype(np.uint8)}


class DamagedRecord(UserError):
    """One record that cannot be used, and why; others of its dataset may be sound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A single shot, ready to be decoded: `video` holds H.264 mp4 bytes that begin at the clear start frame."""

    id: str  # hex sha256 of the source's content and the shot's span
    video: bytes
    fps: float
    num_frames: int
    height: int
    width: int
    caption: dict[str, Any]  # the structured caption: short, dense, background, ...
    camera: str  # a camera label, or "" where none is known
    source: str  # the file the shot was cut from, relative to the input folder
    start_seconds: float
    end_seconds: float
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStates:
    """One prompt as the text towers see it: `txt` [L, D] holds the valid tokens only, `pooled` [P] the whole prompt.

    Without `pooled` and `txt`, both empty, it is a prompt that training encodes itself.
    """

    prompt: str
    txt: np.ndarray
    pooled: np.ndarray

    @classmethod
    def unencoded(cls, prompt: str) -> "TextStates":
        return cls(prompt=prompt, txt=np.zeros((0, 0), np.float32), pooled=np.zeros(0, np.float32))

    @property
    def is_encoded(self) -> bool:
        return self.pooled.size > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """A clip in one bucket: posterior `mean` and `logvar` [T, Y, X, C] (unscaled) and the states of its prompts."""

    id: str  # the clip's id and the bucket's name, joined by "/"
    bucket: tuple[int, int, int]  # frames, height, width in pixels
    fps: float
    source: str
    mean: np.ndarray
    logvar: np.ndarray
    texts: tuple[TextStates, ...]


def _pack_array(array: np.ndarray) -> list[Any]:
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"A record holds arrays of {sorted(_DTYPES)}, not {array.dtype.name}.")
    return [array.dtype.name, list(array.shape), np.ascontiguousarray(array).tobytes()]


def _unpack_array(packed: list[Any]) -> np.ndarray:
    dtype, shape, data = packed
    return np.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)


def to_bytes(record: Clip | Latent) -> bytes:
    """Serialises a record; equal records give equal bytes."""
    fields: dict[str, Any] = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    if isinstance(record, Latent):
        fields["mean"], fields["logvar"] = _pack_array(record.mean), _pack_array(record.logvar)
        fields["texts"] = [[t.prompt, _pack_array(t.txt), _pack_array(t.pooled)] for t in record.texts]
    return msgpack.packb({"v": VERSION, "kind": type(record).__name__, **fields})


def from_bytes(data: bytes) -> Clip | Latent:
    """Reads a record back. Raises `DamagedRecord` for bytes that are no record of this version."""
    try:
        fields = msgpack.unpackb(data)
        version, kind = fields.pop("v"), fields.pop("kind")
    except (ValueError, KeyError, AttributeError, TypeError, msgpack.UnpackException) as error:
        raise DamagedRecord(f"A record of {len(data)} bytes cannot be read ({error}); the shard is damaged.") from error
    if version != VERSION or kind not in ("Clip", "Latent"):
        said = f"A record of kind {kind!r}, version {version!r} came; this code reads version {VERSION}. Write the dataset again."
        raise DamagedRecord(said)
    try:
        if kind == "Clip":
            return Clip(**fields)
        fields["bucket"] = tuple(fields["bucket"])
        fields["mean"], fields["logvar"] = _unpack_array(fields["mean"]), _unpack_array(fields["logvar"])
        fields["texts"] = tuple(
            TextStates(prompt=p, txt=_unpack_array(txt), pooled=_unpack_array(pooled)) for p, txt, pooled in fields["texts"]
        )
        return Latent(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedRecord(f"A {kind} record has wrong fields ({error}); the shard is damaged. Write the dataset again.") from error
