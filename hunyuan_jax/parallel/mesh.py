"""The device mesh: axes `data`, `fsdp`, `sequence`, `tensor`, outermost first."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hunyuan_jax.errors import UserError

SEQUENCE = "sequence"  # the axis whose devices share the tokens of a sample, or the rows of its frames
AXES = ("data", "fsdp", SEQUENCE, "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1


def axis_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each axis. Raises `UserError` where the axes do not multiply to `count`."""
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or known > count or count % known:
        raise _no_mesh(sizes, count)
    sizes = [count // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        raise _no_mesh(sizes, count)
    return dict(zip(AXES, sizes, strict=True))


def _no_mesh(sizes: Sequence[int], count: int) -> UserError:
    """The error of a mesh that does not fit, which names the nearest that does: of all, the one whose sizes change least, as ratios."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    fitting = [(*three, count // math.prod(three)) for three in itertools.product(divisors, repeat=3) if count % math.prod(three) == 0]
    change = lambda found: sum(abs(math.log(n / size)) for n, size in zip(found, sizes, strict=True) if size > 0)  # noqa: E731
    close = min(fitting, key=lambda found: (round(change(found), 9), found[3], found[2], -found[1]))
    said = lambda found: ", ".join(f"{axis}={size}" for axis, size in zip(AXES, found, strict=True))  # noqa: E731
    return UserError(
        f"A mesh of {said(sizes)} does not fit {count} devices, to whose number the axes must multiply (one may be -1, for the rest). "
        f"The nearest that does is {said(close)}."
    )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over devices, by default all. Raises `UserError` where the axes do not multiply to their number."""
    devices = list(devices or jax.devices())
    sizes = axis_sizes(config, len(devices))
    return Mesh(_arrange(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the mesh's shape, neighbours on the network next to each other, `data` outermost across the slices of TPUs."""
    slices = {getattr(device, "slice_index", 0) for device in devices} if devices[0].platform == "tpu" else {0}
    if sizes[0] % len(slices):
        raise UserError(f"mesh.data={sizes[0]} cannot be spread over {len(slices)} slices of TPUs; set it to a multiple of their number.")
    within = (sizes[0] // len(slices), *sizes[1:])
    across = (len(slices), *(1 for _ in sizes[1:]))
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
