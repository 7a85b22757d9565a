"""Will it fit, and how fast: the training step of a config, compiled for a pod that is not attached.

    python -m hunyuan_jax.plan --config=configs/t2v_13b.py:video_720 --topology=v5p:4x4x8 [--set mesh.sequence=8 ...]
        [--search] [--exact] [--json]

A TPU's own compiler, from the package libtpu, compiles the real step (model, optimizer, moving average, recomputation, kernels) and says
what it holds; what it exchanges is read from the compiled program. How much of what it holds beside the state is activations that the
forward pass keeps, it does not say: that is arithmetic (estimate.py), and the rest is called temporaries. The passes that take the compiler
longest are left out: training will take less time, and hold less or a little more; --exact compiles as it does. GPUs, such as
--topology=h100:64, have the same table by arithmetic.

The time of a step is a model, not a measurement: products at a share of the peak (`EFFICIENCY`), what the optimizer reads and writes at
the memory's rate, what is exchanged at the links' rate, in the background where the program does so. It knows no stalls, no input,
no slow host, and not what the way to the host's memory takes where something is kept there.
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict, config_flags

from hunyuan_jax.chips import Chip, chip_named
from hunyuan_jax.data.buckets import Bucket, sample_cost, token_count
from hunyuan_jax.errors import UserError, nearest, run_command
from hunyuan_jax.estimate import Memory, batch_shapes, estimate
from hunyuan_jax.flops import StepFlops
from hunyuan_jax.hlo import Exchange, Program
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.compiler_options import step_options
from hunyuan_jax.parallel.mesh import MeshConfig, axis_sizes, make_mesh
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.state import abstract_state
from hunyuan_jax.tasks import planned_task
from hunyuan_jax.train import LoopConfig
from hunyuan_jax.train_step import EmaConfig, configured_step

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
# Slices that Google Cloud has; in three dimensions, also all whose sides are multiples of 4.
_FLAT, _CUBES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)), ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
SLICES: dict[str, tuple[tuple[int, ...], ...]] = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}
GPUS = ("a100", "h100", "h100pcie", "h200")
LIBTPU = "libtpu==0.0.42.1"  # of the jax that is pinned
# Shares of the peak: dense products, and the products in attention's kernels. Assumptions, to be replaced by measurements.
EFFICIENCY = {"products": 0.8, "attention": 0.55}
ROOM = 0.85  # of the memory, that a step may fill
# To compile in a third of the time, without costly passes, without effort at fitting memory and with no more vector memory than the
# compiler takes by itself, since more is more to try. Fewer exchanges are then hidden; a step of the 13B holds as much or more, a small one
# may hold less.
QUICKLY = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0, "xla_tpu_scoped_vmem_limit_kib": "-1"}
# A VAE's step is hundreds of convolutions that no loop repeats. It has no kernels of ours, which need the vector memory, so less will do;
# and to see which of so many operations could be one takes the compiler long.
QUICKLY_CONVOLVED = QUICKLY | {"xla_tpu_scoped_vmem_limit_kib": "8192", "xla_jf_enable_multi_output_fusion": "false"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known of a step before it runs. Rates are of the whole pod."""

    chip: Chip
    devices: int
    mesh: dict[str, int]
    bucket: Bucket
    memory: Memory
    flops: StepFlops  # of the whole batch
    exchanged: dict[str, float]  # bytes that a device sends in a step, by axes
    seconds: dict[str, float]  # of a step, by what takes them
    tokens: int  # image tokens of a sample
    checkpoint: float  # bytes
    compile_seconds: float | None  # None where it is all arithmetic
    kernels: dict[str, int]
    compiled_quickly: bool  # whether the step was compiled, and that without costly passes

    @property
    def fits(self) -> bool:
        return self.memory.total <= ROOM * self.chip.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        return self.flops.model / (self.step_seconds * self.devices * self.chip.flops)

    def to_json(self) -> dict[str, Any]:
        per_chip = self.chip.devices
        memory = {name: per_chip * value for name, value in dataclasses.asdict(self.memory).items()}
        a_day = 86_400 / self.step_seconds * self.bucket.batch
        return {
            "fits": self.fits,
            "total_bytes_per_chip": per_chip * self.memory.total,
            "hbm_bytes_per_chip": per_chip * self.chip.memory,
            "memory_bytes_per_chip": memory,
            "compiled_quickly": self.compiled_quickly,
            "model_flops_per_step": self.flops.model,
            "hardware_flops_per_step": self.flops.hardware,
            "exchanged_bytes_per_device": self.exchanged,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "mfu": self.mfu,
            "samples_per_day": a_day,
            "tokens_per_day": a_day * self.tokens,
            "checkpoint_bytes": self.checkpoint,
            "compile_seconds": self.compile_seconds,
            "kernels_per_step": self.kernels,
            "chip": self.chip.name,
            "devices": self.devices,
            "mesh": self.mesh,
            "bucket": self.bucket.name,
            "batch": self.bucket.batch,
            "efficiency": EFFICIENCY,
        }


# --- What is asked for ---------------------------------------------------------------------------------------------------------


def target(topology: str) -> tuple[Chip, int]:
    """The chip and the number of devices of a topology: a slice of TPUs, such as v5p:4x4x8, or GPUs, such as h100:64."""
    name, _, shape = topology.partition(":")
    if name not in (*TPUS, *GPUS):
        raise UserError(f"--topology={topology}: {name!r} is not known. {nearest(name, [*TPUS, *GPUS])} Write v5p:4x4x8 or h100:64.")
    chip = chip_named(name)
    if name in GPUS:
        if not re.fullmatch(r"[1-9]\d*", shape):
            raise UserError(f"--topology={topology}: write the number of GPUs after the colon, such as {name}:64.")
        return chip, int(shape)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"Compiling for {name} takes the TPU compiler: pip install {LIBTPU}")
    _check_slice(name, shape)
    return chip, chip.devices * math.prod(map(int, shape.split("x")))


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice of TPUs that need not be attached, for compiling. To be called before anything else of libtpu's."""
    # There is no TPU to ask about, and several compilations may run beside each other.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)


def _check_slice(name: str, shape: str) -> None:
    """Raises `UserError` where TPUs of that name do not come in slices of that shape; it names the nearest that is."""
    small = SLICES[name]
    dimensions = len(small[0])
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (dimensions - 1), shape):
        example = "x".join("4" * dimensions)
        raise UserError(f"--topology={name}:{shape}: slices of {name} have {dimensions} dimensions; write {name}:{example}.")
    asked = sorted(map(int, shape.split("x")))
    around = itertools.product(*(sorted({max(4, n // 4 * 4), -(-n // 4) * 4}) for n in asked))
    known = [*small, *(around if dimensions == 3 else ())]
    if asked not in map(sorted, known):
        close = min(known, key=lambda sizes: sum(abs(math.log(a / b)) for a, b in zip(asked, sorted(sizes), strict=True)))
        raise UserError(
            f"--topology={name}:{shape}: {name} has no slices of that shape; the nearest is {name}:{'x'.join(map(str, close))}."
        )


def change(config: ConfigDict, setting: str) -> None:
    """Sets `SECTION.KEY=VALUE` in a config; the value takes the type of what stands there."""
    name, equals, text = setting.partition("=")
    *sections, key = name.split(".")
    section: Any = config
    for part in sections:
        section = section.get(part) if isinstance(section, ConfigDict) else None
    if not equals or not isinstance(section, ConfigDict) or key not in section:
        raise UserError(f"--set {setting}: the config has no {name!r}; write SECTION.KEY=VALUE, such as mesh.sequence=8.")
    old = section[key]
    try:
        section[key] = _like(old, text)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"--set {setting}: {name} is {old!r}, of type {type(old).__name__}, and {text!r} is not.") from error


def _like(old: Any, text: str) -> Any:
    """What a text says, in the type of what stands there; of several values, with commas between them, in that of the first."""
    if isinstance(old, tuple | list):
        return type(old)(_like(old[0], part) for part in text.split(","))
    return {"true": True, "false": False}[text.lower()] if isinstance(old, bool) else type(old)(text)


def costliest(config: ConfigDict, name: str) -> Bucket:
    """The bucket of that name, or else the one whose samples cost most."""
    buckets = [build(Bucket, section, where=f"data.buckets[{i}]") for i, section in enumerate(config.data.buckets)]
    if not name:
        return max(buckets, key=lambda bucket: sample_cost(token_count(*bucket.shape)))
    found = [bucket for bucket in buckets if bucket.name == name]
    if not found:
        raise UserError(f"--bucket={name} is none of the config's: {', '.join(bucket.name for bucket in buckets)}.")
    return found[0]


def _is_dit(config: ConfigDict) -> bool:
    return "context" in config.model


def check_batch(bucket: Bucket, mesh: Mapping[str, int]) -> None:
    parts = mesh["data"] * mesh["fsdp"]
    if bucket.batch % parts:
        fitting = [n for n in range(1, bucket.batch + 1) if bucket.batch % n == 0]
        below = max(n for n in fitting if n <= parts)
        raise UserError(
            f"Bucket {bucket.name}: a batch of {bucket.batch} cannot be spread over mesh.data={mesh['data']} times "
            f"mesh.fsdp={mesh['fsdp']}; let these be {below} in all and mesh.sequence or "
            f"mesh.tensor take the rest, or set the batch to a multiple of {parts}."
        )


def roofline(chip: Chip, devices: int, flops: StepFlops, memory: Memory, exchanges: Sequence[Exchange]) -> dict[str, float]:
    """Seconds of a step by what takes them."""
    peak = chip.flops * devices
    products = (flops.hardware - flops.hardware_attention) / peak / EFFICIENCY["products"]
    attention = flops.hardware_attention / peak / EFFICIENCY["attention"]
    # Collectives go around a ring in both directions at once, a permute in one.
    time_of = lambda e: e.times * e.sent / (chip.link_rate * (1 if e.kind == "collective-permute" else 2))  # noqa: E731
    hidden, seen = (sum(time_of(e) for e in exchanges if e.hidden == is_hidden) for is_hidden in (True, False))
    return {
        "products": products,
        "attention": attention,
        "update": 2 * (memory.parameters + memory.optimizer + memory.average) / chip.memory_rate,
        "exchange": seen + max(0.0, hidden - products - attention),
    }


# --- By the compiler -----------------------------------------------------------------------------------------------------------


def compile_step(config: ConfigDict, bucket: Bucket, devices: Sequence[Any], *, more: Mapping[str, Any] | None = None) -> Any:
    """The compiled training step of a bucket on the config's mesh of these devices, with training's compiler options and `more`."""
    task = planned_task(config)
    mesh = make_mesh(build(MeshConfig, config.mesh, where="mesh"), devices)
    loop, ema = build(LoopConfig, config.train, where="train"), build(EmaConfig, config.ema, where="ema")
    settings = build(OptimizerConfig, config.optimizer, where="optimizer")
    step = configured_step(task, settings, ema=ema, key=jax.random.key(0), block_norms=loop.block_norms)
    # Outside the mesh, whose devices can compute nothing.
    state = abstract_state(task, make_optimizer(settings), mesh, spike_window=settings.spike_window, offload=settings.offload)
    options: dict[str, Any] = {**step_options(devices[0].device_kind, tuned=loop.tuned_compiler), **(more or {})}
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        return jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(state, batch_shapes(task, bucket, mesh)).compile(options)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled step says of each device. Bytes."""

    temporaries: float
    host: float
    exchanges: list[Exchange]
    kernels: dict[str, int]


def read_step(config: dict[str, Any], bucket: Bucket, topology: str, exact: bool) -> Compiled | float:
    """Compiles a step for a TPU topology; a number is the bytes that it needs of a device which has fewer."""
    jax.config.update("jax_platforms", "cpu")
    asked, devices = ConfigDict(config), devices_of(topology)
    try:
        quickly = QUICKLY if _is_dit(asked) else QUICKLY_CONVOLVED
        step = compile_step(asked, bucket, devices, more={} if exact else quickly)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if (needed := re.search(r"Used ([\d.]+)([GM]) of", str(error))) is None:
            raise UserError(f"The compiler found too little memory, and does not say how much it needs: {str(error)[:200]}") from error
        return float(needed[1]) * 2 ** {"G": 30, "M": 20}[needed[2]]
    found, program = step.memory_analysis(), Program(step.as_text())
    mesh = axis_sizes(build(MeshConfig, asked.mesh, where="mesh"), len(devices))
    return Compiled(found.temp_size_in_bytes, found.host_temp_size_in_bytes, program.exchanges(mesh), program.kernels())


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a process of its own, since a compiler that fails may abort its process. Raises `UserError` if it does or work does.

    Nothing but what the work returns is left behind, the compiler's memory neither.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    worker = spawn.Process(target=_send, args=(sender, work, args), daemon=True)
    worker.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        worker.join()
        raise UserError(
            f"The compiler gave up: its process ended with {worker.exitcode}, and its last words stand above. Another mesh, such as --set "
            "mesh.sequence=2, or another model.remat may pass."
        ) from None
    finally:
        worker.kill()
        worker.join()
    if isinstance(result, UserError):
        raise result
    return result


def _send(sender: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send(work(*args))
    except UserError as error:
        sender.send(error)


def make_plan(config: ConfigDict, topology: str, *, bucket_name: str = "", compiles: bool = True, exact: bool = False) -> Plan:
    """The plan of a config's costliest bucket, or of the one that is named. Without `compiles`, by arithmetic alone.

    `exact` compiles as training does, instead of quickly. Raises `UserError` for what cannot be, before anything is compiled, and for
    what the compiler gives up.
    """
    chip, devices = target(topology)
    bucket = costliest(config, bucket_name)
    mesh = axis_sizes(build(MeshConfig, config.mesh, where="mesh"), devices)
    check_batch(bucket, mesh)
    known = estimate(config, bucket, mesh, blocks=chip.name in TPUS)
    memory, exchanges = known.memory, known.exchanges
    seconds: float | None = None
    kernels: dict[str, int] = {}
    if compiles and chip.name in TPUS:
        start = time.perf_counter()
        found = apart(read_step, config.to_dict(), bucket, topology, exact)
        seconds = time.perf_counter() - start
        if isinstance(found, float):
            beside_state = max(0.0, found - memory.parameters - memory.optimizer - memory.average)
        else:
            beside_state, exchanges, kernels = found.temporaries, found.exchanges, found.kernels
            memory = dataclasses.replace(memory, host=found.host + known.offloaded)
        # The compiler says how much there is in all, and not of what.
        kept = min(memory.activations, beside_state)
        memory = dataclasses.replace(memory, activations=kept, temporaries=beside_state - kept)
    exchanged: dict[str, float] = collections.defaultdict(float)
    for exchange in exchanges:
        exchanged["+".join(exchange.axes)] += exchange.times * exchange.sent
    return Plan(
        chip=chip,
        devices=devices,
        mesh=mesh,
        bucket=bucket,
        memory=memory,
        flops=known.flops,
        exchanged=dict(exchanged),
        seconds=roofline(chip, devices, known.flops, memory, exchanges),
        tokens=known.tokens,
        checkpoint=known.checkpoint,
        compile_seconds=seconds,
        kernels=kernels,
        compiled_quickly=seconds is not None and not exact,
    )


# --- Search --------------------------------------------------------------------------------------------------------------------


def candidates(config: ConfigDict, count: int) -> Iterator[ConfigDict]:
    """The config on every mesh of so many devices, with either way of sharing tokens and every recomputation that keeps all on them."""
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    is_dit = _is_dit(config)
    for fsdp, sequence, tensor in itertools.product(sizes, sizes, [n for n in sizes if n <= 8] if is_dit else [1]):
        if count % (fsdp * sequence * tensor):
            continue
        contexts = ("ring", "heads") if is_dit and sequence > 1 else (None,)
        for context, remat in itertools.product(contexts, ("none", "attention", "full") if is_dit else ("none", "full")):
            tried = ConfigDict(config.to_dict())
            tried.mesh.update({"data": -1, "fsdp": fsdp, "sequence": sequence, "tensor": tensor})
            tried.model.update({"remat": remat} | ({"context": context} if context else {}))
            yield tried


def with_more_on_the_host(config: ConfigDict) -> ConfigDict | None:
    """The same with what attention keeps, or else the optimizer's state, in the hosts' memory; None where both are there."""
    less = ConfigDict(config.to_dict())
    if config.model.remat == "attention":
        less.model.remat = "attention_host"
    elif not _offloads(config):
        less.optimizer.offload = True
    else:
        return None
    return less


def _offloads(config: ConfigDict) -> bool:
    return build(OptimizerConfig, config.optimizer, where="optimizer").offload


def search(config: ConfigDict, topology: str, bucket_name: str, *, tries: int, exact: bool = False) -> list[tuple[ConfigDict, Plan]]:
    """Of all candidates those that should fit, fastest first by arithmetic; for a TPU the first `tries` compiled, and those ranked.

    What does not fit is tried with more in the hosts' memory.
    """
    guesses = []
    plan_of = functools.partial(make_plan, topology=topology, bucket_name=bucket_name)
    chip, devices = target(topology)
    for candidate in candidates(config, devices):
        tried: ConfigDict | None = candidate
        while tried is not None:
            try:
                guess = plan_of(tried, compiles=False)
            except UserError:
                break
            if guess.fits:
                guesses.append((tried, guess))
                break
            tried = with_more_on_the_host(tried)
    guesses.sort(key=lambda pair: (pair[1].step_seconds, pair[1].memory.host))
    if not guesses:
        raise UserError("By arithmetic nothing fits on this topology; take a larger one, a smaller batch or a smaller bucket.")
    if chip.name in GPUS:
        return guesses[:tries]
    found = []
    waiting = collections.deque(guesses)
    for _ in range(min(tries, len(guesses))):
        tried, guess = waiting.popleft()
        try:
            found.append((tried, plan_of(tried, exact=exact)))
            print(_short(*found[-1]), file=sys.stderr, flush=True)
        except UserError as error:
            print(f"{_choice(tried, guess)}: {error}", file=sys.stderr, flush=True)
            continue
        if not found[-1][1].fits and (leaner := with_more_on_the_host(tried)):
            waiting.appendleft((leaner, guess))
    if not found:
        raise UserError(f"Of the {tries} candidates tried none could be compiled; try more of them (--tries).")
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].step_seconds, pair[1].memory.host))


# --- What is said --------------------------------------------------------------------------------------------------------------


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _mesh(plan: Plan) -> str:
    return " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def _too_much(plan: Plan) -> str:
    return "may not fit, which --exact knows" if plan.compiled_quickly else "does not fit"


def _choice(config: ConfigDict, plan: Plan) -> str:
    optimizer = ", optimizer on the host" if _offloads(config) else ""
    return f"{_mesh(plan)}, {_sharing(config)}, remat {config.model.remat}{optimizer}"


def _sharing(config: ConfigDict) -> str:
    """What devices that share a sample do with its tokens, or with the rows of its frames."""
    return config.model.get("context", "rows")


def _short(config: ConfigDict, plan: Plan) -> str:
    verdict = "fits" if plan.fits else _too_much(plan)
    return f"{_choice(config, plan)}: {verdict}, {_gib(plan.memory.total)}, {plan.step_seconds:.2f} s, MFU {100 * plan.mfu:.1f} %"


def table(config: ConfigDict, topology: str, plan: Plan) -> str:
    """The plan as a page for a person."""
    per_chip, memory = plan.chip.devices, plan.memory
    chips = plan.devices // per_chip
    how = "by arithmetic, not compiled" if plan.compile_seconds is None else f"compiled in {plan.compile_seconds:.0f} s"
    if plan.compiled_quickly:
        how += " without costly passes: training will take less time, and hold less or a little more, which --exact knows"
    model = config.model
    remat = f"recomputation {model.remat}"
    if plan.mesh["sequence"] > 1:
        remat += f", tokens shared by {_sharing(config)}"
    lines = [
        f"{topology}, {chips} chips, mesh {_mesh(plan)}, bucket {plan.bucket.name}, batch {plan.bucket.batch}, {remat}; {how}",
        "",
        "Memory of a chip",
        *(f"  {name:<22}{_gib(per_chip * value):>14}" for name, value in dataclasses.asdict(memory).items() if name != "host"),
        f"  {'total':<22}{_gib(per_chip * memory.total):>14}  of {_gib(per_chip * plan.chip.memory)}, "
        + (f"within {ROOM:.0%}: fits" if plan.fits else f"more than {ROOM:.0%}: {_too_much(plan)}"),
        f"  {'on its host':<22}{_gib(per_chip * memory.host):>14}",
        "",
        "A step",
        f"  {'model':<22}{plan.flops.model:>14.4g} FLOPs",
        f"  {'computed':<22}{plan.flops.hardware:>14.4g} FLOPs, {plan.flops.hardware_attention / plan.flops.hardware:.0%} in attention",
        *(f"  {'sent over ' + axes:<22}{_gib(value):>14} by each device" for axes, value in sorted(plan.exchanged.items())),
        *(f"  {name:<22}{value:>14.3f} s" for name, value in plan.seconds.items()),
        f"  {'in all':<22}{plan.step_seconds:>14.3f} s, MFU {100 * plan.mfu:.1f} %",
        "",
        f"A day      {plan.bucket.batch * 86_400 / plan.step_seconds:,.0f} samples, "
        f"{plan.tokens * plan.bucket.batch * 86_400 / plan.step_seconds:.3g} tokens",
        f"Checkpoint {_gib(plan.checkpoint)}",
        "",
        f"Assumed: products at {EFFICIENCY['products']:.0%} of {plan.chip.flops * per_chip / 1e12:.0f} TFLOP/s a chip, attention's at "
        f"{EFFICIENCY['attention']:.0%}; memory at {plan.chip.memory_rate * per_chip / 1e9:.0f} GB/s; "
        f"links at {plan.chip.link_rate / 1e9:.0f} GB/s in each direction.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config = config_flags.DEFINE_config_file("config", None, "A training configuration, such as configs/t2v_13b.py:video_720.")
    pods = f"TPUs ({', '.join(TPUS)}) such as v5p:4x4x8, or GPUs ({', '.join(GPUS)}) such as h100:64."
    topology = flags.DEFINE_string("topology", None, pods)
    changes = flags.DEFINE_multi_string("set", [], "A change to the config, such as mesh.sequence=8.")
    bucket = flags.DEFINE_string("bucket", "", "A bucket by its name; by default the one whose samples cost most.")
    searches = flags.DEFINE_bool(
        "search", False, "Try meshes, ways of sharing tokens, recomputation and the host's memory; rank what fits."
    )
    tries = flags.DEFINE_integer("tries", 4, "How many of a search's candidates are compiled.", lower_bound=1)
    exact = flags.DEFINE_bool("exact", False, "Compile as training does, which takes several times as long, and for a VAE far longer.")
    as_json = flags.DEFINE_bool("json", False, "One JSON object on standard output.")
    # `--set a=1 b=2` as well as `--set a=1 --set b=2`
    spread: list[str] = []
    for word in argv:
        follows = len(spread) > 1 and spread[-2] == "--set" and not word.startswith("-") and "=" in word
        spread += ["--set", word] if follows else [word]
    parse_flags(spread, required=("config", "topology"))
    jax.config.update("jax_platforms", "cpu")
    asked, pod = config.value, str(topology.value)
    for setting in changes.value:
        change(asked, setting)
    if searches.value:
        ranked = search(asked, pod, bucket.value, tries=tries.value, exact=exact.value)
        if as_json.value:
            choices = [{"context": _sharing(c), "remat": c.model.remat, "offload": _offloads(c)} for c, _ in ranked]
            plans = [plan.to_json() | choice for (_, plan), choice in zip(ranked, choices, strict=True)]
            print(json.dumps(plans[0] | {"ranked": plans}))
        else:
            print("\n".join(_short(*pair) for pair in ranked))
            print("\n" + table(ranked[0][0], pod, ranked[0][1]))
        return
    plan = make_plan(asked, pod, bucket_name=bucket.value, exact=exact.value)
    print(json.dumps(plan.to_json()) if as_json.value else table(asked, pod, plan))


if __name__ == "__main__":
    run_command(main)
