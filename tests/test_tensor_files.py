"""What is written is read back bit for bit, by us and by safetensors, and a file that lies about itself is one `UserError`."""

import json
import os
import random
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.errors import UserError
from hunyuan_jax.tensor_files import open_tensors, write_safetensors, write_sharded

DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


def random_bits(dtype, shape: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """Any bits at all, so NaNs with payloads too."""
    dtype = np.dtype(dtype)
    data = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    array = np.frombuffer(data, np.uint8) % 2 if dtype.kind == "b" else np.frombuffer(data, np.uint8)
    return array.view(dtype).reshape(shape)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def overwrite(path, data: bytes) -> None:
    """In place, since a file that is emptied first and filled again is written to the disk each time."""
    path.touch()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def write(path, tensors: dict[str, np.ndarray], **options) -> None:
    write_safetensors(path, tensors, iter(tensors.values()), **options)


def read(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(path).tensors.items()}


def some_tensors() -> dict[str, np.ndarray]:
    shapes = [(), (0,), (3,), (2, 3), (1, 2, 3), (2, 0, 3)]
    return {
        f"block.{n}.{np.dtype(dtype)}": random_bits(dtype, shape, seed=n) for n, shape in enumerate(shapes) for dtype in DTYPES
    }  # names in an order that mixes sizes of items


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=5).map(tuple), st.integers(0, 2**32 - 1)), max_size=6),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_written_is_read_back_bit_for_bit(tmp_path_factory, drawn, metadata):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    tensors = {f"t{n}": random_bits(dtype, shape, seed=seed) for n, (dtype, shape, seed) in enumerate(drawn)}
    write(path, tensors, metadata=metadata)
    opened = open_tensors(path)
    assert opened.metadata == metadata
    assert opened.tensors.keys() == tensors.keys()
    assert all(same_bits(opened.tensors[name].read(), tensor) for name, tensor in tensors.items())


def test_safetensors_reads_what_we_write_and_we_what_it_writes(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "ours", tensors, metadata={"format": "pt", "naïve": "ünï"})
    with safetensors.safe_open(tmp_path / "ours", "numpy") as file:
        assert file.metadata() == {"format": "pt", "naïve": "ünï"}
    for name, (dtype, shape, data) in deserialized((tmp_path / "ours").read_bytes()).items():
        assert shape == list(tensors[name].shape)
        assert data == tensors[name].tobytes(), dtype
    torch_tensors = safetensors.torch.load_file(tmp_path / "ours")
    assert all(bytes_of(torch_tensors[name]) == tensor.tobytes() for name, tensor in tensors.items())
    safetensors.torch.save_file(torch_tensors, tmp_path / "theirs", metadata={"a": "b"})
    theirs = read(tmp_path / "theirs")
    assert theirs.keys() == tensors.keys()
    assert all(same_bits(theirs[name], tensor) for name, tensor in tensors.items())
    assert open_tensors(tmp_path / "theirs").metadata == {"a": "b"}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def deserialized(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (row["dtype"], row["shape"], bytes(row["data"])) for name, row in safetensors.deserialize(data)}


def test_equal_tensors_give_equal_bytes_and_every_tensor_is_aligned(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "a", tensors, metadata={"x": "1", "y": "2"})
    write(tmp_path / "b", tensors, metadata={"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in open_tensors(tmp_path / "a").tensors.values())


def test_jax_arrays_and_views_are_written_as_they_look(tmp_path):
    column = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    array = jax.numpy.arange(5, dtype=jax.numpy.bfloat16)
    specs = {"column": column, "array": jax.ShapeDtypeStruct(array.shape, array.dtype)}
    write_safetensors(tmp_path / "a", specs, iter([column, array]))
    assert same_bits(read(tmp_path / "a")["column"], column)
    assert same_bits(read(tmp_path / "a")["array"], np.asarray(array))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_slice_that_is_read_is_the_slice_of_what_is_read(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple))
    array = random_bits(np.int16, shape)
    path = tmp_path_factory.mktemp("files") / "a"
    write(path, {"a": array})
    bound = st.none() | st.integers(-6, 6)
    index = data.draw(st.lists(st.builds(slice, bound, bound, st.none() | st.integers(1, 3)), max_size=len(shape)).map(tuple))
    assert same_bits(open_tensors(path).tensors["a"].read_slice(index), array[index])


def test_a_slice_that_steps_back_or_has_too_many_axes_is_refused(tmp_path):
    write(tmp_path / "a", {"a": np.zeros((2, 3))})
    tensor = open_tensors(tmp_path / "a").tensors["a"]
    for index in [(slice(None, None, -1),), (slice(None),) * 3]:
        with pytest.raises(ValueError, match="forward slice"):
            tensor.read_slice(index)


def test_what_is_read_is_no_more_than_was_asked_for(tmp_path):
    write(tmp_path / "a", {"a": np.arange(10**6), "b": np.arange(10.0).reshape(5, 2)})
    tensor = open_tensors(tmp_path / "a").tensors["b"]
    with open(tmp_path / "a", "r+b") as file:  # Of two rows, the bytes of no other row are needed.
        file.truncate(tensor.offset + 48)
    rows = tensor.read_slice((slice(1, 3),))
    assert rows.tolist() == [[2, 3], [4, 5]]
    assert rows.base.nbytes == rows.nbytes
    assert rows.flags.writeable
    with pytest.raises(UserError, match="shorter since it was opened"):
        tensor.read()
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match="not be read again"):
        tensor.read()


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path):
    def broken():
        yield np.zeros(3)
        raise RuntimeError("no more")

    specs = {"a": np.zeros(3), "b": np.zeros(3)}
    with pytest.raises(RuntimeError, match="no more"):
        write_safetensors(tmp_path / "a", specs, broken())
    with pytest.raises(RuntimeError, match="no more"):
        write_sharded(tmp_path, "m", specs, broken(), max_shard_bytes=24)
    assert list(tmp_path.iterdir()) == []
    write_sharded(tmp_path, "m", specs, [np.ones(3), np.ones(3)], max_shard_bytes=24)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="no more"):
        write_sharded(tmp_path, "m", specs, broken(), max_shard_bytes=24)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("tensors", [[np.zeros((3, 1))], [np.zeros(3, np.float32)], [], [np.zeros(3), np.zeros(3)]])
def test_what_does_not_fit_its_spec_is_not_written(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"should be|argument 2|More tensors"):
        write_safetensors(tmp_path / "a", {"a": np.zeros(3)}, iter(tensors))
    with pytest.raises(ValueError, match=r"should be|argument 2|More tensors"):
        write_sharded(tmp_path, "a", {"a": np.zeros(3)}, iter(tensors))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("specs", "metadata"), [({"a": np.zeros(3, complex)}, {}), ({"__metadata__": np.zeros(3)}, {}), ({"a": np.zeros(3)}, {"n": 1})]
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, specs, metadata):
    with pytest.raises(ValueError, match="takes tensors of"):
        write_safetensors(tmp_path / "a", specs, specs.values(), metadata=metadata)
    assert list(tmp_path.iterdir()) == []


# Shards


def shards_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_hold_what_one_file_holds(tmp_path):
    tensors = some_tensors()
    write_sharded(tmp_path, "model", tensors, tensors.values(), metadata={"format": "pt"}, max_shard_bytes=50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        opened = open_tensors(path)
        assert opened.metadata == {"format": "pt"}
        assert opened.tensors.keys() == tensors.keys()
        assert all(same_bits(opened.tensors[name].read(), tensor) for name, tensor in tensors.items())
    for shard in set(index["weight_map"].values()):
        held = safetensors.torch.load_file(tmp_path / shard)
        assert held.keys() == {name for name, place in index["weight_map"].items() if place == shard}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 50


def test_a_later_write_leaves_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / "model-of-another.safetensors").touch()
    (tmp_path / "model-2-00001-of-00002.safetensors").touch()
    others = shards_in(tmp_path)
    tensors = {f"t{n}": np.full(2, n) for n in range(4)}
    for limit, count in [(16, 4), (32, 2), (64, 1), (48, 2), (1, 4), (10**9, 1)]:
        write_sharded(tmp_path, "model", tensors, tensors.values(), max_shard_bytes=limit)
        assert set(others) <= set(shards_in(tmp_path))
        written = [name for name in shards_in(tmp_path) if name not in others]
        expected = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] + ["model.safetensors.index.json"]
        assert written == (expected if count > 1 else ["model.safetensors"])


def test_a_folder_must_say_which_file_is_meant(tmp_path):
    with pytest.raises(UserError, match="there are 0"):
        open_tensors(tmp_path)
    write(tmp_path / "a.safetensors", {"a": np.zeros(2)})
    assert open_tensors(tmp_path).tensors.keys() == {"a"}
    write_sharded(tmp_path, "b", {"x": np.zeros(2), "y": np.zeros(2)}, [np.zeros(2)] * 2, max_shard_bytes=16)
    with pytest.raises(UserError, match=r"there are 2 \(b\.safetensors\.index\.json, a\.safetensors\)"):
        open_tensors(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    assert open_tensors(tmp_path).tensors.keys() == {"x", "y"}
    (tmp_path / "b.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="there are 2"):
        open_tensors(tmp_path)


GOOD_INDEX = {"x": "m-1", "y": "m-2", "z": "m-2"}
BAD_INDICES = {
    "escape": GOOD_INDEX | {"x": "../outside.safetensors"},
    "absolute": GOOD_INDEX | {"x": "/etc/passwd"},
    "backslash": GOOD_INDEX | {"x": "..\\m-1"},
    "dots": GOOD_INDEX | {"x": ".."},
    "empty": GOOD_INDEX | {"x": ""},
    "zero": GOOD_INDEX | {"x": "m-1\0"},
    "number": GOOD_INDEX | {"x": 1},
    "list": GOOD_INDEX | {"x": ["m-1"]},
    "missing shard": GOOD_INDEX | {"x": "m-3"},
    "names in each other's shard": GOOD_INDEX | {"x": "m-2", "y": "m-1"},
    "name too many": GOOD_INDEX | {"w": "m-2"},
    "name too few": {"x": "m-1", "y": "m-2"},
    "shard is the index": GOOD_INDEX | {"x": "index"},
    "no names": {},
    "no dict": ["m-1"],
    "nothing": None,
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_an_index_that_does_not_say_what_is_there_is_refused(tmp_path, case):
    write(tmp_path / "outside.safetensors", {"x": np.zeros(2)})
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "m-1", {"x": np.zeros(2)})
    write(folder / "m-2", {"y": np.zeros(2), "z": np.zeros(2)})
    (folder / "index").write_text(json.dumps({"weight_map": GOOD_INDEX, "metadata": {"total_size": 4.8e1}}))
    assert open_tensors(folder / "index").tensors.keys() == {"x", "y", "z"}
    (folder / "index").write_text(json.dumps({"weight_map": BAD_INDICES[case]}))
    with pytest.raises(UserError):
        open_tensors(folder / "index")


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "index").write_text(json.dumps({"weight_map": {"x": "m-00007"}}))
    with pytest.raises(UserError, match="shard m-00007, which is missing"):
        open_tensors(tmp_path / "index")


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    write(tmp_path / "m", {"x": np.zeros(2)})
    (tmp_path / "index").write_text('{"weight_map": {"x": "m", "x": "m"}}')
    with pytest.raises(UserError, match="a key twice"):
        open_tensors(tmp_path / "index")


# Hostile and broken files


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape="[1]", offsets="[0,4]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def one(data: bytes = b"1234", **fields: str) -> bytes:
    return file_of(f'{{"a":{entry(**fields)}}}', data)


BAD_FILES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "zeros": b"\0" * 64,
    "text": b"no tensors are here, and nothing else of use\n",
    "html": b"<!doctype html><html><body>404</body></html>",
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "header over the limit": (100_000_001).to_bytes(8, "little") + b"{}" + b" " * 100,
    "header of 2**64 bytes": b"\xff" * 8 + b"{}",
    "no utf-8": file_of(b'{"\xff":1}'),
    "mark of byte order": file_of(b'\xef\xbb\xbf{"__metadata__":{}}'),
    "utf-16": file_of('{"__metadata__":{}}'.encode("utf-16")),
    "space before": file_of(' {"__metadata__":{}}'),
    "array": file_of("[]"),
    "cut off": file_of('{"a":'),
    "text after": file_of("{}{}"),
    "deep arrays": file_of('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"),
    "deep objects": file_of('{"a":' * 200_000),
    "number without end": file_of(f'{{"a":{"9" * 100_000}}}'),
    "half a character": file_of(f'{{"\\ud800":{entry()}}}', b"1234"),
    "half a character in metadata": file_of('{"__metadata__":{"a":"\\ud800"}}'),
    "name twice": file_of(f'{{"a":{entry()},"a":{entry()}}}', b"1234"),
    "field twice": file_of('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "metadata twice": file_of('{"__metadata__":{},"__metadata__":{}}'),
    "metadata of numbers": file_of('{"__metadata__":{"a":1}}'),
    "metadata null": file_of('{"__metadata__":null}'),
    "field too many": file_of('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"device":"cpu"}}', b"1234"),
    "field too few": file_of('{"a":{"dtype":"F32","shape":[1]}}', b"1234"),
    "entry is a list": file_of('{"a":[]}'),
    "unknown dtype": one(dtype="F31"),
    "dtype is a list": file_of('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "negative size": one(shape="[-1,-1]"),
    "negative zero": one(offsets="[-0,4]"),
    "float size": one(shape="[1.0]"),
    "bool size": one(shape="[true]"),
    "bool offset": one(offsets="[false,4]"),
    "float offset": one(offsets="[0,4e0]"),
    "NaN": one(offsets="[NaN,4]"),
    "infinity": one(offsets="[0,Infinity]"),
    "shape is a number": one(shape="1"),
    "shape is text": one(shape='"1"'),
    "sizes that overflow to 4": one(shape=f"[{2**33},{2**31},1]"),
    "sizes that overflow to 1": one(shape=f"[{2**64 + 1}]"),
    "empty and too large": one(b"", shape=f"[0,{2**62},{2**62}]", offsets="[0,0]"),
    "17 axes": one(shape=str([1] * 17)),
    "one offset": one(offsets="[0]"),
    "three offsets": one(offsets="[0,4,8]"),
    "offsets apart by other than the shape": one(b"12345", offsets="[0,5]"),
    "offsets backwards": one(offsets="[4,0]"),
    "offsets beyond the end": one(b"123", offsets="[0,4]"),
    "hole before": one(b"12345678", offsets="[4,8]"),
    "hole between": file_of(f'{{"a":{entry()},"b":{entry(offsets="[8,12]")}}}', b"1234" * 3),
    "hole after": one(b"12345"),
    "overlap": file_of(f'{{"a":{entry()},"b":{entry(offsets="[2,6]")}}}', b"123456"),
    "twice the same place": file_of(f'{{"a":{entry()},"b":{entry()}}}', b"1234"),
    "empty tensor within another": file_of(f'{{"a":{entry()},"b":{entry(shape="[0]", offsets="[2,2]")}}}', b"1234"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_exact_is_one_user_error_at_once(tmp_path, case):
    (tmp_path / "a.safetensors").write_bytes(BAD_FILES[case])
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        open_tensors(tmp_path / "a.safetensors")
    assert time.process_time() - began < 2
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("length", "size"), [(100_000_001, 100_000_100), (93, 100), (100_000_000, 100_000_007), (2**64 - 1, 100)])
def test_a_header_over_the_limit_or_longer_than_its_file_is_not_read(tmp_path, length, size):
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
    os.truncate(tmp_path / "a", size)  # longer, but with nothing on the disk
    with pytest.raises(UserError, match=f"first 8 bytes give its header {length} bytes"):
        open_tensors(tmp_path / "a")


def test_a_missing_path_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        open_tensors(tmp_path / "missing")


def test_a_key_is_for_pytorch_files_alone(tmp_path):
    write(tmp_path / "a", {"a": np.zeros(2)})
    with pytest.raises(UserError, match="Leave the key out"):
        open_tensors(tmp_path / "a", key="module")


def test_the_format_is_told_by_the_content_and_not_by_the_name(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    safetensors.torch.save_file(tensors, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert same_bits(read(tmp_path / name)["a"], np.arange(3, dtype=np.float32))


VALUES = [0, 1, 2, 3, 4, 8, 16, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1.0, 0.5, True, False, None, "4", [], [4], {}]


def damaged_text(text: str, rng: random.Random) -> str:
    """One mutation of the header as JSON."""
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    row, other = header[rng.choice(names)], header[rng.choice(names)]
    field = rng.choice(["shape", "data_offsets"])
    match rng.randrange(9):
        case 0:
            row[field], other[field] = other[field], row[field]
        case 1:
            row[field] = [rng.choice(VALUES) for _ in range(rng.randrange(4))]
        case 2 if row[field]:
            row[field][rng.randrange(len(row[field]))] = rng.choice(VALUES)
        case 3:
            row[rng.choice(["dtype", "shape", "data_offsets", "extra"])] = rng.choice(VALUES)
        case 4:
            row["dtype"] = rng.choice(["F32", "I32", "U32", "F64", "F16", "BF16", "U8", "BOOL", "F4", "C64", "f32", ""])
        case 5:
            del row[rng.choice(list(row))]
        case 6:
            header["__metadata__"] = rng.choice([*VALUES, {"a": "b"}, {"a": rng.choice(VALUES)}])
        case 7:
            row["data_offsets"] = [offset + rng.choice([-4, -1, 1, 4]) for offset in row["data_offsets"]]
        case _:  # a key twice: the first name takes the place of another
            return text.replace(f'"{rng.choice(names)}"', f'"{names[0]}"')
    return json.dumps(header, separators=(",", ":"))


def damaged(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(3)
    if kind == 0:
        return file_of(damaged_text(text.decode(), rng), rest)
    flipped = bytearray(data[: 8 + length])
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        # Half of them are characters that JSON is made of: other ones rarely get beyond the parser.
        byte = rng.randrange(256) if kind == 1 else rng.choice(b'0123456789-.eE[]{}:,"\\ntf \t')
        flipped[rng.randrange(0 if rng.random() < 0.1 else 8, len(flipped))] = byte
    return bytes(flipped) + rest


def test_10000_damaged_headers_are_user_errors_or_what_safetensors_reads(tmp_path):
    tensors = {"a": random_bits("float32", (2, 3)), "b": random_bits("int32", (6,)), "c": random_bits("uint8", (4, 1)), "d": np.zeros(0)}
    path = tmp_path / "a.safetensors"
    write(path, tensors, metadata={"format": "pt"})
    data = path.read_bytes()
    rng = random.Random(0)
    names = {name: row["dtype"] for name, row in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).items() if "dtype" in row}
    assert set(names) == set(tensors)
    read_well = 0
    for _ in range(10_000):
        mutant = damaged(data, rng)
        overwrite(path, mutant)
        try:
            opened = open_tensors(path)
        except UserError:
            continue
        theirs = deserialized(mutant)
        with safetensors.safe_open(path, "numpy") as file:
            assert opened.metadata == (file.metadata() or {})
        assert opened.tensors.keys() == theirs.keys()
        for name, tensor in opened.tensors.items():
            assert (list(tensor.shape), tensor.read().tobytes()) == theirs[name][1:]
        read_well += 1
    assert 300 < read_well < 3000  # Names and strings may change, and whatever else is seen to.
