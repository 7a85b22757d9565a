"""What a compiled program exchanges and in which order it does things, read from its scheduled HLO.

XLA's own cost analysis counts the body of a loop once and no kernel at all; here a loop's body counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "token": 0, "c64": 8, "c128": 16}  # of types whose name does not say how many bits they have
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations|async_execution_thread)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, the text of its result's shape, its operation, and all that follows."""

    name: str
    shape: str
    operation: str
    rest: str

    @property
    def arrays(self) -> list[int]:
        """Bytes of each array of the result."""
        return [math.ceil(_bytes(dtype) * math.prod(_numbers(sizes))) for dtype, sizes in _SHAPE.findall(self.shape)]

    @property
    def kernel(self) -> str:
        """The name of the Pallas kernel that it calls, or nothing."""
        return self.name if 'custom_call_target="tpu_custom_call"' in self.rest else ""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective: its kind, the axes of the mesh that it goes over, bytes that a device sends each time, and how often."""

    kind: str
    axes: tuple[str, ...]
    sent: float
    times: int
    hidden: bool  # in the background of something else


class Program:
    """The computations of a module by name; their instructions in the order in which they run."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[Instruction] = []
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                lines = self.computations[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif found := _INSTRUCTION.match(line):
                lines.append(Instruction(*found.groups()))  # type: ignore[arg-type]

    def trips(self, loop: Instruction) -> int:
        """How often the body of a `while` runs: what its condition compares with, and 1 where that is not a constant."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
        bounds = [i for i in self.computations[condition[1]] if i.operation == "constant"] if condition else []
        return int(bounds[0].rest.split(")")[0]) if len(bounds) == 1 else 1

    def runs(self) -> dict[str, int]:
        """How often each computation runs."""
        counts: dict[str, int] = {}

        def walk(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name]:
                more = self.trips(instruction) if instruction.operation == "while" else 1
                for called in self.called(instruction):
                    walk(called, times * more)

        walk(self.entry, 1)
        return counts

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """All instructions that run, with how often."""
        for name, times in self.runs().items():
            for instruction in self.computations[name]:
                yield instruction, times

    def called(self, instruction: Instruction) -> list[str]:
        """The names of the computations that an instruction calls, or repeats."""
        names = (part[1:] for called in _CALLED.findall(instruction.rest) for part in called.split(", "))
        return [name for name in names if name in self.computations]

    def holds_kernel(self, instruction: Instruction) -> bool:
        """Whether an instruction is a Pallas kernel, or calls or repeats what has one."""
        return bool(instruction.kernel) or any(self.holds_kernel(i) for name in self.called(instruction) for i in self.computations[name])

    def kernels(self) -> dict[str, int]:
        """How often each Pallas kernel runs, by its name without number."""
        counts: dict[str, int] = {}
        for instruction, times in self.instructions():
            if instruction.kernel:
                name = re.sub(r"[.\d]+$", "", instruction.kernel)
                counts[name] = counts.get(name, 0) + times
        return counts

    def exchanges(self, mesh: Mapping[str, int]) -> list[Exchange]:
        """The collectives, on a mesh of axes of these sizes, outermost first."""
        found = []
        for instruction, times in self.instructions():
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                group = _group(instruction.rest, math.prod(mesh.values()))
                if len(group) == 1:
                    continue
                hidden = instruction.operation.endswith("-start") or "async_collective" in instruction.rest
                found.append(Exchange(kind, _axes(group, mesh), _sent(kind, instruction, len(group)), times, hidden))
        return found


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """Bytes that each of `size` devices sends, where collectives go around a ring."""
    arrays = instruction.arrays
    if kind == "collective-permute":
        return max(arrays)
    if instruction.operation.endswith("-start") and kind != "all-reduce":  # which says its results alone
        arrays = arrays[len(arrays) // 2 :]  # operands come before results
    share = {"all-reduce": 2.0, "reduce-scatter": float(size)}.get(kind, 1.0)
    return share * sum(arrays) * (size - 1) / size


def _bytes(dtype: str) -> float:
    """Of a number of a type such as "f32", "s4" or "f8e4m3fn". Raises `ValueError` for a name that says no width."""
    if dtype in BYTES:
        return BYTES[dtype]
    if (width := re.match(r"[fsu](\d+)", dtype)) is None:
        raise ValueError(f"A compiled program has numbers of type {dtype!r}, whose size is not known here; add it to hlo.BYTES.")
    return int(width[1]) / 8


def _group(rest: str, devices: int) -> list[int]:
    """The first group of devices that exchange; two of them for a permute. Raises `ValueError` for a notation that is not known."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(pairs[1]), int(pairs[2])]
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(n) for n in explicit[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _numbered(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", rest)
    if named is None:
        if "replica_groups={}" in rest:
            return list(range(devices))
        raise ValueError(f"A compiled program exchanges between devices that cannot be read: {rest[:200]}")
    axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    ids = _numbered(named[2] or ",".join(axes.values()), named[3]).reshape([int(size) for size in axes.values()])
    chosen = re.findall(r"'(\w+)'", named[4])
    return ids[tuple(slice(None) if axis in chosen else 0 for axis in axes)].ravel().tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _numbered(sizes: str, order: str | None) -> np.ndarray:
    """Devices in this shape, its dimensions in this order."""
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return ids.transpose(_numbers(order)) if order else ids


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which a group's devices lie apart."""
    places = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)
