"""Pickles read as data: nothing is imported, and nothing is called but a given table of functions.

A pickle is a program for a machine with a stack and a memo, and Python's own machine imports and calls what the program says. The
one here has the 32 instructions that protocol 2 needs for plain values and objects, and no way to import: a global is its name
and no more. A call looks that name up in the table; whatever else is called or built becomes an `Opaque`, a name that does
nothing. So what is wanted can be read though objects of unknown classes lie beside it.
"""

import dataclasses
import pickle  # for the names of its instructions alone
import struct
from collections.abc import Callable, Mapping
from typing import Any

# A state dict of 1,000 tensors takes about 150 kB and 25,000 steps. A step can make 64 bytes from one, so who reads a program for
# `run` heeds the first limit, and `run` the second.
MAX_BYTES = 32 * 2**20
MAX_STEPS = 2_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """What a pickle has of a class or function that is not read: the name alone. Each is equal to nothing but itself."""

    name: str


class Global(Opaque):
    """A name as the pickle wrote it; nothing else is looked up when it is called."""


def run(program: bytes, *, calls: Mapping[str, Callable[[tuple], Any]], refer: Callable[[Any], Any]) -> Any:
    """The value of a pickle, in dicts, lists, tuples, strings, numbers and `Opaque`s.

    `calls` makes a value from the arguments of a global that is called, `refer` one from a persistent id. Raises `ValueError` for
    what is no whole pickle of protocol 2. The value may contain itself: do not walk, compare or print it without limit.
    """
    return _Machine(program, calls, refer).run()


class _Machine:
    def __init__(self, program: bytes, calls: Mapping[str, Callable[[tuple], Any]], refer: Callable[[Any], Any]):
        self.program, self.place = program, 0
        self.calls, self.refer = calls, refer
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack under each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.take(2) != pickle.PROTO + b"\2":
            raise ValueError("its pickle is not of protocol 2, which torch.save writes unless told otherwise")
        for _ in range(MAX_STEPS):
            code = self.take(1)
            if code == pickle.STOP:
                return self.result()
            if code not in _INSTRUCTIONS:
                raise ValueError(f"its pickle has the instruction {code!r}, which plain values of protocol 2 never need")
            _INSTRUCTIONS[code](self)
        raise ValueError(f"its pickle has more than {MAX_STEPS} instructions")

    def result(self) -> Any:
        value = self.pop()
        if self.stack or self.below or self.place != len(self.program):
            raise ValueError("its pickle leaves something over")
        return value

    def take(self, count: int) -> bytes:
        taken = self.program[self.place : self.place + count]
        if len(taken) < count:
            raise ValueError("its pickle is cut off")
        self.place += count
        return taken

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def line(self) -> str:
        end = self.program.find(b"\n", self.place)
        if end < 0:
            raise ValueError("its pickle is cut off")
        return str(self.take(end + 1 - self.place)[:-1], "utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes more from the stack than is there")
        return self.stack.pop()

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("its pickle goes back to a mark it has not set")
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def remember(self, index: int) -> None:
        self.memo[index] = self.pop()
        self.push(self.memo[index])

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("its pickle recalls what it has not kept")
        self.push(self.memo[index])

    def append(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list | Opaque):
            raise ValueError("its pickle appends to what is no list")
        if isinstance(target, list):
            target.extend(values)
        self.push(target)

    def set_items(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict | Opaque):
            raise ValueError("its pickle sets items of what is no dict")
        if isinstance(target, dict):
            target.update(zip(map(_as_key, values[::2]), values[1::2], strict=True))
        self.push(target)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what has no name")
        if isinstance(function, Global) and function.name in self.calls:
            self.push(self.calls[function.name](arguments))
        else:
            self.push(Opaque(function.name))

    def new(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, Opaque) or not isinstance(arguments, tuple):
            raise ValueError("its pickle makes an object of what is no class")
        self.push(Opaque(kind.name))

    def build(self) -> None:
        """Attributes are left out, as the `_metadata` of a state dict."""
        _, target = self.pop(), self.pop()
        if not isinstance(target, dict | Opaque):
            raise ValueError("its pickle gives attributes to what has none")
        self.push(target)


def _as_key(key: Any) -> Any:
    """A key of a dict: only what is hashed in short time whoever chose it, unlike deep tuples and long integers."""
    if isinstance(key, tuple):
        return Opaque("tuple")
    if isinstance(key, str | float | Opaque | None) or (isinstance(key, int) and abs(key) < 2**63):
        return key
    raise ValueError("its pickle has a dict with a key that is no string and no number of 64 bits")


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.BININT: lambda machine: machine.push(machine.number("<i")),
    pickle.BININT1: lambda machine: machine.push(machine.number("<B")),
    pickle.BININT2: lambda machine: machine.push(machine.number("<H")),
    pickle.LONG1: lambda machine: machine.push(int.from_bytes(machine.take(machine.number("<B")), "little", signed=True)),
    pickle.BINFLOAT: lambda machine: machine.push(machine.number(">d")),
    pickle.BINUNICODE: lambda machine: machine.push(str(machine.take(machine.number("<I")), "utf-8")),
    pickle.EMPTY_TUPLE: lambda machine: machine.push(()),
    pickle.TUPLE1: lambda machine: machine.push(tuple(machine.pop_many(1))),
    pickle.TUPLE2: lambda machine: machine.push(tuple(machine.pop_many(2))),
    pickle.TUPLE3: lambda machine: machine.push(tuple(machine.pop_many(3))),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.pop_to_mark())),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.APPEND: lambda machine: machine.append(machine.pop_many(1)),
    pickle.APPENDS: lambda machine: machine.append(machine.pop_to_mark()),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.SETITEM: lambda machine: machine.set_items(machine.pop_many(2)),
    pickle.SETITEMS: lambda machine: machine.set_items(machine.pop_to_mark()),
    pickle.MARK: _Machine.mark,
    pickle.BINPUT: lambda machine: machine.remember(machine.number("<B")),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.number("<I")),
    pickle.BINGET: lambda machine: machine.recall(machine.number("<B")),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.number("<I")),
    pickle.GLOBAL: lambda machine: machine.push(Global(f"{machine.line()}.{machine.line()}")),
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.new,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: lambda machine: machine.push(machine.refer(machine.pop())),
}
