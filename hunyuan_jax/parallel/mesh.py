"""The device mesh: axes `data`, `fsdp`, `sequence`, `tensor`, outermost first."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from hunyuan_jax.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over devices, by default all. Raises `UserError` where the axes do not multiply to their number."""
    count = len(devices or jax.devices())
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or known > count or count % known:
        raise UserError(f"A mesh of {dict(zip(AXES, sizes, strict=True))} does not fit {count} devices; the axes must multiply to {count}.")
    sizes = [count // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        raise UserError(
            f"A mesh of {dict(zip(AXES, sizes, strict=True))} has {math.prod(sizes)} places for {count} devices; set one axis to -1."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
