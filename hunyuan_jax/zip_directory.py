"""Where the uncompressed entries of a zip file lie, so that they can be read in place.

    entry, entry, ...   each a header of 30 bytes, its name, an extra field and the data
    directory           each entry again: a row of 46 bytes, its name, an extra field, a comment
    76 bytes            count, size and place of the directory in 64 bits; not in every file
    22 bytes            the same in 32 bits

Only the plainest kind is read, since that is what `torch.save` writes: no compression, so that nothing grows when it is read, and
one place for each byte.
"""

import dataclasses
import struct
from typing import BinaryIO

MAGIC = b"PK\3\4"
MAX_DIRECTORY = 16 * 2**20  # about 200,000 entries


@dataclasses.dataclass(frozen=True)
class Entry:
    """`size` bytes at byte `offset` of the file."""

    offset: int
    size: int


def content(file: BinaryIO, entry: Entry, *, limit: int) -> bytes:
    if entry.size > limit:
        raise ValueError(f"one of its parts has {entry.size} bytes, more than {limit}")
    return _bytes_at(file, entry.offset, entry.size)


def _bytes_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    data = file.read(count)
    if len(data) < count:
        raise ValueError("it ends early")
    return data


def read_directory(file: BinaryIO) -> dict[str, Entry]:
    """The entries by name. A `ValueError` unless they are uncompressed, plainly named, within the file and apart from each other."""
    count, size, start = _place_of_directory(file)
    rows = _rows(_bytes_at(file, start, size))
    if len(rows) != count:
        raise ValueError(f"its zip directory should have {count} entries and has {len(rows)}")
    entries: dict[str, Entry] = {}
    free = 0
    for name, header, length in sorted(rows, key=lambda row: row[1]):
        if name in entries:
            raise ValueError(f"{name[:100]!r} is twice in its zip directory")
        if header < free:
            raise ValueError(f"{name[:100]!r} lies in what is not free for it in the zip file")
        entry = Entry(_start_of_data(file, name, header), length)
        free = entry.offset + length
        if free > start:
            raise ValueError(f"{name[:100]!r} is longer than the zip file has room for")
        entries[name] = entry
    return entries


def _place_of_directory(file: BinaryIO) -> tuple[int, int, int]:
    """Number of rows, size in bytes and place."""
    end = file.seek(0, 2) - 22
    last = _bytes_at(file, end, 22) if end >= 0 else b""
    if not last.startswith(b"PK\5\6"):
        raise ValueError("it does not end as a zip file does; it may be cut off")
    count, size, start = struct.unpack_from("<HII", last, 10)
    wide = _bytes_at(file, end - 76, 76) if end >= 76 else b""
    if wide.startswith(b"PK\6\6") and wide.startswith(b"PK\6\7", 56):
        end -= 76
        count, size, start = struct.unpack_from("<QQQ", wide, 32)
    if start + size != end or size > MAX_DIRECTORY:
        raise ValueError("its zip directory is not where it should be, or too large")
    return count, size, start


def _rows(directory: bytes) -> list[tuple[str, int, int]]:
    """Name, place of the header and size of the data of each entry."""
    rows, place = [], 0
    while place < len(directory):
        if len(directory) < place + 46 or not directory.startswith(b"PK\1\2", place):
            raise ValueError("its zip directory is broken")
        row = struct.unpack_from("<8xHH8xIIHHH8xI", directory, place)
        flags, method, packed, size, name_size, extra_size, comment_size, header = row
        place += 46
        name = str(directory[place : place + name_size], "utf-8")
        place += name_size
        size, packed, header = _widened([size, packed, header], directory[place : place + extra_size])
        place += extra_size + comment_size
        if method or flags & 1 or packed != size:
            raise ValueError(f"{name[:100]!r} is compressed or encrypted in its zip file, which is not read")
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{name[:100]!r} in its zip file is no plain relative name")
        rows.append((name, header, size))
    return rows


def _widened(fields: list[int], extra: bytes) -> list[int]:
    """A field that is full in 32 bits stands in part 1 of the extra field in 64 bits, in this order."""
    place = 0
    wide = b""
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            wide = extra[place + 4 : place + 4 + size]
        place += 4 + size
    numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(numbers, field) if field == 2**32 - 1 else field for field in fields]


def _start_of_data(file: BinaryIO, name: str, header: int) -> int:
    magic, method, name_size, extra_size = struct.unpack("<4s4xH16xHH", _bytes_at(file, header, 30))
    if magic != MAGIC or method or file.read(name_size) != name.encode():
        raise ValueError(f"{name[:100]!r} is not where its zip directory says")
    return header + 30 + name_size + extra_size
