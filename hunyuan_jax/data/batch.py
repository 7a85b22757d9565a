"""What a batch on the mesh is: `VideoBatch`, the frozen pytree that the loader makes and the tasks read."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


@flax.struct.dataclass
class VideoBatch:
    """A batch of one bucket. Training the VAE fills `frames`; training the DiT fills the latents and text states.

    `sample_id` names a draw of a sample, the same on any number of hosts: random numbers are folded from it, so a resumed
    run, or one on another mesh, sees the same noise. `txt_mask` is True for valid tokens, which come first. What a task does
    not read is None. `tiled` is the bucket's, and known when a step is compiled.
    """

    sample_id: UInt32[Array, "B"]
    frames: Float[Array, "B T H W 3"] = None  # type: ignore[assignment]
    mean: Float[Array, "B T Y X C"] = None  # type: ignore[assignment]
    logvar: Float[Array, "B T Y X C"] = None  # type: ignore[assignment]
    txt: Float[Array, "B L D"] = None  # type: ignore[assignment]
    txt_mask: Bool[Array, "B L"] = None  # type: ignore[assignment]
    pooled: Float[Array, "B P"] = None  # type: ignore[assignment]
    tiled: bool = flax.struct.field(pytree_node=False, default=False)

    def statistics(self) -> dict[str, Float[Array, ""]]:
        """Mean and standard deviation of the values that are trained on, and valid text tokens a prompt, as metrics of a step."""
        values = self.mean if self.frames is None else self.frames
        said = {"data/mean": jnp.mean(values), "data/std": jnp.std(values)}
        if self.txt_mask is None:
            return said
        return said | {"data/text_tokens": jnp.mean(jnp.sum(self.txt_mask, axis=1, dtype=jnp.float32))}
