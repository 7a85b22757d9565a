"""Time of a 3D convolution with its gradients, as one ("volume") and as a sum of 2D ones ("planes").

python -m tests.bench.convolution

Prints milliseconds, the best of `REPEATS`, and the ratio, for the shapes of a small VAE on the device JAX finds.
"""

import time

import jax
import jax.numpy as jnp

from hunyuan_jax.models.vae import Conv3D

SHAPES = ((4, 9, 64, 16), (4, 9, 32, 32), (4, 9, 16, 48), (8, 5, 8, 64))  # batch, frames, side, channels
REPEATS = 7


def best_ms(convolution: str, shape: tuple[int, int, int, int]) -> float:
    """Milliseconds of the value and both gradients of one convolution."""
    batch, frames, side, channels = shape
    x = jax.random.normal(jax.random.key(0), (batch, frames + 2, side + 2, side + 2, channels))
    layer = Conv3D(channels, 3, (1, 1, 1), convolution, "float32")
    params = layer.init(jax.random.key(1), x)
    step = jax.jit(jax.value_and_grad(lambda params, x: jnp.mean(jnp.square(layer.apply(params, x))), argnums=(0, 1)))
    jax.block_until_ready(step(params, x))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step(params, x))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for shape in SHAPES:
        volume, planes = best_ms("volume", shape), best_ms("planes", shape)
        print(f"B T S C = {shape}: volume {volume:.1f} ms, planes {planes:.1f} ms, ratio {volume / planes:.2f}")


if __name__ == "__main__":
    main()
