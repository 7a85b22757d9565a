"""A tensor that lies in a file: dtype and shape are known, values are read when they are asked for and only those asked for."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from hunyuan_jax.errors import UserError

_MAX_AXES = 16  # NumPy would allow 64, but weights have 5 at most and each axis costs time


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in the bytes of `path`, the first element at byte `offset`; `strides` count elements, as PyTorch's do."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own. Raises `UserError` if the file no longer holds it."""
        return self.read_slice(())

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        """What `read()[index]` gives, for slices that step forward.

        Reads from the first to the last element of the slice: little for a few rows, all between them for a few columns.
        """
        ranges = [range(size)[part] for size, part in zip(self.shape, index, strict=False)]
        if len(index) > len(self.shape) or any(part.step < 1 for part in ranges):
            raise ValueError(f"A tensor of shape {self.shape} cannot be read at {index}; give at most one forward slice an axis.")
        ranges += [range(size) for size in self.shape[len(index) :]]
        shape = tuple(len(part) for part in ranges)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        size = self.dtype.itemsize
        start = sum(part.start * stride for part, stride in zip(ranges, self.strides, strict=True))
        steps = [part.step * stride for part, stride in zip(ranges, self.strides, strict=True)]
        extent = 1 + sum((count - 1) * step for count, step in zip(shape, steps, strict=True))
        data = self._bytes(self.offset + start * size, extent * size)
        return np.asarray(np.ndarray(shape, self.dtype, data, strides=[step * size for step in steps]), order="C")

    def _bytes(self, offset: int, count: int) -> np.ndarray:
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=offset)
        except OSError as error:
            raise UserError(f"{self.path} could be opened but not be read again ({error}). Leave it in place while it is used.") from error
        if len(data) < count:
            raise UserError(f"{self.path} has become shorter since it was opened. Leave it in place while it is used.")
        return data


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def checked_shape(shape: object, dtype: np.dtype) -> tuple[int, ...]:
    """`shape` from an untrusted file as a shape that NumPy can hold; otherwise a `ValueError`."""
    if not isinstance(shape, list | tuple) or len(shape) > _MAX_AXES:
        raise ValueError(f"a shape is not a list of at most {_MAX_AXES} sizes")
    if any(type(size) is not int or size < 0 for size in shape):  # a bool is an int to isinstance
        raise ValueError("a shape has a size that is no natural number")
    # Empty tensors too: NumPy multiplies the other sizes.
    if math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise ValueError("a shape is larger than any file")
    return tuple(shape)
