"""What `torch.save` wrote is read as torch reads it, and a file made to do harm does nothing and is one `UserError`."""

import argparse
import collections
import dataclasses
import enum
import io
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax import inert_pickle
from hunyuan_jax.errors import UserError
from hunyuan_jax.inert_pickle import Opaque
from hunyuan_jax.stored_tensor import StoredTensor
from hunyuan_jax.tensor_files import open_tensors
from hunyuan_jax.torch_pickle import read_torch_file, tensors_in
from tests.test_tensor_files import bytes_of, overwrite

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Any bits at all, so NaNs with payloads too."""
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(stored: StoredTensor, tensor: torch.Tensor) -> bool:
    array = stored.read()
    same_kind = array.dtype.name == str(tensor.dtype).removeprefix("torch.") and array.shape == tuple(tensor.shape) == stored.shape
    return same_kind and array.tobytes() == bytes_of(tensor)


def same_tensors(path: Path, tensors: dict[str, torch.Tensor], **options) -> bool:
    stored = open_tensors(path, **options).tensors
    return list(stored) == list(tensors) and all(same_bits(stored[name], tensor) for name, tensor in tensors.items())


def saved(tmp_path: Path, value) -> Path:
    file = io.BytesIO()
    torch.save(value, file)
    overwrite(tmp_path / "a.pt", file.getvalue())
    return tmp_path / "a.pt"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype):
    shapes = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (1, 2, 3, 4, 5)]
    tensors = {f"t{n}": random_tensor(dtype, shape, seed=n) for n, shape in enumerate(shapes)}
    assert same_tensors(saved(tmp_path, tensors), tensors)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_view_is_read_as_torch_sees_it(tmp_path_factory, data):
    base = random_tensor(torch.int16, (4, 5, 6))
    index = data.draw(st.tuples(*[st.builds(slice, st.integers(0, size), st.integers(0, size), st.integers(1, 3)) for size in base.shape]))
    axes = data.draw(st.permutations(range(3)))
    view = base[index].permute(axes)
    path = saved(tmp_path_factory.mktemp("files"), {"base": base, "view": view})
    assert same_tensors(path, {"base": base, "view": view})
    part = data.draw(st.tuples(*[st.builds(slice, st.integers(0, size), st.integers(0, size), st.integers(1, 2)) for size in view.shape]))
    assert np.array_equal(open_tensors(path).tensors["view"].read_slice(part), view[part].numpy())


def test_shared_storages_are_read_once_for_each_view(tmp_path):
    base = torch.arange(24.0)
    tensors = {"whole": base, "tail": base[7:], "t": base.reshape(4, 6).T, "again": base, "one": base[23], "none": base[24:]}
    path = saved(tmp_path, tensors)
    assert same_tensors(path, tensors)
    stored = open_tensors(path).tensors
    assert stored["tail"].offset == stored["whole"].offset + 28
    assert stored["tail"].read().nbytes == 17 * 4


def test_the_state_dict_of_a_module_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3), torch.nn.Linear(3, 2)).to(torch.bfloat16)
    assert same_tensors(saved(tmp_path, module.state_dict()), module.state_dict())
    assert same_tensors(saved(tmp_path, dict(module.named_parameters())), dict(module.named_parameters()))


def test_a_state_dict_is_found_where_it_usually_is(tmp_path):
    one, two = collections.OrderedDict(w=torch.ones(2)), collections.OrderedDict(w=torch.zeros(2))
    assert same_tensors(saved(tmp_path, one), one)
    for name in ("module", "ema", "state_dict"):
        assert same_tensors(saved(tmp_path, {"epoch": 3, name: one}), one)
    for name in ("ema", "state_dict"):
        assert same_tensors(saved(tmp_path, {name: two, "module": one}), one)
        assert same_tensors(tmp_path / "a.pt", two, key=name)
    assert same_tensors(saved(tmp_path, {"mine": two, "module": one}), two, key="mine")
    with pytest.raises(UserError, match="Choose one of these keys"):
        open_tensors(saved(tmp_path, {"ema": one, "state_dict": one}))
    with pytest.raises(UserError, match=r"no dict under 'model'; it has under \['ema', 'state_dict'\]"):
        open_tensors(tmp_path / "a.pt", key="model")
    with pytest.raises(UserError, match=r"type int under 'epoch'.*\['model'\]"):
        open_tensors(saved(tmp_path, {"epoch": 1, "model": one}))


def test_plain_values_are_read_as_they_are(tmp_path):
    value = {
        "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**70), 0.1, float("inf")],
        "others": (None, True, False, "", "naïve ☃ 𝄞", (), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "keys": {3: "a", 2.5: "b", None: "c", True: "d"},
        "long": list(range(3000)),
        "wide": {f"k{n}": n for n in range(3000)},
    }
    assert read_torch_file(saved(tmp_path, value)) == value


class Model(torch.nn.Module):
    pass


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1


def test_what_lies_beside_a_state_dict_may_be_of_any_class(tmp_path):
    tensors = {"w": torch.ones(2)}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    beside = {
        "args": argparse.Namespace(lr=1.0),
        "optimizer": optimizer.state_dict(),
        "model": Model(),
        "settings": Settings(),
        "colour": [Colour.RED, {Colour.RED: 1}],
        "shapes": [collections.OrderedDict(w=torch.Size([2])), {(1, 2): 3}],
        "pairs": {(1, 2): "a", (3, 4): "b"},
        "names": {"a", "b"},
        "bytes": b"abc",
        "counts": collections.defaultdict(list, a=[1]),
        "queue": collections.deque([1, 2]),
        "path": Path("a"),
        "array": np.arange(3),
        "number": np.float32(1),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "sparse": torch.eye(2).to_sparse(),
        "function": os.path.join,
    }
    path = saved(tmp_path, {"module": tensors, **beside})
    assert same_tensors(path, tensors)
    value = read_torch_file(path)
    assert value["args"].name == "argparse.Namespace"
    assert value["complex"].name == "torch.ComplexFloatStorage"
    assert isinstance(value["counts"], Opaque)
    assert list(value["pairs"].values()) == ["a", "b"]  # though neither key is read
    assert value["optimizer"]["state"][0]["exp_avg"].read().shape == (3,)


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (torch.zeros(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch._neg_view(torch.ones(2)), "negative bit"),
        (torch.ones(2).as_subclass(Marked), "torch._tensor._rebuild_from_type_v2"),
        (torch.ones(2, dtype=torch.float8_e8m0fnu), "torch.float8_e8m0fnu"),
        (argparse.Namespace(), "argparse.Namespace"),
    ],
)
def test_a_state_dict_with_something_else_is_refused_by_its_name(tmp_path, entry, name):
    with pytest.raises(UserError, match=f"{name}' under 'w'"):
        open_tensors(saved(tmp_path, {"module": {"v": torch.ones(2), "w": entry}}))


def test_what_is_no_state_dict_is_refused(tmp_path):
    for value in (torch.ones(2), [torch.ones(2)], {}, {"module": {}}, {1: torch.ones(2)}, {"a": None}, Model(), 3):
        with pytest.raises(UserError):
            open_tensors(saved(tmp_path, value))
    with pytest.raises(UserError, match="The file holds a value of type int"):
        tensors_in(3)


def test_the_format_before_version_1_6_is_refused_with_what_to_do(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    for read in (open_tensors, read_torch_file):
        with pytest.raises(UserError, match=r"before 1\.6.*torch\.save\(torch\.load"):
            read(tmp_path / "a.pt")


# Pickles made to do harm


ECHO_RAN = "COMMAND"  # replaced by a command that makes a file


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


RUN = text(ECHO_RAN)
SYSTEM = glob("posix", "system") + RUN + b"\x85R"
LONG = b"\x8a"


def whole(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return LONG + bytes([len(data)]) + data


FLOATS, FIRST, SIX = glob("torch", "FloatStorage"), text("0"), whole(6)
NO_HOOKS = glob("collections", "OrderedDict") + b")R"


def storage(*, kind=FLOATS, key=FIRST, count=SIX) -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + count + b"tQ"


def tensor(
    *, store=None, offset=b"K\0", shape=b"K\2K\3\x86", strides=b"K\3K\1\x86", hooks=NO_HOOKS, more=b"", version="_rebuild_tensor_v2"
) -> bytes:
    arguments = (storage() if store is None else store) + offset + shape + strides + b"\x89" + hooks + more
    return glob("torch._utils", version) + b"(" + arguments + b"tR"


def in_dict(value: bytes, *, name: bytes = text("w")) -> bytes:
    return b"}" + name + value + b"s"


def beside(value: bytes) -> bytes:
    """A state dict of one tensor under "module", which is read unless `value` is wrong in itself."""
    return b"}(" + text("module") + in_dict(tensor()) + text("args") + value + b"u"


def laughs(levels: int) -> bytes:
    """A tuple of two of a tuple of two of ..., which takes 2**levels to walk."""
    return b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(levels))


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(whole(value) for value in values) + b"t"


DEEP = b")" + b"\x85" * 500_000

# What stands between PROTO 2 and STOP.
BODIES = {
    # Calls
    "posix.system": SYSTEM,
    "os.system": glob("os", "system") + RUN + b"\x85R",
    "nt.system": glob("nt", "system") + RUN + b"\x85R",
    "os.popen": glob("os", "popen") + RUN + b"\x85R",
    "subprocess.Popen": glob("subprocess", "Popen") + RUN + b"K\0\x86R",
    "builtins.eval": glob("builtins", "eval") + text(f"__import__('os').system('{ECHO_RAN}')") + b"\x85R",
    "__builtin__.eval": glob("__builtin__", "eval") + text(f"__import__('os').system('{ECHO_RAN}')") + b"\x85R",
    "builtins.exec": glob("builtins", "exec") + text(f"import os; os.system('{ECHO_RAN}')") + b"\x85R",
    "builtins.getattr": glob("builtins", "getattr") + glob("os", "") + text("system") + b"\x86R" + RUN + b"\x85R",
    "torch.os.system": glob("torch", "os.system") + RUN + b"\x85R",
    "torch._utils of another module": glob("torch._utils", "sys.modules") + RUN + b"\x85R",
    "an allowed name's attribute": glob("collections", "OrderedDict.fromkeys") + RUN + b"\x85R",
    "an allowed name's globals": glob("torch._utils", "_rebuild_tensor_v2.__globals__") + RUN + b"\x85R",
    "importlib": glob("importlib", "import_module") + text("os") + b"\x85R",
    "runpy": glob("runpy", "run_path") + text("a.py") + b"\x85R",
    "torch.load": glob("torch", "load") + text("/tmp/other.pt") + b"\x85R",
    "torch.hub.load": glob("torch.hub", "load") + text("a/b") + text("c") + b"\x86R",
    "pickle.loads": glob("pickle", "loads") + text("cposix\nsystem\n") + b"\x85R",
    "operator.methodcaller": glob("operator", "methodcaller") + text("system") + RUN + b"\x86R" + glob("os", "") + b"\x85R",
    "functools.partial": glob("functools", "partial") + glob("os", "system") + RUN + b"\x86R" + b")R",
    "numpy exec": glob("numpy.testing._private.utils", "runstring") + RUN + b"}\x86R",
    "call of a call's result": SYSTEM + b")R",
    "call in a dict": in_dict(SYSTEM),
    "call in the module": in_dict(in_dict(SYSTEM), name=text("module")),
    "call as a key": in_dict(tensor(), name=SYSTEM),
    "call as the storage": in_dict(tensor(store=SYSTEM)),
    "call as the class of storage": in_dict(tensor(store=storage(kind=SYSTEM))),
    "call of the class of storage": in_dict(tensor(store=storage(kind=FLOATS + b")R"))),
    "call as the key of storage": in_dict(tensor(store=storage(key=SYSTEM))),
    "call as the offset": in_dict(tensor(offset=SYSTEM)),
    "call as the shape": in_dict(tensor(shape=SYSTEM)),
    "call as a size": in_dict(tensor(shape=SYSTEM + b"K\3\x86")),
    "call as the strides": in_dict(tensor(strides=SYSTEM)),
    "call as the dtype": in_dict(tensor(version="_rebuild_tensor_v3", more=SYSTEM)),
    "call as a parameter": in_dict(glob("torch._utils", "_rebuild_parameter") + SYSTEM + b"\x88" + NO_HOOKS + b"\x87R"),
    "call of a string": beside(text("posix.system") + RUN + b"\x85R"),
    "call of a number": beside(b"K\1" + RUN + b"\x85R"),
    "call of None": beside(b"N)R"),
    "call of a list of arguments": beside(glob("posix", "system") + b"]" + RUN + b"aR"),
    "call of a persistent value": beside(storage() + RUN + b"\x85R"),
    "OrderedDict of pairs": beside(glob("collections", "OrderedDict") + b"]" + text("w") + tensor() + b"\x86a\x85R"),
    "OrderedDict built with NEWOBJ": glob("collections", "OrderedDict") + b")\x81" + text("w") + tensor() + b"s",
    # Other instructions
    "STACK_GLOBAL": beside(text("posix") + text("system") + b"\x93" + RUN + b"\x85R"),
    "INST": beside(b"(" + RUN + b"iposix\nsystem\n"),
    "OBJ": beside(b"(" + glob("posix", "system") + RUN + b"o"),
    "NEWOBJ": glob("posix", "system") + RUN + b"\x85\x81",
    "NEWOBJ of a string": beside(text("posix.system") + RUN + b"\x85\x81"),
    "NEWOBJ without a tuple": beside(glob("posix", "system") + RUN + b"\x81"),
    "NEWOBJ_EX": beside(glob("posix", "system") + RUN + b"\x85}\x92"),
    "EXT1": beside(b"\x82\x01)R"),
    "EXT2": beside(b"\x83\x01\x01)R"),
    "EXT4": beside(b"\x84\x01\x01\x01\x01)R"),
    "BUILD with __setstate__": glob("posix", "system") + b")\x81" + in_dict(glob("os", "system"), name=text("__setstate__")) + b"b",
    "BUILD with a command": glob("posix", "system") + b")\x81" + RUN + b"b",
    "BUILD of a tensor": beside(in_dict(tensor() + in_dict(SYSTEM) + b"b")),
    "BUILD of a list": beside(b"]" + in_dict(SYSTEM) + b"b"),
    "BUILD of a string": beside(text("w") + b"}b"),
    "BUILD of a global": glob("collections", "OrderedDict") + in_dict(SYSTEM, name=text("__class__")) + b"b",
    "PERSID": b"Pposix\n",
    "BINPERSID of a string": beside(text("storage") + b"Q"),
    "BINPERSID of a module": beside(b"(" + text("module") + glob("posix", "system") + text("0") + text("cpu") + b"K\6tQ"),
    "BINPERSID of four": beside(b"(" + text("storage") + glob("torch", "FloatStorage") + text("0") + text("cpu") + b"tQ"),
    "BINPERSID with a string for the class": beside(in_dict(tensor(store=storage(kind=text("torch.FloatStorage"))))),
    "PUT": b"Np0\n.",
    "GET": b"Nq\0g0\n",
    "MEMOIZE": b"N\x94",
    "POP": beside(b"NN0"),
    "POP_MARK": beside(b"N(1"),
    "DUP": beside(b"}2"),
    "LIST": beside(b"(l"),
    "DICT": beside(b"(" + text("w") + tensor() + b"d"),
    "EMPTY_SET": b"\x8f",
    "FROZENSET": b"(\x91",
    "INT": b"I" + b"9" * 10_000 + b"\n",
    "LONG": b"L" + b"9" * 10_000 + b"L\n",
    "FLOAT": b"F1.5\n",
    "STRING": b"S'abc'\n",
    "UNICODE": b"Vabc\n",
    "BINBYTES": b"B\3\0\0\0abc",
    "BINSTRING": b"T\xff\xff\xff\xff",
    "SHORT_BINSTRING": b"U\3abc",
    "SHORT_BINUNICODE": b"\x8c\3abc",
    "LONG4 of 2 GB": b"\x8b\xff\xff\xff\x7f",
    "LONG4 of less than nothing": b"\x8b\xff\xff\xff\xff",
    "BINUNICODE8 of 2**63 bytes": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "BINBYTES8 of 2**63 bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "BYTEARRAY8 of 2**63 bytes": b"\x96" + b"\xff" * 7 + b"\x7f",
    "FRAME of 2**63 bytes": b"\x95" + b"\xff" * 7 + b"\x7f",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "PROTO again": beside(b"\x80\2}"),
    "unknown instruction": b"\xff",
    # Lengths, memo, stack
    "string of 4 GB": b"X\xff\xff\xff\xff",
    "string that ends early": b"X\x10\0\0\0abc",
    "string of broken utf-8": beside(b"X\2\0\0\0\xc3\x28"),
    "half a character": beside(b"X\3\0\0\0\xed\xa0\x80"),
    "LONG1 that ends early": b"\x8a\xffabc",
    "number that ends early": b"J\0",
    "global without an end": b"cposix\nsystem",
    "global without a line": b"c" + b"a" * 100_000,
    "global of broken utf-8": beside(b"c\xc3\x28\n\xff\n)R"),
    "global of a long name": in_dict(glob("a" * 1_000_000, "b") + b")R"),
    "memo index that is not there": beside(b"h\7"),
    "memo index of 2**32": b"j\xff\xff\xff\xff",
    "memo index of 2**32 kept": b"Nr\xff\xff\xff\xff",
    "memo of an empty stack": b"q\0",
    "memo of a mark": b"(q\0",
    "memo changed under way": glob("collections", "OrderedDict") + b"q\0" + glob("posix", "system") + b"q\0" + b"h\0" + RUN + b"\x85R\x87",
    "nothing": b"",
    "stack below its end": b"N\x86",
    "stack below a mark": glob("posix", "system") + b"(" + b"R",
    "mark that is not there": b"Nt",
    "mark left open": b"(" + in_dict(tensor()),
    "two values left": b"}" + in_dict(tensor()),
    "key without a value": beside(b"}(" + text("w") + b"u"),
    "item of a list": beside(b"]" + text("w") + tensor() + b"s"),
    "item of a tuple": beside(b")" + text("w") + tensor() + b"s"),
    "append to a dict": beside(b"}" + tensor() + b"a"),
    "append to a tuple": beside(b")(" + tensor() + b"e"),
    "append to a string": beside(text("w") + b"(" + tensor() + b"e"),
    # Depth and size
    "marks without end": b"(" * 1_000_000,
    "deep tuples": DEEP,
    "deep tuples in a state dict": in_dict(DEEP),
    "deep tuples as a key": in_dict(tensor(), name=DEEP),
    "deep tuples as a shape": in_dict(tensor(shape=DEEP)),
    "deep lists": b"]" * 300_000 + b"a" * 299_999,
    "deep dicts": b"}" + text("module") * 1 + b"q\0" + b"}h\0" * 200_000 + b"Ns" + b"s" * 199_999 + b"s",
    "laughs": laughs(200),
    "laughs in a state dict": in_dict(laughs(200)),
    "laughs as a key": in_dict(tensor(), name=laughs(200)),
    "laughs as a shape": in_dict(tensor(shape=laughs(200))),
    "laughs as a reference": beside(in_dict(laughs(200) + b"Q")),
    "list that contains itself": b"]q\0h\0a",
    "dict that contains itself": b"}q\0" + text("w") + b"h\0s",
    "module that contains itself": b"}q\0" + text("module") + b"h\0s",
    "more instructions than any file needs": beside(b"]" + b"Na" * 1_100_000),
    "list as a key": beside(in_dict(tensor(), name=b"]")),
    "dict as a key": beside(in_dict(tensor(), name=b"}")),
    "tensor as a key": beside(in_dict(tensor(), name=tensor())),
    "storage as a key": beside(in_dict(tensor(), name=storage())),
    "long number as a key": beside(in_dict(tensor(), name=whole(2**64))),
    "long keys that all have one hash": b"}(" + b"".join(whole(n * (2**61 - 1) << 64) + b"N" for n in range(1, 100_000)) + b"u",
    "None as a name": in_dict(tensor(), name=b"N"),
    "number as a name": in_dict(tensor(), name=b"K\1"),
    # Tensors
    "storage that is not there": in_dict(tensor(store=storage(key=text("7")))),
    "storage out of the folder": in_dict(tensor(store=storage(key=text("../data.pkl")))),
    "storage out of the file": in_dict(tensor(store=storage(key=text("/etc/passwd")))),
    "storage smaller than it says": in_dict(tensor(store=storage(count=whole(7)))),
    "storage larger than it says": in_dict(tensor(store=storage(count=whole(5)))),
    "storage of 2**1000": in_dict(tensor(store=storage(count=whole(2**1000)))),
    "storage of less than nothing": in_dict(tensor(store=storage(count=whole(-6)))),
    "storage of a float count": in_dict(tensor(store=storage(count=b"G" + struct.pack(">d", 6)))),
    "storage of another class": in_dict(tensor(store=storage(kind=glob("torch", "DoubleStorage")))),
    "storage of an unknown class": in_dict(tensor(store=storage(kind=glob("torch", "QInt8Storage")))),
    "storage alone": in_dict(storage()),
    "negative offset": in_dict(tensor(offset=whole(-1))),
    "offset beyond the end": in_dict(tensor(offset=whole(1))),
    "offset of 2**1000": in_dict(tensor(offset=whole(2**1000))),
    "offset of a bool": in_dict(tensor(offset=b"\x89")),
    "negative size": in_dict(tensor(shape=numbers(-2, -3))),
    "negative size behind": in_dict(tensor(shape=numbers(2, -3))),
    "sizes of bools": in_dict(tensor(shape=b"\x88\x88\x86")),
    "sizes of floats": in_dict(tensor(shape=(b"G" + struct.pack(">d", 1)) * 2 + b"\x86")),
    "shape of one more row": in_dict(tensor(shape=numbers(3, 3))),
    "shape of 2**62 rows": in_dict(tensor(shape=numbers(2**62, 3))),
    "shape that overflows to 6": in_dict(tensor(shape=numbers(2**63 + 3, 2))),
    "shape empty and too large": in_dict(tensor(shape=numbers(0, 2**62, 2**62), strides=numbers(1, 1, 1))),
    "shape of a list": in_dict(tensor(shape=b"](K\2K\3e")),
    "shape of 17 axes": in_dict(tensor(shape=numbers(*[1] * 17), strides=numbers(*[1] * 17))),
    "shape of 200,000 axes": in_dict(tensor(shape=numbers(*[1] * 200_000), strides=numbers(*[1] * 200_000))),
    "negative strides": in_dict(tensor(strides=numbers(-3, 1), offset=whole(3))),
    "strides too long": in_dict(tensor(strides=numbers(4, 1))),
    "strides of 2**64": in_dict(tensor(strides=numbers(2**64 + 3, 1))),
    "strides of bools": in_dict(tensor(strides=b"\x88\x88\x86")),
    "strides of 0, which make much of little": in_dict(tensor(shape=numbers(2**30, 2**30), strides=numbers(0, 0))),
    "strides of 0, which make 7 of 6": in_dict(tensor(shape=numbers(7), strides=numbers(0))),
    "strides too few": in_dict(tensor(strides=numbers(1))),
    "strides too few for an empty tensor": in_dict(tensor(shape=numbers(0, 3), strides=numbers(1))),
    "strides too many": in_dict(tensor(strides=numbers(3, 1, 1))),
    "arguments too few": in_dict(glob("torch._utils", "_rebuild_tensor_v2") + b"(" + storage() + b"K\0tR"),
    "no arguments": in_dict(glob("torch._utils", "_rebuild_tensor_v2") + b")R"),
    "arguments too many": in_dict(tensor(more=b"NN")),
    "string for a storage": in_dict(tensor(store=text("0"))),
    "tensor for a storage": in_dict(tensor(store=tensor())),
    "version 3 without a dtype": in_dict(tensor(version="_rebuild_tensor_v3")),
    "version 3 with a string for the dtype": in_dict(tensor(version="_rebuild_tensor_v3", more=text("torch.float32"))),
    "version 3 with a class for the dtype": in_dict(tensor(version="_rebuild_tensor_v3", more=glob("torch", "FloatStorage"))),
    "version 3 with a dtype too wide": in_dict(tensor(version="_rebuild_tensor_v3", more=glob("torch", "float64"))),
    "parameter of a string": in_dict(glob("torch._utils", "_rebuild_parameter") + text("w") + b"\x88N\x87R"),
    "parameter of nothing": in_dict(glob("torch._utils", "_rebuild_parameter") + b")R"),
}  # fmt: skip

PROGRAMS = {name: b"\x80\2" + body + b"." for name, body in BODIES.items()} | {
    "protocol 0": b"cposix\nsystem\n(" + b"S'COMMAND'\n" + b"tR.",
    "protocol 1": RUN + b".",
    "protocol 4": b"\x80\4" + in_dict(tensor()) + b".",
    "protocol 255": b"\x80\xff" + in_dict(tensor()) + b".",
    "protocol 4 by pickle": pickle.dumps({"w": 1}, protocol=4),
    "no bytes": b"",
    "no end": b"\x80\2" + in_dict(tensor()),
    "something after the end": b"\x80\2" + in_dict(tensor()) + b".N",
}


@dataclasses.dataclass
class Row:
    """An entry of a zip file; what is given beside name and data is a lie of the directory."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    header: int | None = None
    extra: bytes = b""
    local_name: str | None = None
    local_method: int = 0
    local_magic: bytes = b"PK\3\4"
    local_extra: int = 0


def zip_of(rows: list[Row], *, count=None, size=None, start=None, wide=None, before=b"", after=b"") -> bytes:
    body, directory = before, b""
    for row in rows:
        name, local = row.name.encode(), (row.local_name or row.name).encode()
        header = len(body) if row.header is None else row.header
        sizes = [len(row.data) if given is None else given for given in (row.packed, row.size)]
        body += struct.pack("<4s5H3I2H", row.local_magic, 0, row.flags, row.local_method, 0, 0, 0, *sizes, len(local), row.local_extra)
        body += local + row.data
        lengths = [len(name), len(row.extra), 0, 0, 0]
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, row.flags, row.method, 0, 0, 0, *sizes, *lengths, 0, header)
        directory += name + row.extra
    place = [len(rows) if count is None else count, len(directory) if size is None else size, len(body) if start is None else start]
    end = b""
    if wide is not None:
        wide_place = [honest if lie is None else lie for honest, lie in zip(place, wide, strict=True)]
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, wide_place[0], *wide_place)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory), 1)
        place = [2**16 - 1, 2**32 - 1, 2**32 - 1]
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, place[0], *place, 0)
    return body + directory + end + after


PROGRAM = b"\x80\2" + in_dict(tensor()) + b"."
VALUES = np.arange(6, dtype=np.float32)


def rows(program: bytes = PROGRAM, **lies) -> list[Row]:
    """A file of one tensor; `lies` are told of its storage."""
    return [Row("a/data.pkl", program), Row("a/byteorder", b"little"), Row("a/data/0", VALUES.tobytes(), **lies)]


@pytest.fixture
def harmless(tmp_path, monkeypatch):
    """Runs in an empty folder, with little memory and not for long, and sees that no command made a file there."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, limits[1]))
    began = time.process_time()
    yield
    taken = time.process_time() - began
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert list(folder.iterdir()) == []
    assert taken < 15


def armed(program: bytes) -> bytes:
    """The command, of the same length as the word it stands for."""
    return program.replace(ECHO_RAN.encode(), b">ran;:;")


def test_a_file_put_together_here_is_read(tmp_path):
    for data in (zip_of(rows()), zip_of(rows(), wide=(None, None, None))):
        (tmp_path / "a.pt").write_bytes(data)
        assert np.array_equal(open_tensors(tmp_path / "a.pt").tensors["w"].read(), VALUES.reshape(2, 3))


def test_the_stride_of_one_element_and_the_place_of_none_may_be_anything(tmp_path):
    row = tensor(shape=numbers(1, 6), strides=numbers(2**100, 1))
    none = tensor(shape=numbers(0, 6), strides=numbers(2**100, 1), offset=whole(2**100))
    (tmp_path / "a.pt").write_bytes(zip_of(rows(b"\x80\2" + in_dict(row) + text("none") + none + b"s.")))
    tensors = open_tensors(tmp_path / "a.pt").tensors
    assert np.array_equal(tensors["w"].read(), VALUES.reshape(1, 6))
    assert tensors["none"].read().shape == (0, 6)


def test_sizes_of_64_bits_are_read(tmp_path):
    full = 2**32 - 1
    real = struct.pack("<HHQQQ", 1, 24, 24, 24, len(zip_of(rows()[:2])) - 22 - 46 * 2 - len("a/data.pkla/byteorder"))
    other = struct.pack("<HH4s", 7, 4, b"abcd")
    (tmp_path / "a.pt").write_bytes(zip_of(rows(size=full, packed=full, header=full, extra=other + real + other)))
    assert np.array_equal(open_tensors(tmp_path / "a.pt").tensors["w"].read(), VALUES.reshape(2, 3))


def test_the_commands_used_here_would_make_a_file_if_they_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(armed(b"\x80\2" + SYSTEM + b"."))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_pickle_made_to_do_harm_is_one_user_error_and_nothing_runs(tmp_path, harmless, case):
    (tmp_path / "a.pt").write_bytes(zip_of(rows(armed(PROGRAMS[case]))))
    with pytest.raises(UserError) as caught:
        open_tensors(tmp_path / "a.pt")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["hooks", "beside", "metadata"])
def test_a_call_where_nobody_looks_does_not_run_either(tmp_path, harmless, name):
    body = {
        "hooks": in_dict(tensor(hooks=SYSTEM)),
        "beside": beside(SYSTEM),
        "metadata": in_dict(tensor()) + in_dict(SYSTEM, name=text("_metadata")) + b"b",
    }[name]
    (tmp_path / "a.pt").write_bytes(zip_of(rows(armed(b"\x80\2" + body + b"."))))
    assert open_tensors(tmp_path / "a.pt").tensors["w"].read().shape == (2, 3)


# Zip files made to do harm


def deflated(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", VALUES.tobytes())
    return file.getvalue()


STORED = zip_of(rows())
ZIPS = {
    "deflated": deflated(PROGRAM),
    "deflated bomb": deflated(b"\x80\2" + b"N" * 10_000_000),
    "deflated by the directory alone": zip_of(rows(method=8)),
    "deflated by the header alone": zip_of(rows(local_method=8)),
    "encrypted": zip_of(rows(flags=1)),
    "name out of the folder": zip_of([*rows(), Row("a/../../b", b"")]),
    "name from the root": zip_of([*rows(), Row("/a/b", b"")]),
    "name with a backslash": zip_of([*rows(), Row("a/b\\c", b"")]),
    "name with a zero": zip_of([*rows(), Row("a/b\0c", b"")]),
    "name with an empty part": zip_of([*rows(), Row("a//b", b"")]),
    "name of a folder": zip_of([*rows(), Row("a/b/", b"")]),
    "name of a dot": zip_of([*rows(), Row("a/./b", b"")]),
    "no name": zip_of([*rows(), Row("", b"")]),
    "name of broken utf-8": STORED.replace(b"a/data/0", b"a/data/\xff"),
    "name twice": zip_of([*rows(), rows()[2]]),
    "pickle twice": zip_of([*rows(), rows()[0]]),
    "two folders": zip_of([*rows(), Row("b/data.pkl", PROGRAM)]),
    "file beside the folder": zip_of([*rows(), Row("b", b"")]),
    "no pickle": zip_of(rows()[1:]),
    "no folder": zip_of([Row("data.pkl", PROGRAM)]),
    "no entry": zip_of([]),
    "pickle in a folder below": zip_of([Row("a/b/data.pkl", PROGRAM)]),
    "no storage": zip_of(rows()[:2]),
    "storage shorter than the tensor": zip_of([*rows()[:2], Row("a/data/0", b"1234")]),
    "storage longer than the tensor": zip_of([*rows()[:2], Row("a/data/0", bytes(28))]),
    "storage at another place": zip_of(rows(header=0)),
    "storage beyond the end": zip_of(rows(header=10**6)),
    "storage at 2**64": zip_of(rows(header=2**32 - 1, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1))),
    "storage at the last bytes": zip_of(rows(header=len(STORED) - 10)),
    "storage larger than the file": zip_of(rows(size=10**6, packed=10**6)),
    "storage of 2**64 bytes": zip_of(rows(size=2**32 - 1, packed=2**32 - 1, extra=struct.pack("<HHQQ", 1, 16, 2**64 - 1, 2**64 - 1))),
    "storage that reaches into the directory": zip_of(rows(size=25, packed=25)),
    "storage of two sizes": zip_of(rows(packed=23)),
    "storage of another name": zip_of(rows(local_name="a/data/1")),
    "storage without a header": zip_of(rows(local_magic=b"PK\1\2")),
    "storage behind a long extra field": zip_of(rows(local_extra=2**16 - 1)),
    "full size without its extra field": zip_of(rows(size=2**32 - 1, packed=2**32 - 1)),
    "extra field that ends early": zip_of(rows(size=2**32 - 1, packed=2**32 - 1, extra=struct.pack("<HHI", 1, 16, 24))),
    "extra field of empty parts": zip_of(rows(size=2**32 - 1, extra=bytes(65_532))),
    "entry that reaches into the next": zip_of([Row("a/b", b"", size=40, packed=40), *rows()]),
    "entry within another": zip_of([Row("a/b", zip_of([Row("a/c", b"xyz")])[:36]), Row("a/c", b"xyz", header=33), *rows()]),
    "entry where there is none": zip_of([Row("a/b", b"", header=7), *rows()]),
    "big-endian": zip_of([rows()[0], Row("a/byteorder", b"big"), rows()[2]]),
    "no byte order at all": zip_of([rows()[0], Row("a/byteorder", b""), rows()[2]]),
    "byte order of a megabyte": zip_of([rows()[0], Row("a/byteorder", b"little" * 200_000), rows()[2]]),
    "more entries than there are": zip_of(rows(), count=4),
    "fewer entries than there are": zip_of(rows(), count=2),
    "directory larger than it is": zip_of(rows(), size=10**6),
    "directory smaller than it is": zip_of(rows(), size=46),
    "directory without its last entry": zip_of([*rows(), Row("a/b", b"")], count=3, size=3 * 46 + len("a/data.pkla/byteordera/data/0")),
    "directory elsewhere": zip_of(rows(), start=0),
    "directory beyond the end": zip_of(rows(), start=2**32 - 1),
    "directory at 2**64": zip_of(rows(), wide=(None, None, 2**64 - 1)),
    "directory of 2**64 bytes": zip_of(rows(), wide=(None, 2**64 - 1, None)),
    "directory of 2**64 entries": zip_of(rows(), wide=(2**64 - 1, None, None)),
    "directory over the limit": zip_of([*rows(), *(Row(f"a/{n:065000}", b"") for n in range(260))]),
    "something before": zip_of(rows(), before=b"PK\3\4" + bytes(100), start=50),
    "something after": zip_of(rows(), after=b"x"),
    "comment after": STORED[:-2] + b"\3\0abc",
    "only the beginning": b"PK\3\4",
    "only an end": zip_of([])[-22:],
    "beginning and end": b"PK\3\4" + zip_of([]),
    "beginning of the old format": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
    "pickle without a zip file": PROGRAM,
    "tar": b"a/data.pkl" + bytes(247) + b"ustar" + bytes(762),
}


@pytest.mark.parametrize("case", ZIPS)
def test_a_zip_file_that_is_not_plain_is_one_user_error(tmp_path, harmless, case):
    (tmp_path / "a.pt").write_bytes(ZIPS[case])
    for read in (read_torch_file, open_tensors):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "a.pt")
        assert len(str(caught.value)) < 1000


def test_a_pickle_over_the_limit_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(STORED)
    read_torch_file(tmp_path / "a.pt")
    monkeypatch.setattr(inert_pickle, "MAX_BYTES", len(PROGRAM) - 1)
    with pytest.raises(UserError, match=f"has {len(PROGRAM)} bytes, more than {len(PROGRAM) - 1}"):
        read_torch_file(tmp_path / "a.pt")


def test_missing_files_and_folders_are_user_errors(tmp_path):
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_torch_file(path)


def test_a_file_that_is_cut_off_anywhere_is_a_user_error(tmp_path, harmless):
    data = saved(tmp_path, {"module": {"w": torch.arange(6.0)}}).read_bytes()
    overwrite(tmp_path / "b.pt", data)
    for length in reversed(range(len(data))):
        os.truncate(tmp_path / "b.pt", length)
        with pytest.raises(UserError):
            open_tensors(tmp_path / "b.pt")


def test_3000_damaged_files_are_user_errors_or_tensors_within_the_file(tmp_path, harmless):
    data = saved(tmp_path, {"module": {"w": torch.arange(6.0), "v": torch.ones(2, 3).T}, "args": argparse.Namespace(a=1)}).read_bytes()
    rng = random.Random(0)
    place = data.index(b"\x80\2}")
    well_read = 0
    for _ in range(3000):
        mutant = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            # Mostly in the pickle and in the directory.
            at = rng.randrange(len(data)) if rng.random() < 0.2 else rng.choice([place + rng.randrange(400), -1 - rng.randrange(700)])
            mutant[at] = rng.randrange(256)
        overwrite(tmp_path / "b.pt", mutant)
        try:
            tensors = open_tensors(tmp_path / "b.pt").tensors
        except UserError:
            continue
        for stored in tensors.values():
            stored.read()  # an error if it reaches beyond the file
        well_read += 1
    assert 200 < well_read < 2500
