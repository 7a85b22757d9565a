"""What accelerators can do, as their makers state it: the denominators of every utilisation and the limits of every plan.

A TPU of the generation tpu7x is two devices to JAX, any other one; numbers are of one device. Links are those of a torus, in one
direction (Google Cloud's system pages; the rates per link as in "How to Scale Your Model"); of GPUs, the NVLink of a node.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: dense bfloat16 FLOPs a second, bytes of memory that a program may use, bytes a second to it and over one link."""

    name: str
    kind: str  # a part of JAX's `device_kind`
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    devices: int = 1  # of a chip


GIB = 2**30
CHIPS = (
    Chip("v4", "TPU v4", 275e12, 31.25 * GIB, 1228e9, 45e9),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 45e9),
    Chip("v5e", "TPU v5e", 197e12, 15.75 * GIB, 819e9, 45e9),
    Chip("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 90e9),
    Chip("v6e", "TPU v6", 918e12, 31.25 * GIB, 1640e9, 90e9),
    Chip("tpu7x", "TPU7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9, devices=2),
    Chip("h200", "H200", 989.4e12, 139 * GIB, 4800e9, 450e9),
    Chip("h100pcie", "H100 PCIe", 756e12, 78 * GIB, 2000e9, 64e9),
    Chip("h100", "H100", 989.4e12, 78 * GIB, 3350e9, 450e9),
    Chip("a100", "A100", 312e12, 78 * GIB, 2039e9, 300e9),
)


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip of a JAX device of this kind, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None where it is not known."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def chip_named(name: str) -> Chip:
    """The chip of a short name, such as "v5p" or "h100"; KeyError where there is none."""
    return {chip.name: chip for chip in CHIPS}[name]


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device of this kind; None where it is not known."""
    chip = chip_of_kind(device_kind)
    return chip.flops if chip else None
