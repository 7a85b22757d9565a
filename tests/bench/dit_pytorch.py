"""The DiT against diffusers' HunyuanVideo transformer on PyTorch: milliseconds of a forward pass and of a training step.

    python -m tests.bench.dit_pytorch [--device cpu|gpu] [--threads N] [--repeats N] [--clock wall|cpu] [--cases NAME ...]

Both sides hold the same weights and see the same inputs; before anything is timed their velocities have to agree, and their losses
after one update. A training step is the flow-matching loss, its gradients and AdamW. Repeats alternate between the sides, so that
other work on the machine slows both. On the CPU all is float32 and PyTorch runs eagerly. On a GPU parameters are float32 and products
bfloat16 (PyTorch: autocast), PyTorch runs eagerly and compiled, and MFU is that of our best time.

Prints a table: milliseconds of each side (best / median), PyTorch's best over ours (above 1: ours is faster), and the seconds before
the first result (ours: compilation).
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from hunyuan_jax import flow
from hunyuan_jax.chips import peak_flops
from hunyuan_jax.flops import dit_forward_flops
from hunyuan_jax.models.dit import DiT, DiTConfig
from tests.diffusers_dit import diffusers_dit, our_params

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the shape of its batch; `grid` counts latent frames, rows and columns."""

    config: DiTConfig
    batch: int
    grid: tuple[int, int, int]
    num_txt: int

    @property
    def tokens(self) -> int:
        return int(np.prod([n // p for n, p in zip(self.grid, self.config.patch_size, strict=True)]))

    @property
    def forward_flops(self) -> int:
        return self.batch * dit_forward_flops(self.config, self.tokens, self.num_txt)


def dit(width: int, num_heads: int, rope_axes: tuple[int, int, int], **changes: Any) -> DiTConfig:
    """A model with two double and four single blocks, where `changes` do not say otherwise."""
    fixed = {"num_double_blocks": 2, "num_single_blocks": 4, "text_dim": 256, "pooled_dim": 128, "guidance_embed": True}
    return DiTConfig(width=width, num_heads=num_heads, rope_axes=rope_axes, **(fixed | changes))


QUICKSTART = dit(128, 4, (8, 12, 12), patch_size=(1, 4, 4), text_dim=64, pooled_dim=64, num_refiner_blocks=1, guidance_embed=False)
CASES = {
    "cpu": {
        "quickstart": Case(config=QUICKSTART, batch=32, grid=(4, 8, 8), num_txt=8),
        "width 128": Case(config=dit(128, 4, (8, 12, 12)), batch=1, grid=(5, 40, 40), num_txt=32),
        "width 256": Case(config=dit(256, 4, (16, 24, 24)), batch=2, grid=(4, 32, 32), num_txt=32),
        "width 512": Case(config=dit(512, 4, (16, 56, 56)), batch=1, grid=(4, 16, 32), num_txt=64),
    },
    "gpu": {
        "width 512": Case(config=dit(512, 4, (16, 56, 56)), batch=8, grid=(4, 32, 32), num_txt=64),
        "width 1536": Case(config=dit(1536, 12, (16, 56, 56)), batch=2, grid=(9, 60, 60), num_txt=256),
        "width 3072": Case(config=dit(3072, 24, (16, 56, 56)), batch=1, grid=(9, 60, 104), num_txt=256),
    },
}


def inputs(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Noisy latents with their conditions, texts from short to full, and the velocity to be learned."""
    rng, c, b = np.random.default_rng(0), case.config, case.batch
    data, noise = rng.normal(size=(2, b, *case.grid, c.in_channels)).astype(np.float32)
    t = np.linspace(0.1, 0.9, b, dtype=np.float32)
    arrays = {
        "latents": np.asarray(flow.at_time(data, noise, t)),
        "t": t,
        "txt": rng.normal(size=(b, case.num_txt, c.text_dim)).astype(np.float32),
        "txt_mask": np.arange(case.num_txt) < np.linspace(case.num_txt // 4, case.num_txt, b).astype(int)[:, None],
        "pooled": rng.normal(size=(b, c.pooled_dim)).astype(np.float32),
    }
    if c.guidance_embed:
        arrays["guidance"] = np.full(b, 6.0, np.float32)
    return arrays, flow.velocity(data, noise)


@dataclasses.dataclass(frozen=True)
class Side:
    """What is timed: each call ends when the device has ended. `forward` gives the velocity, `step` updates and gives the loss."""

    forward: Callable[[], Any]
    step: Callable[[], float]


def ours(case: Case, tensors: dict[str, np.ndarray], dtype: str) -> Side:
    config = dataclasses.replace(case.config, dtype=dtype)
    arrays, target = jax.device_put(inputs(case))
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def velocity(params: dict, arrays: dict) -> jax.Array:
        return DiT(config).apply({"params": params}, **arrays)

    def step(state: tuple, arrays: dict, target: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(flow.flow_loss(velocity(p, arrays), target)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    forward_jit, step_jit = jax.jit(velocity), jax.jit(step, donate_argnums=0)
    params = jax.device_put(our_params(tensors, config))
    state = jax.block_until_ready((jax.tree.map(jnp.copy, params), optimizer.init(params)))

    def one_step() -> float:
        nonlocal state
        state, loss = step_jit(state, arrays, target)
        return float(jax.block_until_ready((state, loss))[1])

    return Side(lambda: jax.block_until_ready(forward_jit(params, arrays)), one_step)


def theirs(case: Case, model: torch.nn.Module, device: torch.device, *, compiled: bool) -> Side:
    """`model` stays as it is for the forward pass; a copy of it is trained."""
    arrays, target = inputs(case)
    x = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    latents, target = (part.permute(0, 4, 1, 2, 3).contiguous() for part in (x["latents"], torch.from_numpy(target).to(device)))
    conditions = {
        "timestep": 1000 * x["t"],
        "encoder_hidden_states": x["txt"],
        "encoder_attention_mask": x["txt_mask"],
        "pooled_projections": x["pooled"],
        "guidance": 1000 * x["guidance"] if "guidance" in x else None,
    }
    trained = type(model).from_config(model.config)
    trained.load_state_dict(model.state_dict())
    model, trained = model.to(device), trained.to(device).train()
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    low = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    run, train = (torch.compile(module) if compiled else module for module in (model, trained))

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward() -> torch.Tensor:
        with torch.no_grad(), low:
            velocity = run(latents, **conditions, return_dict=False)[0]
        finish()
        return velocity

    def step() -> float:
        with low:
            velocity = train(latents, **conditions, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        finish()
        return loss.item()

    return Side(forward, step)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Milliseconds of one call; the threads of the other side get a moment to fall asleep before it."""
    time.sleep(0.01)
    start = clock()
    call()
    return 1000 * (clock() - start)


def check_agreement(sides: dict[str, Side], tolerance: float) -> None:
    """Compares velocities, and losses of a step and of the one after it; ends with an error where one is off by more than `tolerance`."""
    mine, *others = sides.values()
    velocity, losses = np.asarray(mine.forward()), [mine.step(), mine.step()]
    for other in others:
        reference = other.forward().float().cpu().numpy().transpose(0, 2, 3, 4, 1)
        errors = [np.linalg.norm(velocity - reference) / np.linalg.norm(reference)]
        errors += [abs(loss / other.step() - 1) for loss in losses]
        if not max(errors) < tolerance:
            raise SystemExit(f"The two sides compute different things: relative errors {errors} are above {tolerance}.")


def measure(sides: dict[str, Side], kind: str, *, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each side's repeats, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(timed(getattr(side, kind), clock))
    return times


def bench(case: Case, *, device: torch.device, repeats: int, clock: Callable[[], float]) -> list[list[str]]:
    """The table's rows for one case, without its name."""
    gpu = device.type == "cuda"
    model = diffusers_dit(case.config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    sides = {"ours": ours(case, tensors, "bfloat16" if gpu else "float32")}
    sides["eager"] = theirs(case, model, device, compiled=False)
    if gpu:
        sides["compiled"] = theirs(case, model, device, compiled=True)
    kinds = {"forward": 1, "step": 3}  # and how many forward passes one takes, counted in FLOPs
    first = {(name, kind): timed(getattr(side, kind), time.perf_counter) / 1000 for name, side in sides.items() for kind in kinds}
    check_agreement(sides, 0.05 if gpu else 1e-4)
    rows = []
    for kind, passes in kinds.items():
        times = measure(sides, kind, repeats=repeats, clock=clock)
        best = {name: min(values) for name, values in times.items()}
        rate, peak = passes * case.forward_flops / (best["ours"] / 1000), peak_flops(jax.devices()[0].device_kind)
        mfu = f"{100 * rate / peak:.1f} %" if peak else "-"
        for other in list(sides)[1:]:
            cells = [f"{best[name]:.1f} / {statistics.median(times[name]):.1f}" for name in ("ours", other)]
            starts = f"{first['ours', kind]:.1f}, {first[other, kind]:.1f}"
            rows.append([kind, other, *cells, f"{best[other] / best['ours']:.2f}", starts, f"{rate / 1e9:.1f}", mfu])
    return rows


HEADER = ("case", "", "PyTorch", "ours ms", "PyTorch ms", "ratio", "first call s", "ours GFLOP/s", "MFU")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dit_pytorch", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of each side, on the CPU; no more than there are cores to run on")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu counts the seconds of this process's threads: for a busy machine"
    )
    parser.add_argument("--cases", nargs="+", help="names of cases; all where not given")
    args = parser.parse_args()
    # Neither side may take the memory of the other.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.device == "cpu":
        # XLA takes as many threads as there are cores to run on, so both sides are kept to that many.
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        jax.config.update("jax_platforms", "cpu")
        where = f"CPU, {len(cores)} threads"
    else:
        jax.config.update("jax_platforms", "cuda")
        where = jax.devices()[0].device_kind
    print(f"{where}, jax {jax.__version__}, torch {torch.__version__}; {args.clock} time, best / median of {args.repeats}\n")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    device = torch.device("cuda" if args.device == "gpu" else "cpu")
    for name in args.cases or CASES[args.device]:
        for row in bench(CASES[args.device][name], device=device, repeats=args.repeats, clock=CLOCKS[args.clock]):
            print("| " + " | ".join((name, *row)) + " |", flush=True)


if __name__ == "__main__":
    main()
