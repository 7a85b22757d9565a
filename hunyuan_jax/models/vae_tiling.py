"""Clips of any length and size through the VAE, in tiles that overlap and are blended: the algorithm of the released model.

    temporal tiles   64 + 1 frames, begun every 48; after the first, a tile's first output frame is dropped
    spatial tiles    256 x 256 pixels, begun every 192; smaller at the lower and right edges
    blend            out = before (1 - i/e) + here i/e  over the e positions two tiles share

Blending goes in order and in place: a tile is blended with the tile above, then with the one at its left, each already blended
itself and not yet cut to what is kept of it; whole frames are then blended with the temporal tile before. Tiling is
another function than the VAE, since group norm takes its statistics per tile; the released model was trained with both.

Tiles of equal shape share one compiled program and run one after another, a tile of one clip per device at a time. Pieces of the
result are given as they come, in host memory: `encode_pieces` and `decode_pieces` hold one temporal tile, however long the
video. `in_tiles` is the same within a compiled program, for training: a clip of at most a few tiles, followed by gradients.
Constants from the released configuration; paper section 4.1.2 ("Inference").
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import VAE, Posterior, VAEConfig, abstract_params

Method = Literal["moments", "decode"]  # of VAE
Size = tuple[int, int, int]  # frames, height, width
Run = Callable[[Sequence[Any]], list[Any]]  # inputs [B, ...] of tiles, which may differ in shape, to their outputs [B, ...]
Video = Any  # an array [B, T, H, W, C], or what has its shape and slices like one: a memory-mapped file

# Tiles that `Tiling.within` chooses from, frames and pixels on a side, smallest first; the released one is among them.
LADDER = ((16, 32), (16, 64), (16, 96), (16, 128), (16, 192), (16, 256), (32, 256), (48, 256), (64, 256), (64, 320), (64, 384), (64, 512))
PROBE = (16, 64)  # the tile whose memory is compiled first, to tell which of the others to compile


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Tiles along one axis: their length and stride in the input, how much is kept and how much blended in the output."""

    tile: int
    stride: int
    kept: int
    blended: int

    def starts(self, length: int) -> range:
        return range(0, length, self.stride)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Frames, height and width of a tile and of what two neighbours share, in frames and pixels; the defaults are the released ones.

    A clip no longer than `tile` is not cut in time, one no higher and no wider not in space. Tiles in time take one frame more.
    `at_once` has `in_tiles` code all tiles of a shape together: that needs their memory, and is faster where tiles are small, above all
    on CPUs, where XLA's convolutions are several times slower within a loop.
    """

    tile: Size = (64, 256, 256)
    overlap: Size = (16, 64, 64)
    at_once: bool = False

    def __post_init__(self) -> None:
        for name in ("tile", "overlap"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(0 <= shared < tile for tile, shared in zip(self.tile, self.overlap, strict=True)):
            raise UserError(f"Tiling: an overlap must be at least 0 and less than the tile, not {self.overlap} of {self.tile}.")

    @classmethod
    def square(cls, frames: int, side: int) -> "Tiling":
        """Square tiles that share a quarter with each neighbour, as the released ones do."""
        return cls(tile=(frames, side, side), overlap=(frames // 4, side // 4, side // 4))

    @classmethod
    def within(cls, memory_bytes: int, config: VAEConfig, *, device: Any = None) -> "Tiling":
        """The largest square tiling of `LADDER` that encodes and decodes in at most `memory_bytes` of a device's memory.

        It rests on XLA's own account of the compiled programs for `device` (by default the first one): parameters in float32,
        the tile, its result and all temporaries. A small tile is compiled, the others' memory is taken to grow with their volume,
        and what this chooses is compiled too and made smaller until it fits; two or three pairs of programs are compiled in all.
        What the runtime itself holds comes on top. Raises `UserError` where the smallest tile does not fit.
        """
        fixed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params(config)))
        needed = cls.square(*PROBE).device_bytes(config, device=device)
        per_volume = (needed - fixed) / (PROBE[0] * PROBE[1] ** 2)
        for frames, side in reversed(LADDER):
            tiling = cls.square(frames, side)
            if (frames, side) != LADDER[0] and fixed + per_volume * frames * side**2 > memory_bytes:
                continue
            needed = tiling.device_bytes(config, device=device)
            if needed <= memory_bytes:
                return tiling
        raise UserError(
            f"Tiling: the smallest tile needs {needed / 2**20:.0f} MiB, but the bound is {memory_bytes / 2**20:.0f} MiB; "
            "allow more memory, or use a narrower dtype."
        )

    def device_bytes(self, config: VAEConfig, *, device: Any = None) -> int:
        """What one device holds at most to encode or decode one tile, by XLA's account, parameters included. Compiles both."""
        frames, height, width = self.tile
        shapes: dict[Method, tuple[int, ...]] = {"moments": (frames + 1, height, width, config.in_channels)}
        shapes["decode"] = config.latent_shape(*shapes["moments"][:3])
        coder = functools.partial(_coder, config, devices=(device or jax.local_devices()[0],))
        needed = []
        for method, shape in shapes.items():
            one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            memory = coder(method).lower(abstract_params(config), one).compile().memory_analysis()
            needed.append(memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes)
        return max(needed)

    def check(self, config: VAEConfig) -> None:
        """Raises `UserError` where tiles and overlaps are no multiples of the VAE's compression."""
        self._axes(config, "moments")

    def _axes(self, config: VAEConfig, method: Method) -> tuple[_Axis, _Axis, _Axis]:
        axes = []
        factors = (config.temporal_compression, config.spatial_compression, config.spatial_compression)
        for tile, shared, factor in zip(self.tile, self.overlap, factors, strict=True):
            if tile % factor or shared % factor:
                raise UserError(f"Tiling: tiles and overlaps must be multiples of {factors}, not {self.tile} and {self.overlap}.")
            stride = tile - shared
            if method == "decode":
                axes.append(_Axis(tile // factor, stride // factor, stride, shared))
            else:
                axes.append(_Axis(tile, stride, stride // factor, shared // factor))
        return axes[0], axes[1], axes[2]


def padded_size(config: VAEConfig, size: Size) -> Size:
    """The size of a clip that the VAE can represent: 4n + 1 frames, height and width multiples of 8, none smaller than before."""
    frames, height, width = size
    if min(size) < 1:
        raise UserError(f"VAE: a clip needs at least one frame of one pixel, not {frames} x {height} x {width}.")
    time, space = config.temporal_compression, config.spatial_compression
    return frames + (1 - frames) % time, height + -height % space, width + -width % space


def encode_tiled(
    config: VAEConfig, params: Any, frames: Video, tiling: Tiling, *, devices: Sequence[jax.Device] | None = None
) -> Posterior:
    """The posterior of frames in [-1, 1], of any number and size.

    Where frames are not 4n + 1 the last is repeated, where height or width is no multiple of 8 the last row or column is: the
    posterior is that of the clip of `padded_size`. `devices`, by default all of this process, each take a tile at a time.
    """
    return Posterior.from_moments(jnp.asarray(np.concatenate(list(_moments(config, params, frames, tiling, devices)), axis=1)))


def decode_tiled(
    config: VAEConfig,
    params: Any,
    latents: Video,
    tiling: Tiling,
    *,
    size: Size | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Float[np.ndarray, "B T2 H W 3"]:
    """Frames of unscaled latents, not clipped to [-1, 1]; with `size` (frames, height, width) cut to a clip that was padded to encode.

    Raises `UserError` where a clip of `size` has not these latents. `devices` as in `encode_tiled`.
    """
    return np.concatenate(list(decode_pieces(config, params, latents, tiling, size=size, devices=devices)), axis=1)


def encode_pieces(
    config: VAEConfig, params: Any, frames: Video, tiling: Tiling, *, devices: Sequence[jax.Device] | None = None
) -> Iterator[Posterior]:
    """What `encode_tiled` gives, piece after piece in time. Only the frames of one tile are read at a time."""
    for moments in _moments(config, params, frames, tiling, devices):
        yield Posterior.from_moments(jnp.asarray(moments))


def decode_pieces(
    config: VAEConfig,
    params: Any,
    latents: Video,
    tiling: Tiling,
    *,
    size: Size | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Float[np.ndarray, "B T2 H W 3"]]:
    """What `decode_tiled` gives, piece after piece in time. Only the latents of one tile are read at a time."""
    _, frames, rows, columns, _ = latents.shape
    time, space = config.temporal_compression, config.spatial_compression
    whole = (1 + time * (frames - 1), space * rows, space * columns)
    left, height, width = size or whole
    if padded_size(config, (left, height, width)) != whole:
        raise UserError(f"VAE: these latents are of a clip padded to {whole}, which one of {size} is not; give the size it was encoded at.")

    def read(start: int, stop: int) -> np.ndarray:
        return np.asarray(latents[:, start:stop], np.float32)

    for piece in _pieces(_Tiles(config, params, "decode", devices).run, read, whole_in=frames, axes=tiling._axes(config, "decode")):
        yield piece[:, :left, :height, :width]
        left -= min(left, piece.shape[1])


def _moments(config: VAEConfig, params: Any, frames: Video, tiling: Tiling, devices: Any) -> Iterator[np.ndarray]:
    _, length, height, width, _ = frames.shape
    padded = padded_size(config, (length, height, width))

    def read(start: int, stop: int) -> np.ndarray:
        found = np.asarray(frames[:, start:stop], np.float32)
        missing = (stop - start - found.shape[1], padded[1] - height, padded[2] - width)
        return np.pad(found, ((0, 0), *((0, n) for n in missing), (0, 0)), mode="edge") if any(missing) else found

    yield from _pieces(_Tiles(config, params, "moments", devices).run, read, whole_in=padded[0], axes=tiling._axes(config, "moments"))


def in_tiles(config: VAEConfig, method: Method, code: Callable[[Any], Any], x: Float[Array, "B T H W C"], tiling: Tiling) -> Any:
    """What `code` gives, the VAE's `method` on frames or latents, through tiles, within a program and differentiable.

    The clip's size is one that the VAE can represent. Tiles of one shape are coded one after another in a loop, or with
    `tiling.at_once` as one batch; for the gradient they are computed again, so that no others are in memory.
    """

    def run(tiles: Sequence[Any]) -> list[Any]:
        outputs: dict[int, Any] = {}
        for shape in dict.fromkeys(tile.shape for tile in tiles):
            alike = [n for n, tile in enumerate(tiles) if tile.shape == shape]
            if tiling.at_once:
                coded = jnp.split(jax.checkpoint(code)(jnp.concatenate([tiles[n] for n in alike])), len(alike))
            else:
                coded = jax.lax.map(jax.checkpoint(code), jnp.stack([tiles[n] for n in alike]))
            outputs |= {n: coded[place] for place, n in enumerate(alike)}
        return [outputs[n] for n in range(len(tiles))]

    pieces = _pieces(run, lambda start, stop: x[:, start:stop], whole_in=x.shape[1], axes=tiling._axes(config, method))
    return jnp.concatenate(list(pieces), axis=1)


def _pieces(run: Run, read: Callable[[int, int], Any], *, whole_in: int, axes: tuple[_Axis, _Axis, _Axis]) -> Iterator[Any]:
    """The output in pieces, in order; `read(start, stop)` gives inputs [B, stop - start, ...] out of `whole_in`.

    What is read, what `run` makes of tiles and what this gives are all numpy's arrays, or all arrays of a program.
    """
    time, rows, columns = axes
    if whole_in <= time.tile:
        yield _frames_of(run, read(0, whole_in), rows, columns)
        return
    before: Any = None
    for start in time.starts(whole_in):
        stop = min(start + time.tile + 1, whole_in)
        if start and stop - start == 1:
            return  # its only frame would be dropped
        piece = _frames_of(run, read(start, stop), rows, columns)
        if start:
            piece = _blend(before, piece[:, 1:], time.blended, axis=1)
        before = piece
        yield piece[:, : time.kept + (start == 0)]


def _frames_of(run: Run, x: Any, rows: _Axis, columns: _Axis) -> Any:
    """The output for all rows and columns of some frames, cut into spatial tiles where they are larger than one."""
    if x.shape[2] <= rows.tile and x.shape[3] <= columns.tile:
        return run([x])[0]
    places = [(i, j) for i in rows.starts(x.shape[2]) for j in columns.starts(x.shape[3])]
    coded = dict(zip(places, run([x[:, :, i : i + rows.tile, j : j + columns.tile] for i, j in places]), strict=True))
    lines = []
    for i in rows.starts(x.shape[2]):
        line = []
        for j in columns.starts(x.shape[3]):
            if i:
                coded[i, j] = _blend(coded.pop((i - rows.stride, j)), coded[i, j], rows.blended, axis=2)
            if j:
                coded[i, j] = _blend(coded[i, j - columns.stride], coded[i, j], columns.blended, axis=3)
            line.append(coded[i, j][:, :, : rows.kept, : columns.kept])
        lines.append(_module_of(x).concatenate(line, axis=3))
    return _module_of(x).concatenate(lines, axis=2)


def _blend(before: Any, here: Any, extent: int, *, axis: int) -> Any:
    """`here`, faded into from the end of `before` over at most `extent` positions at its beginning."""
    extent = min(extent, before.shape[axis], here.shape[axis])
    part = lambda x, start, stop: x[(slice(None),) * axis + (slice(start, stop),)]  # noqa: E731
    share = (np.arange(extent, dtype=np.float32) / np.float32(max(extent, 1))).reshape(-1, *(1,) * (here.ndim - axis - 1))
    first, last = part(here, 0, extent), part(before, before.shape[axis] - extent, before.shape[axis])
    return _module_of(here).concatenate([first * share + last * (1 - share), part(here, extent, None)], axis=axis)


def _module_of(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


@dataclasses.dataclass
class _Tiles:
    """Runs a method of the VAE on tiles, the clips of a tile apart, as many at a time as there are devices."""

    config: VAEConfig
    params: Any
    method: Method
    devices: Any

    def __post_init__(self) -> None:
        self.devices = tuple(self.devices or jax.local_devices())
        mesh = Mesh(np.array(self.devices), ("tiles",))
        self.params = jax.device_put(self.params, NamedSharding(mesh, P()))
        self.sharding = NamedSharding(mesh, P("tiles"))

    def run(self, tiles: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs [B, ...] of inputs [B, ...], which may differ in shape; all have one B."""
        outputs: dict[int, np.ndarray] = {}
        for shape in dict.fromkeys(tile.shape for tile in tiles):
            clips = [(n, row) for n, tile in enumerate(tiles) if tile.shape == shape for row in range(shape[0])]
            for start in range(0, len(clips), len(self.devices)):
                group = clips[start:][: len(self.devices)]
                for (n, row), coded in zip(group, self._at_once([tiles[n][row] for n, row in group]), strict=True):
                    outputs.setdefault(n, np.empty((shape[0], *coded.shape), np.float32))[row] = coded
        return [outputs[n] for n in range(len(tiles))]

    def _at_once(self, clips: list[np.ndarray]) -> np.ndarray:
        """One clip per device; those that are left over repeat the last one, so that no other program is compiled."""
        filled = clips + [clips[-1]] * (len(self.devices) - len(clips))
        batch = jax.device_put(np.stack(filled), self.sharding)
        return np.asarray(_coder(self.config, self.method, devices=self.devices)(self.params, batch))[: len(clips)]


@functools.lru_cache(maxsize=16)
def _coder(config: VAEConfig, method: Method, *, devices: tuple[Any, ...]) -> Any:
    """The jitted method of the VAE over tiles split among devices, each of which runs its own without the others."""

    def code(params: Any, tiles: Float[Array, "D T H W C"]) -> Any:
        return VAE(config).apply({"params": params}, tiles, method=method)

    mesh = Mesh(np.array(devices), ("tiles",))
    return jax.jit(jax.shard_map(code, mesh=mesh, in_specs=(P(), P("tiles")), out_specs=P("tiles"), check_vma=False))
