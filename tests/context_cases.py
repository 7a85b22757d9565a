"""A DiT on every mesh against one device: `python -m tests.context_cases [--cases 200] [--seed 0] [--jobs 1]`, on 8 simulated devices.

A case is a random small model (heads, guidance, clean frames, recomputation), a random batch of prime or odd numbers of tokens, with texts
from empty to full, a way to share tokens and to exchange them, a kernel, and the next of all meshes whose axes multiply to 8. Loss and
gradients must be those of one device, which has the reference kernel.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.dit import DiT, DiTConfig
from hunyuan_jax.parallel import context_attention
from hunyuan_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import param_shardings

DEVICES = 8
LIMIT = 2e-5  # of the largest value of a gradient, or of a tenth of the largest of all: smaller ones are sums that cancel
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == DEVICES]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.context_cases", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many cases are computed beside each other")
    return parser.parse_args()


def random_model(rng: np.random.Generator, mesh: jax.sharding.Mesh) -> DiTConfig:
    """A model that can be on this mesh, most often with some way of sharing heads."""
    tensor = mesh.shape["tensor"]
    heads = tensor * int(rng.integers(1, 1 + max(1, 8 // tensor)))
    ring = DiTConfig(
        width=12 * heads, num_heads=heads, rope_axes=(4, 4, 4), text_dim=5, pooled_dim=3, in_channels=2, out_channels=2, mlp_ratio=2.0,
        num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1, guidance_embed=bool(rng.integers(2)),
        remat=("none", "attention", "full")[rng.integers(3)], attention=("reference", "splash")[rng.integers(2)],
    )  # fmt: skip
    wanted = [dataclasses.replace(ring, context="heads", context_degree=int(degree)) for degree in rng.permutation((0, 2, 4, 8))]
    return next((config for config in wanted if rng.integers(2) and _is_possible(config, mesh)), ring)


def _is_possible(config: DiTConfig, mesh: jax.sharding.Mesh) -> bool:
    try:
        config.degree_on(mesh.shape)
    except UserError:
        return False
    return True


def random_grid(rng: np.random.Generator) -> tuple[int, ...]:
    """Frames, rows and columns of tokens: odd ones, or a prime number of them in a line."""
    if rng.integers(2):
        return tuple(int(n) for n in rng.choice((1, 3, 5), 3))
    return tuple(int(n) for n in rng.permutation((1, 1, rng.choice((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)))))


def difference(rng: np.random.Generator, sizes: tuple[int, ...]) -> tuple[str, float]:
    """A random case on a mesh in words, and the largest relative difference of its loss or of a gradient from one device's."""
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    config, grid = random_model(rng, mesh), random_grid(rng)
    batch, txt = int(rng.integers(1, 6)), int(rng.choice((1, 2, 3, 5, 7)))
    latents = rng.normal(size=(batch, grid[0], 2 * grid[1], 2 * grid[2], 2))
    lengths = rng.integers(0, txt + 1, batch)
    mask = np.arange(txt) < lengths[:, None]
    inputs = [latents, rng.uniform(size=batch), rng.normal(size=(batch, txt, 5)), mask, rng.normal(size=(batch, 3))]
    inputs = [x if x.dtype == bool else x.astype(np.float32) for x in inputs]
    guidance = np.full(batch, 6.0, np.float32) if config.guidance_embed else None
    clean = rng.integers(0, grid[0] + 1, batch).astype(np.int32) if rng.integers(2) else None
    shapes = jax.eval_shape(lambda *x: DiT(config).init(jax.random.key(0), *x, guidance)["params"], *inputs)
    params = jax.tree.map(lambda leaf: _draw(rng, leaf.shape), shapes)
    target = rng.normal(size=latents.shape).astype(np.float32)

    def loss(config, params, *inputs):
        return jnp.mean(jnp.square(DiT(config).apply({"params": params}, *inputs, guidance, clean_frames=clean) - target))

    run = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 4)), static_argnums=0)
    whole = run(dataclasses.replace(config, attention="reference"), params, *inputs)
    permutes = config.degree_on(mesh.shape) > 1 and bool(rng.integers(2))  # in the place of all-to-alls, as on Ironwood
    with jax.set_mesh(mesh), mock.patch.object(context_attention, "has_asynchronous_all_to_all", return_value=not permutes):
        split = run(config, jax.device_put(params, param_shardings(shapes, mesh)), *inputs)
    split = multihost_utils.process_allgather(split, tiled=True)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole[1]))
    worst = abs(float(split[0]) - float(whole[0])) / abs(float(whole[0]))
    for one, other in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(split[1]), strict=True):
        scale = max(float(np.abs(one).max()), 0.1 * largest)
        worst = max(worst, float(np.abs(np.asarray(one) - np.asarray(other)).max()) / scale)
    shape = "x".join(map(str, sizes))
    way = f"{config.context} {config.degree_on(mesh.shape)}{' by permutes' * permutes}, {config.attention}, {config.remat}"
    said = f"mesh {shape}, {way}, {config.num_heads} heads, batch {batch}, image {np.prod(grid)}, text {txt} {lengths.tolist()}"
    return said, worst


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel of the size that training begins with, or a bias; kernels some times larger make gradients of rounding, on any mesh."""
    fan_in = shape[-2] if len(shape) > 1 else 1  # 1 for the biases of a row of blocks, too
    return ((fan_in**-0.5 if fan_in > 1 else 0.3) * rng.standard_normal(shape)).astype(np.float32)


def _prepare() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # programs run once, and take long to optimise


def _case(seed: int, number: int) -> tuple[str, float]:
    jax.clear_caches()  # two hundred pairs of programs are more than is to be held
    return difference(np.random.default_rng((seed, number)), MESHES[(seed + 7 * number) % len(MESHES)])


def main() -> None:
    args = parse()
    worst, start = 0.0, time.perf_counter()
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare) as pool:
        for number, (said, error) in enumerate(pool.map(_case, itertools.repeat(args.seed), range(args.cases))):
            worst = max(worst, error)
            print(f"{number}: {error:.1e}  {said}", flush=True)
            if not error <= LIMIT:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"case {number} differs from one device by {error:.1e}, more than {LIMIT:.0e}")
    print(f"{args.cases} cases equal one device within {worst:.1e} (limit {LIMIT:.0e}), {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
