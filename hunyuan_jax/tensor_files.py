"""Named tensors in files, read and written one at a time.

    safetensors   8 bytes: length of the header; the header, JSON: name -> dtype, shape, first and last byte; the data, without gaps
    sharded       several of these in one folder and STEM.safetensors.index.json, which says for each name in which it is
    .pt           what `torch.save` writes, see torch_pickle.py

`open_tensors` reads headers alone and trusts none: what a file says of itself must be exact to the byte, or a `UserError` says
what is not.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from hunyuan_jax import torch_pickle, zip_directory
from hunyuan_jax.data.dataset import replacing, write_json
from hunyuan_jax.errors import UserError
from hunyuan_jax.stored_tensor import StoredTensor, checked_shape, contiguous_strides

__all__ = ["Spec", "StoredTensor", "TensorFile", "open_tensors", "write_safetensors", "write_sharded"]

MAX_HEADER = 100_000_000  # the format's own limit
INDEX = ".safetensors.index.json"

_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, or of all its shards, by name, and the strings that its safetensors header keeps beside them."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def open_tensors(path: str | Path, *, key: str | None = None) -> TensorFile:
    """Opens a safetensors file, an index of shards, a folder with one of the two, or a `.pt` file, whatever its name.

    `key` chooses an entry of a `.pt` file, see `torch_pickle.tensors_in`. Raises `UserError` for what is missing, unsound or
    ambiguous.
    """
    path = Path(path)
    with _explained(path):
        path = _only_file_in(path) if path.is_dir() else path
        with path.open("rb") as file:
            start = file.read(14)
        if start.startswith((zip_directory.MAGIC, torch_pickle.LEGACY_MAGIC)):
            found = torch_pickle.tensors_in(torch_pickle.read_torch_file(path), key=key, source=path)
            return TensorFile(found, {})
        if key is not None:
            raise UserError(f"{path} is no PyTorch file, so it has no entry {key!r}. Leave the key out.")
        # Eight characters of JSON are no length that a header may have.
        is_index = start[:1] == b"{" and int.from_bytes(start[:8], "little") > MAX_HEADER
        return _open_sharded(path) if is_index else _open_safetensors(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever reading shows to be wrong, as one `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror}). Give a file of tensors or a folder with one."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a file of tensors: {error}. Fetch it or write it again.") from error


def _only_file_in(folder: Path) -> Path:
    """The one index or safetensors file in `folder` that is no shard of an index there."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    shards = {shard for index in indices for shard in _read_index(index).values()}
    found = indices + [path for path in sorted(folder.glob("*.safetensors")) if path.name not in shards]
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:10]) or "none"
        raise UserError(
            f"One safetensors file or one index of shards was expected in {folder}; there are {len(found)} ({names}). Name one."
        )
    return found[0]


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each name."""
    with _explained(path), path.open("rb") as file:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"an index of at most {MAX_HEADER} bytes was expected")
        shards = _json_object(file.read(MAX_HEADER)).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError("an index was expected, with a weight_map that has the shard of each name")
        for shard in shards.values():
            # In this folder alone, so that nothing outside it is read.
            if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in "/\\\0"):
                raise ValueError(f"its shard {str(shard)[:100]!r} is no plain file name")
        return shards


def _open_sharded(path: Path) -> TensorFile:
    expected: dict[str, set[str]] = {}
    for name, shard in _read_index(path).items():
        expected.setdefault(shard, set()).add(name)
    tensors: dict[str, StoredTensor] = {}
    metadata: list[set[tuple[str, str]]] = []
    for shard, names in sorted(expected.items()):
        if not (path.parent / shard).is_file():
            raise UserError(f"{path} names the shard {shard}, which is missing. Fetch it or write all of them again.")
        opened = _open_safetensors(path.parent / shard)
        for name in sorted(opened.tensors.keys() ^ names)[:1]:
            raise UserError(f"{path} and {shard} do not agree on whether {name[:100]!r} is there. Fetch or write all of them again.")
        tensors |= opened.tensors
        metadata.append(set(opened.metadata.items()))
    return TensorFile(tensors, dict(sorted(set.intersection(*metadata))))


def _open_safetensors(path: Path) -> TensorFile:
    with _explained(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"it is no safetensors file or cut off, since its first 8 bytes give its header {length} bytes")
        header = _json_object(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ is no dict of strings")
        tensors = {name: _stored(name, given, path, 8 + length) for name, given in header.items()}
        _check_layout(tensors, 8 + length, size)
        return TensorFile(tensors, metadata)


def _stored(name: str, given: Any, path: Path, start: int) -> StoredTensor:
    """A tensor from its entry in the header, for data that begin at byte `start`."""
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header has for {name[:100]!r} something else than dtype, shape and data_offsets")
    if not isinstance(given["dtype"], str) or given["dtype"] not in _DTYPES:
        raise ValueError(f"{name[:100]!r} has none of the dtypes {', '.join(_DTYPES)}")
    dtype = _DTYPES[given["dtype"]]
    shape = checked_shape(given["shape"], dtype)
    match given["data_offsets"]:
        case [begin, end] if type(begin) is type(end) is int and end - begin == math.prod(shape) * dtype.itemsize:
            return StoredTensor(path, start + begin, dtype, shape, contiguous_strides(shape))
    raise ValueError(f"the data_offsets of {name[:100]!r} are not two numbers as far apart as its dtype and shape take")


def _check_layout(tensors: Mapping[str, StoredTensor], start: int, end: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != start:
            raise ValueError(f"{name[:100]!r} begins at byte {tensor.offset}, and the tensors before it end at byte {start}")
        start += tensor.nbytes
    if start != end:
        raise ValueError(f"its tensors end at byte {start}, and the file at byte {end}")


def _json_object(data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise ValueError("a JSON object was expected")
    return json.loads(str(data, "utf-8"), object_pairs_hook=_unique, parse_int=_natural, parse_constant=_natural)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its JSON has a key twice")
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()  # JSON can spell half a character
    return found


def _natural(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"its JSON has the number {text[:20]}, where natural numbers are expected")
    return int(text)


class Spec(Protocol):
    """What is known of a tensor before it is there; `jax.ShapeDtypeStruct`, `StoredTensor` and arrays are such."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def write_safetensors(
    path: str | Path, specs: Mapping[str, Spec], tensors: Iterable[np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors`, which come in the order of `specs` and one at a time, to `path`: whole or not at all.

    Equal tensors give equal bytes. Raises `ValueError` if a tensor is not what its spec says.
    """
    with replacing(Path(path)) as temporary:
        _write(temporary, specs, tensors, metadata or {})


def write_sharded(
    folder: str | Path,
    stem: str,
    specs: Mapping[str, Spec],
    tensors: Iterable[np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes as `write_safetensors` does, as STEM.safetensors or, if that is too large, as shards and then their index.

    Files of the same stem from an earlier write are replaced or removed at the end, all together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(specs, max_shard_bytes)
    names = [f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    stream = iter(tensors)
    with contextlib.ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            _write(stack.enter_context(replacing(folder / name)), shard, itertools.islice(stream, len(shard)), metadata or {})
        if next(stream, None) is not None:
            raise ValueError(f"More tensors came than the {len(specs)} of the specs.")
        # Without an index until all shards are in place, nobody takes shards of two writes for one.
        (folder / f"{stem}{INDEX}").unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(_nbytes(spec) for spec in specs.values())
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / f"{stem}{INDEX}", {"metadata": {"total_size": total}, "weight_map": places})
    for path in list(folder.iterdir()):
        if re.fullmatch(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors", path.name) and path.name not in names:
            path.unlink()


def _split(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """Runs of tensors of at most `limit` bytes, or of one tensor that has more."""
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + _nbytes(spec) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += _nbytes(spec)
    return shards


def _nbytes(spec: Spec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _write(path: Path, specs: Mapping[str, Spec], tensors: Iterable[np.ndarray], metadata: Mapping[str, str]) -> None:
    header, offsets = _header(specs, metadata)
    with path.open("wb") as file:
        file.write(header)
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            if tensor.dtype != spec.dtype or tensor.shape != tuple(spec.shape):
                raise ValueError(f"{name} should be {spec.dtype} {tuple(spec.shape)} and is {tensor.dtype} {tensor.shape}.")
            file.seek(len(header) + offsets[name])
            file.write(np.asarray(tensor, order="C").reshape(-1).view(np.uint8).data)


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data and where in the data each tensor begins."""
    unknown = [name for name, spec in specs.items() if np.dtype(spec.dtype) not in _NAMES or name == "__metadata__"]
    if unknown or any(not isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"A safetensors file takes tensors of {', '.join(_DTYPES)} and metadata of strings; not so {unknown[:5]}.")
    rows: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets, place = {}, 0
    # The widest first and a header of whole 8 bytes, as safetensors itself does, so that readers can map every tensor in place.
    for name, spec in sorted(specs.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        offsets[name], end = place, place + _nbytes(spec)
        shape = [int(size) for size in spec.shape]
        rows[name] = {"dtype": _NAMES[np.dtype(spec.dtype)], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
