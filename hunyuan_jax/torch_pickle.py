"""PyTorch's `.pt` files, read without PyTorch and without running anything in them.

`torch.save` writes a zip file of uncompressed entries: `NAME/data.pkl`, a pickle of the object in which each tensor is a view of a
storage, and `NAME/data/KEY`, the bytes of that storage.

`inert_pickle` reads the one, and the functions in `_CALLS` here, the only ones that can be called, make dicts and `StoredTensor`s
of it; the other stays in the file until a tensor is read.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from hunyuan_jax import inert_pickle, zip_directory
from hunyuan_jax.errors import UserError
from hunyuan_jax.inert_pickle import Global, Opaque
from hunyuan_jax.stored_tensor import StoredTensor, checked_shape

LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"

_PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_DTYPES = {f"torch.{name}": np.dtype(name) for name in _PLAIN} | {
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}

_STORAGES = {
    "torch.DoubleStorage": "torch.float64",
    "torch.FloatStorage": "torch.float32",
    "torch.HalfStorage": "torch.float16",
    "torch.BFloat16Storage": "torch.bfloat16",
    "torch.LongStorage": "torch.int64",
    "torch.IntStorage": "torch.int32",
    "torch.ShortStorage": "torch.int16",
    "torch.CharStorage": "torch.int8",
    "torch.ByteStorage": "torch.uint8",
    "torch.BoolStorage": "torch.bool",
    "torch.storage.UntypedStorage": "torch.uint8",
}


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` wrote to `path`: dicts, lists, tuples, numbers and strings, with `StoredTensor` and `Opaque` leaves.

    Raises `UserError` for a file that is missing, broken or older than PyTorch 1.6. What a hostile file gives is harmless, but
    may contain itself: look up what is wanted, as `tensors_in` does, instead of walking, comparing or printing all of it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give a file that torch.save wrote.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a file of torch.save: {error}. Fetch it or save it again.") from error


def tensors_in(value: Any, *, key: str | None = None, source: str | Path = "The file") -> dict[str, StoredTensor]:
    """The state dict in what `read_torch_file` gave: under `key`, or else under "module", "ema" or "state_dict", or else the whole.

    Raises `UserError`, calling the file `source`, if there is none, if both "ema" and "state_dict" may be meant, or if it holds
    anything but tensors.
    """
    if not isinstance(value, dict):
        raise UserError(f"{source} holds {_kind(value)}; a dict of tensors was expected. Save model.state_dict() in it.")
    nested = [name for name, entry in value.items() if isinstance(name, str) and isinstance(entry, dict)]
    usual = [name for name in ("module", "ema", "state_dict") if name in nested]
    if key is None and usual:
        if len(usual) > 1 and usual[0] != "module":
            raise UserError(f"{source} has tensors under {usual}. Choose one of these keys.")
        key = usual[0]
    if key is not None and key not in nested:
        raise UserError(f"{source} has no dict under {key!r}; it has under {[name[:100] for name in nested[:20]]}.")
    found = value if key is None else value[key]
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise UserError(
                f"{source} has {_kind(tensor)} under {repr(name)[:100]}, where a tensor was expected. "
                f"Choose the key of a state dict, if one of {[name[:100] for name in nested[:20]]} is, or save plain tensors alone."
            )
    if not found:
        raise UserError(f"{source} has an empty dict where tensors were expected. Choose another key or save it again.")
    return found


def _kind(value: Any) -> str:
    """For a message; a value is never printed, since it may be endless."""
    return f"an object of {value.name[:100]!r}" if isinstance(value, Opaque) else f"a value of type {type(value).__name__}"


def _read(file: BinaryIO, path: Path) -> Any:
    if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
        raise UserError(
            f"{path} has the format of PyTorch before 1.6, which is not read. "
            "Save it again with PyTorch: torch.save(torch.load(PATH, weights_only=True), PATH)."
        )
    entries = zip_directory.read_directory(file)
    roots = {name.partition("/")[0] for name in entries}
    root = roots.pop() if len(roots) == 1 else None
    if f"{root}/data.pkl" not in entries:
        raise ValueError("it is no zip file of one folder with a data.pkl")
    order = entries.get(f"{root}/byteorder")
    if order is not None and zip_directory.content(file, order, limit=16) != b"little":
        raise ValueError("its tensors are not in little-endian order")
    program = zip_directory.content(file, entries[f"{root}/data.pkl"], limit=inert_pickle.MAX_BYTES)
    prefix = f"{root}/data/"
    storages = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    return inert_pickle.run(program, calls=_CALLS, refer=lambda reference: _storage(reference, path, storages))


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The bytes that tensors are views of."""

    path: Path
    entry: zip_directory.Entry
    dtype: np.dtype

    def view(self, offset: Any, shape: Any, strides: Any, *, dtype: np.dtype) -> StoredTensor:
        shape = checked_shape(shape, dtype)
        if any(type(number) is not int or number < 0 for number in (offset, *strides)):
            raise ValueError("the offset or a stride of a tensor is no natural number")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        # The count as well: with strides of 0, four bytes would be a tensor that no memory can hold. An empty view may be anywhere.
        if count and max(last + 1, count) * dtype.itemsize > self.entry.size:
            raise ValueError(f"a tensor of shape {shape} takes more than its storage of {self.entry.size} bytes")
        # PyTorch keeps any stride for an axis of one element, also one that no address reaches.
        strides = tuple(stride if size > 1 else 1 for size, stride in zip(shape, strides, strict=True))
        return StoredTensor(self.path, self.entry.offset + offset * dtype.itemsize, dtype, shape, strides)


def _storage(reference: Any, path: Path, entries: Mapping[str, zip_directory.Entry]) -> _Storage | Opaque:
    match reference:
        case ("storage", Global(name=name), str(key), str(), int(count)):
            if name not in _STORAGES:
                return Opaque(name)
        case _:
            raise ValueError("its pickle refers to something that is no storage")
    dtype, entry = _DTYPES[_STORAGES[name]], entries.get(key)
    if entry is None or entry.size != count * dtype.itemsize:
        raise ValueError(f"storage {key[:100]!r} is missing or of another size than its pickle says")
    return _Storage(path, entry, dtype)


def _ordered_dict(arguments: tuple) -> Any:
    if arguments:
        raise ValueError("an OrderedDict has arguments, which torch.save never writes")
    return {}


def _rebuild_tensor_v2(arguments: tuple, dtype: np.dtype | None = None) -> Any:
    match arguments:
        case (Opaque(name=name), *_):
            return Opaque(name)
        case (_Storage() as storage, offset, tuple() as shape, tuple() as strides, _, _):
            return storage.view(offset, shape, strides, dtype=storage.dtype if dtype is None else dtype)
        case (_Storage(), _, _, _, _, _, _):
            return Opaque("torch.Tensor with a conjugate or negative bit")
    raise ValueError("a tensor is made of something else than a storage, an offset, a shape and strides")


def _rebuild_tensor_v3(arguments: tuple) -> Any:
    """As version 2, with the dtype after the first six."""
    match arguments[6:]:
        case (Opaque(name=name), *more):
            return _rebuild_tensor_v2((*arguments[:6], *more), _DTYPES[name]) if name in _DTYPES else Opaque(name)
    raise ValueError("a tensor is made without its dtype")


def _rebuild_parameter(arguments: tuple) -> Any:
    match arguments:
        case (StoredTensor() | Opaque() as tensor, _, _):
            return tensor
    raise ValueError("a parameter is made of something else than a tensor")


_CALLS: Mapping[str, Callable[[tuple], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
