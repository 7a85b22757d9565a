"""A 3D convolution with its gradients, as one ("volume") and as a sum of 2D ones ("planes"): what each takes, and the ratio.

python -m tests.bench.convolution                              milliseconds on the device JAX finds, the best of `REPEATS`
python -m tests.bench.convolution --topologies v5p:2x2x1 ...   cycles of TPUs that are not attached, as their compiler estimates

The first is of shapes of a small VAE in float32. The second is of the large one's in bfloat16, with a forward pass that is computed twice,
compiled as training is; a row takes one minute to several.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from hunyuan_jax.models.vae import Conv3D
from hunyuan_jax.parallel.compiler_options import step_options
from hunyuan_jax.plan import devices_of

SMALL = ((4, 9, 64, 64, 16), (4, 9, 32, 32, 32), (4, 9, 16, 16, 48), (8, 5, 8, 8, 64))  # batch, frames, rows, columns, channels
LARGE = ((1, 65, 128, 512, 128), (1, 65, 64, 256, 256), (1, 33, 32, 128, 512))  # on one of four devices that share the rows of a clip
REPEATS = 7


def layer_and_step(convolution: str, channels: int, *, dtype: str, recompute: bool) -> tuple[Conv3D, Callable[..., Any]]:
    """A convolution, and what gives its output's mean square and both gradients of that."""
    layer = Conv3D(channels, 3, (1, 1, 1), convolution, dtype)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(layer.apply(params, x).astype(jnp.float32)))

    return layer, jax.jit(jax.value_and_grad(jax.checkpoint(loss) if recompute else loss, argnums=(0, 1)))


def input_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    batch, *sides, channels = shape
    return batch, *(side + 2 for side in sides), channels


def best_ms(convolution: str, shape: tuple[int, ...]) -> float:
    layer, step = layer_and_step(convolution, shape[-1], dtype="float32", recompute=False)
    x = jax.random.normal(jax.random.key(0), input_shape(shape))
    params = layer.init(jax.random.key(1), x)
    jax.block_until_ready(step(params, x))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step(params, x))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def estimated_megacycles(convolution: str, shape: tuple[int, ...], device: Any) -> float:
    layer, step = layer_and_step(convolution, shape[-1], dtype="bfloat16", recompute=True)
    x = jax.ShapeDtypeStruct(input_shape(shape), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def there(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

    options = step_options(device.device_kind, tuned=False)
    program = step.lower(*jax.tree.map(there, (params, x))).compile(options).as_text()
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program))) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.convolution", description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=())
    topologies = parser.parse_args().topologies
    if topologies:
        jax.config.update("jax_platforms", "cpu")
        runs = [
            (topology, "million cycles", LARGE, functools.partial(estimated_megacycles, device=devices_of(topology)[0]))
            for topology in topologies
        ]
    else:
        runs = [(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", "ms", SMALL, best_ms)]
    for where, unit, shapes, take in runs:
        print(where, flush=True)
        for shape in shapes:
            volume, planes = take("volume", shape), take("planes", shape)
            print(f"B T H W C = {shape}: volume {volume:.1f}, planes {planes:.1f} {unit}, ratio {volume / planes:.2f}", flush=True)


if __name__ == "__main__":
    main()
