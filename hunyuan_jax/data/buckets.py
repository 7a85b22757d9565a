"""Buckets: the (frames, height, width) shapes a clip may be trained in, and what a sample of each costs.

Every batch has the shape of one bucket, so that each compiles once and nothing is padded. Cost is that of the DiT, linear
work plus attention, a S + b S^2 for S tokens, and not the number of tokens: equal tokens would be up to 5 times apart in
compute between 256 and 720 pixels.
"""

import dataclasses

from hunyuan_jax.errors import UserError

# FLOPs of a forward pass, per token and per pair of tokens, relative to each other in the 13B model: 13.59e9 to 737,280.
_PAIR_TO_TOKEN = 737_280 / 13.59e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """A shape in pixels, its global batch size and its share of the steps.

    `intervals` are the distances, in source frames, that a clip's frames may be taken at; one is drawn for each sample.
    `resize` is the (height, width) a clip is fitted to first when the bucket is a random crop of it; () fits to the bucket.
    Clips of a `tiled` bucket go through the VAE in tiles; beside one of the same shape that is not, it switches tiling on and off.
    """

    frames: int
    height: int
    width: int
    batch: int
    share: float = 1.0
    intervals: tuple[int, ...] = (1,)
    resize: tuple[int, ...] = ()
    tiled: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(self.intervals))
        object.__setattr__(self, "resize", tuple(self.resize))
        if min(self.frames, self.height, self.width, self.batch, *self.intervals) < 1 or self.share < 0:
            raise UserError(f"Bucket {self.name}: frames, height, width, batch and intervals must be at least 1, share at least 0.")
        if self.resize and (self.resize[0] < self.height or self.resize[1] < self.width):
            raise UserError(f"Bucket {self.name}: resize {self.resize} must be at least as large as the bucket.")

    @property
    def name(self) -> str:
        """Such as `9x64x64`, frames, height, width; `9x64x64-tiled` in tiles."""
        return f"{self.frames}x{self.height}x{self.width}" + "-tiled" * self.tiled

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    def span(self, interval: int) -> int:
        """Source frames that a sample covers when its frames are `interval` apart."""
        return (self.frames - 1) * interval + 1

    def fits(self, num_frames: int) -> bool:
        """Whether a clip of `num_frames` is long enough for the smallest interval."""
        return num_frames >= self.span(min(self.intervals))


def token_count(frames: int, height: int, width: int, *, temporal: int = 4, spatial: int = 16) -> int:
    """Image tokens of a clip: 4 x 8 x 8 compression by the VAE and 1 x 2 x 2 patches by the DiT."""
    return (1 + (frames - 1) // temporal) * -(-height // spatial) * -(-width // spatial)


def sample_cost(tokens: int) -> float:
    """Compute of one sample of `tokens`, in units of one token's linear work."""
    return tokens * (1.0 + _PAIR_TO_TOKEN * tokens)
