"""A DiT on every mesh against one device: `python -m tests.context_cases [--cases 200] [--seed 0] [--jobs 1]`, on 8 simulated devices.

A case is a random small model (heads, blocks, text and image sizes, guidance, clean frames, recomputation), a random batch with texts
from empty to full, a mesh whose axes multiply to 8, and a way to share tokens. Loss and gradients must be those of one device.
"""

import argparse
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from hunyuan_jax.models.dit import DiT, DiTConfig
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


def difference(rng: np.random.Generator) -> tuple[str, float]:
    """A random case in words, and the largest relative difference of its loss or of a gradient from one device's."""
    sizes = MESHES[rng.integers(len(MESHES))]
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, map(int, sizes), strict=True))))
    tensor = mesh.shape["tensor"]
    heads = tensor * int(rng.integers(1, 1 + max(1, 8 // tensor)))
    config = DiTConfig(
        width=12 * heads, num_heads=heads, rope_axes=(4, 4, 4), text_dim=5, pooled_dim=3, in_channels=2, out_channels=2, mlp_ratio=2.0,
        num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1, guidance_embed=bool(rng.integers(2)),
        remat=("none", "full")[rng.integers(2)], context=("ring", "heads")[rng.integers(2)],
    )  # fmt: skip
    batch, txt = int(rng.integers(1, 6)), int(rng.integers(1, 8))
    grid = tuple(int(n) for n in rng.integers(1, 6, 3))
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

    def loss(params, *inputs):
        return jnp.mean(jnp.square(DiT(config).apply({"params": params}, *inputs, guidance, clean_frames=clean) - target))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3)))
    whole = run(params, *inputs)
    with jax.set_mesh(mesh):
        split = run(jax.device_put(params, param_shardings(shapes, mesh)), *inputs)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole[1]))
    worst = abs(float(split[0]) - float(whole[0])) / abs(float(whole[0]))
    for one, other in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(split[1]), strict=True):
        scale = max(float(np.abs(one).max()), 0.1 * largest)
        worst = max(worst, float(np.abs(np.asarray(one) - np.asarray(other)).max()) / scale)
    shape = "x".join(map(str, sizes))
    said = f"mesh {shape}, {config.context}, {heads} heads, batch {batch}, image {np.prod(grid)}, text {txt} {lengths.tolist()}"
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
    return difference(np.random.default_rng((seed, number)))


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
