"""One training on many meshes: `python -m tests.mesh_curves [--meshes 3]`, on 1, 2, 4 and 8 simulated devices.

A small DiT is trained for 20 steps of the real step (loss, AdamW, moving average) on the same batches. On every mesh, and where it shares
tokens with either way of sharing them, the loss must go the way it goes on one device.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from configs import t2v_13b
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import AXES, SEQUENCE, MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding
from hunyuan_jax.settings import build
from hunyuan_jax.state import make_state
from hunyuan_jax.tasks import planned_task
from hunyuan_jax.train_step import EmaConfig, make_step

STEPS = 20
LIMIT = 1e-5  # of a loss, relative
MESHES = (
    (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 2, 1, 1), (1, 2, 2, 1), (1, 1, 2, 2),
    (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2),
)  # fmt: skip
BATCH, GRID, TEXT = 8, (3, 6, 10), 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mesh_curves", description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", type=int, default=len(MESHES), help="how many of them, from the last")
    return parser.parse_args()


def curve(sizes: tuple[int, ...], context: str) -> list[float]:
    """The losses of a training on a mesh."""
    config = t2v_13b.get_config("video_256")
    config.model.update({"width": 48, "num_heads": 4, "rope_axes": (4, 4, 4), "text_dim": 6, "pooled_dim": 5, "in_channels": 4})
    config.model.update({"out_channels": 4, "num_double_blocks": 1, "num_single_blocks": 2, "num_refiner_blocks": 1})
    config.model.update({"context": context, "dtype": "float32"})
    config.data.text_length = TEXT
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 5})
    task, optimizer = planned_task(config), make_optimizer(build(OptimizerConfig, config.optimizer, where="optimizer"))
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))), jax.devices()[: int(np.prod(sizes))])
    step = jax.jit(make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(1)))
    losses, rng = [], np.random.default_rng(0)
    with jax.set_mesh(mesh):
        state = make_state(task, optimizer, key=jax.random.key(0), mesh=mesh)
        for number in range(STEPS):
            arrays = {
                "sample_id": np.arange(BATCH, dtype=np.uint32) + BATCH * number,
                "mean": rng.normal(size=(BATCH, *GRID, 4)),
                "logvar": rng.normal(size=(BATCH, *GRID, 4)) - 4,
                "txt": rng.normal(size=(BATCH, TEXT, 6)),
                "txt_mask": np.arange(TEXT) < rng.integers(0, TEXT + 1, BATCH)[:, None],
                "pooled": rng.normal(size=(BATCH, 5)),
            }
            arrays = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in arrays.items()}
            batch = jax.device_put(VideoBatch(**jax.tree.map(jnp.asarray, arrays)), batch_sharding(mesh))
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
    return losses


def main() -> None:
    args = parse()
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # programs take longer to optimise than to run
    one, worst = curve((1, 1, 1, 1), "ring"), 0.0
    for sizes in MESHES[-args.meshes :]:
        for context in ("ring", "heads") if sizes[AXES.index(SEQUENCE)] > 1 else ("ring",):
            error = max(abs(a - b) / abs(a) for a, b in zip(one, curve(sizes, context), strict=True))
            worst = max(worst, error)
            print(f"{'x'.join(map(str, sizes))} {context}: {error:.1e}", flush=True)
            if not error <= LIMIT:
                raise SystemExit(f"the loss on mesh {sizes} goes another way than on one device: {error:.1e}, more than {LIMIT:.0e}")
    print(f"{min(args.meshes, len(MESHES))} meshes train as one device: loss {one[0]:.4f} to {one[-1]:.4f}, within {worst:.1e}")


if __name__ == "__main__":
    main()
