"""What this machine lacks for training: `python -m hunyuan_jax.doctor [--workdir DIR] [--data DIR] [--processes 2] [--json]`.

One line a check: pass, warning or failure, what was found, and what to do about all that is no pass. The exit code is 1 where a
check failed and 0 otherwise. With `--json` the standard output holds one JSON object, `{"state": ..., "findings": [...]}`.

Packages are imported inside the checks that need them, so one that is missing or broken is a finding and not the end of the
command. What may abort or hang a process is tried in another one first.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

from hunyuan_jax.errors import UserError, explain_disk_error, run_command

State = Literal["pass", "warning", "failure"]  # from best to worst
STATES: tuple[State, ...] = ("pass", "warning", "failure")

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
FIRST_DAY = datetime.date(2026, 11, 1)  # the package is younger, so no clock is right that shows an earlier day
START_SECONDS = 120.0  # for JAX to find its devices; a TPU takes half a minute
PROCESS_SECONDS = 60.0  # for processes that this one starts: to find each other and add, to save and restore
MOST_PROCESSES = 64
LEAST_MEMORY = 3 * 2**30  # bytes; the quickstart peaks at 2 GiB
LEAST_SPACE = 10 * 2**30  # bytes, see `check_space`
LEAST_SHARED = 2**30  # bytes
LEAST_FILES = 4096
LEAST_PSNR = 30.0  # dB; a smooth picture survives H.264 with 40 dB
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NCCL_", "CUDA_VISIBLE_DEVICES", "TF_XLA_FLAGS")
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0")  # what the drivers of GPUs and of TPUs put there
KINDS = ("Clip", "Latent")  # of datasets
INSTALL = "Install what is pinned: pip install -r requirements.txt, with this Python."


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it where that is no pass."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is checked: the folder of runs, a dataset or none, and how many processes exchange numbers."""

    workdir: Path
    data: Path | None = None
    processes: int = 2


def checks(options: Options) -> dict[str, Callable[[], Finding]]:
    """Every check by its name, in the order of the lines."""
    table: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": lambda: check_packages(ROOT / "requirements.txt"),
        "clock": lambda: check_clock(datetime.datetime.now(datetime.UTC).date()),
        "settings": lambda: check_settings(os.environ),
        "jax": check_jax,
        "devices": check_devices,
        "collectives": check_collectives,
        "processes": lambda: check_processes(options.processes),
        "host memory": check_host_memory,
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "space": lambda: check_space(options.workdir),
        "writing": lambda: check_writing(options.workdir),
        "checkpoint": lambda: check_checkpoint(options.workdir),
        "video": check_video,
    }
    data = options.data
    return table if data is None else table | {"data": lambda: check_data(data)}


NEEDS_JAX = ("devices", "collectives")


def examine(options: Options) -> Iterator[Finding]:
    """Yields the finding of each check, in order. Where JAX does not start, what needs it is not tried: it would end this process."""
    starts = True
    for name, check in checks(options).items():
        if name in NEEDS_JAX and not starts:
            yield Finding(name, "failure", "not tried, since JAX does not start here", "See the line of jax.")
            continue
        finding = _attempt(name, check)
        if name == "jax":
            starts = finding.state == "pass"
        yield finding


def _attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; an exception inside it is a failure with the exception's text."""
    try:
        return check()
    except UserError as error:
        return Finding(name, "failure", _one_line(str(error)), "Follow the message.")
    except ImportError as error:
        return Finding(name, "failure", _one_line(str(error)), INSTALL)
    except Exception as error:
        remedy = explain_disk_error(error) or "Mend what the message names."
        return Finding(name, "failure", _one_line(f"{type(error).__name__}: {error}"), remedy)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def check_python(oldest: tuple[int, int] = OLDEST_PYTHON) -> Finding:
    """The interpreter's version is at least `oldest`."""
    found = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if sys.version_info < oldest:
        return Finding("python", "failure", found, f"Use Python {oldest[0]}.{oldest[1]} or later.")
    return Finding("python", "pass", found)


def check_packages(requirements: Path) -> Finding:
    """Installed packages against the pins in a file: a missing one is a failure, another version a warning."""
    from packaging.requirements import Requirement

    if not requirements.is_file():
        return Finding(
            "packages", "warning", f"{requirements} is absent, so versions were compared with nothing", "Run from a full checkout."
        )
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    installed = {pin.name: _installed(pin.name) for pin in pins}
    missing = [pin.name for pin in pins if installed[pin.name] is None]
    others = [
        f"{pin.name} {version} instead of {pin.specifier}"
        for pin in pins
        if (version := installed[pin.name]) is not None and not pin.specifier.contains(version, prereleases=True)
    ]
    if missing:
        return Finding("packages", "failure", f"{len(missing)} of {len(pins)} packages are missing: {_some(missing)}", INSTALL)
    if others:
        return Finding("packages", "warning", f"{len(others)} of {len(pins)} packages are not as pinned: {_some(others)}", INSTALL)
    return Finding("packages", "pass", f"{len(pins)} packages as pinned")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _some(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def check_clock(today: datetime.date) -> Finding:
    """The day (UTC) is none before this package was written."""
    if today < FIRST_DAY:
        remedy = "Set the clock: certificates are checked against it, and TensorBoard orders its files by it."
        return Finding("clock", "warning", f"{today} (UTC), before {FIRST_DAY}, when this package was written", remedy)
    return Finding("clock", "pass", f"{today} (UTC)")


def check_settings(environment: Mapping[str, str]) -> Finding:
    """The variables that JAX, XLA and NCCL read. A folder for compiled programs that cannot be written is a warning."""
    given = [f"{name}={environment[name]!r}" for name in sorted(environment) if name.startswith(VARIABLES)]
    found = ", ".join(given) or "no variable of JAX or XLA is set"
    cache = environment.get("JAX_COMPILATION_CACHE_DIR")
    if not cache:
        return Finding("settings", "pass", f"{found}; compiled programs are not kept (JAX_COMPILATION_CACHE_DIR would name a folder)")
    if "://" not in cache and not _can_be_written(Path(cache)):
        remedy = "Name another folder in JAX_COMPILATION_CACHE_DIR, or every start compiles its programs anew."
        return Finding("settings", "warning", f"{found}; the folder {cache} for compiled programs cannot be written", remedy)
    return Finding("settings", "pass", found)


def _can_be_written(folder: Path) -> bool:
    """Whether `folder`, or the nearest folder above it where it does not exist yet, takes new files."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def check_jax(environment: Mapping[str, str] | None = None, *, seconds: float = START_SECONDS) -> Finding:
    """JAX finds its devices in a process of its own, in the given environment, by default this one's.

    There, because XLA aborts the process at a flag in XLA_FLAGS that it does not know, and a TPU that another process holds may hang it.
    """
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    (ended,) = run_together([command], environment=os.environ if environment is None else environment, seconds=seconds)
    if ended.code is None:
        remedy = "End other processes that hold the accelerator; on a slice of several hosts, run this on all of them at the same time."
        return Finding("jax", "failure", f"JAX found no devices in {seconds:.0f} s and was stopped", remedy)
    if ended.code:
        remedy = "Mend what the message names: JAX_PLATFORMS, the driver, or jax and jaxlib of one version."
        if "XLA_FLAGS" in ended.said:
            remedy = "Remove it from XLA_FLAGS; flags of the TPU compiler belong in LIBTPU_INIT_ARGS."
        return Finding("jax", "failure", f"JAX does not start, its process ended with code {ended.code}: {ended.said}", remedy)
    return Finding("jax", "pass", "starts and accepts its flags")


def check_devices(accelerators: Sequence[str | Path] = ACCELERATORS) -> Finding:
    """Every device of this process squares a matrix of integers without error; platform, kind, count and memory are said.

    The integers are below 15, so every precision that a matrix unit multiplies float32 in holds them, and their sums, exactly.
    """
    import jax
    import numpy as np

    matrix = np.arange(128 * 128).reshape(128, 128) % 15
    devices = jax.local_devices()
    program = jax.jit(_square)
    answers = {device: np.asarray(program(jax.device_put(matrix.astype(np.float32), device))) for device in devices}
    wrong = [str(device) for device, answer in answers.items() if not np.array_equal(answer, matrix @ matrix)]
    found = f"{len(devices)} x {devices[0].platform}, {devices[0].device_kind}{_memory_of(devices)}"
    if wrong:
        remedy = "Take these devices out of service, or update their driver: what is trained on them would be wrong."
        return Finding("devices", "failure", f"{found}; a product of integers is wrong on {_some(wrong)}", remedy)
    idle = [path for path in accelerators if Path(path).exists()]
    if idle and devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        remedy = "Install JAX's extra of the same version, jax[tpu] or jax[cuda13], or mend the driver; JAX's own warning says more."
        return Finding("devices", "warning", f"{found}, though {idle[0]} says that there is an accelerator", remedy)
    return Finding("devices", "pass", f"{found}; a product of integers is exact on each")


def _square(matrix: Any) -> Any:
    return matrix @ matrix


def _memory_of(devices: Sequence[Any]) -> str:
    """The least memory that JAX may use of any of the devices, empty where they do not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit]
    return f", {_gib(min(known))} of memory each" if known else ""


def check_collectives() -> Finding:
    """The devices of this process add what each of them holds, without error."""
    import jax

    devices = jax.local_devices()
    if not all_reduce_is_exact(devices):
        remedy = "Check the links between devices and the driver; with NCCL, NCCL_DEBUG=INFO names them."
        return Finding("collectives", "failure", f"a sum over {len(devices)} devices is wrong", remedy)
    return Finding(
        "collectives", "pass", f"a sum over {len(devices)} {'device' if len(devices) == 1 else 'devices'} of this process is exact"
    )


def all_reduce_is_exact(devices: Sequence[Any]) -> bool:
    """Whether a sum over `devices`, by psum on a mesh of them, is right to the bit on each device of this process.

    The devices hold integers whose sums float32 holds exactly, up to 700 devices.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from hunyuan_jax.parallel.mesh import AXES, MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(), devices)
    held = np.outer(np.arange(1, len(devices) + 1), np.arange(64)).astype(np.float32)  # a row for each device
    spread = jax.make_array_from_callback(held.shape, NamedSharding(mesh, PartitionSpec(AXES)), lambda index: held[index])
    add = jax.shard_map(lambda row: jax.lax.psum(row, AXES), mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec())
    pieces = jax.jit(add)(spread).addressable_shards
    return all(np.array_equal(np.asarray(piece.data), held.sum(axis=0, keepdims=True)) for piece in pieces)


def check_processes(count: int, *, seconds: float = PROCESS_SECONDS) -> Finding:
    """`count` processes on this machine's CPU find each other at a free port and add what each holds, over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [command_for(add_over_processes, str(port), str(process), str(count)) for process in range(count)]
    ended = run_together(commands, environment={**os.environ, "JAX_PLATFORMS": "cpu"}, seconds=seconds)
    failed = [(process, end) for process, end in enumerate(ended) if end.code]
    if failed:
        process, end = failed[0]
        remedy = "Mend what the message names; between hosts the same would fail."
        return Finding("processes", "failure", f"process {process} of {count} ended with code {end.code}: {end.said}", remedy)
    hung = [process for process, end in enumerate(ended) if end.code is None]
    if hung:
        remedy = "Name 127.0.0.1 and the hosts in no_proxy, let the machine's name lead to an address of its own, and open the firewall."
        found = f"{len(hung)} of {count} processes hung for {seconds:.0f} s and were killed; the first: {ended[hung[0]].said}"
        return Finding("processes", "failure", found, remedy)
    return Finding("processes", "pass", f"a sum over {count} processes of this machine is exact")


def add_over_processes(argv: list[str]) -> None:
    """What each process of `check_processes` runs, given port, process and count. Raises `UserError` where the sum is wrong."""
    import jax

    port, process, count = map(int, argv[1:])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address, num_processes=count, process_id=process, cluster_detection_method="deactivate", coordinator_bind_address=address
    )
    exact = jax.process_count() == count and all_reduce_is_exact(jax.devices())
    jax.distributed.shutdown()
    if not exact:
        raise UserError(f"a sum over {count} processes is wrong")


def command_for(function: Callable[[list[str]], None], *arguments: str) -> list[str]:
    """The command that runs a function of this file, of an argv, in a process of its own."""
    return [sys.executable, "-c", f"from hunyuan_jax import doctor; doctor.run_command(doctor.{function.__name__})", *arguments]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code (a signal's is negative), or None where it was killed; and the line that says why."""

    code: int | None
    said: str


def run_together(commands: Sequence[Sequence[str]], *, environment: Mapping[str, str], seconds: float) -> list[Ended]:
    """Runs programs at the same time, without a shell. Those left when one fails, or after `seconds`, are killed."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for command, output in zip(commands, outputs, strict=True):
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                    )
                )
            while time.monotonic() < deadline:
                codes = [process.poll() for process in started]
                if None not in codes or any(codes):
                    break
                time.sleep(0.05)
            codes = [process.poll() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [Ended(code, _reason_in(output)) for code, output in zip(codes, outputs, strict=True)]


def _reason_in(output: IO[bytes]) -> str:
    """The line that says why a program ended: the last that calls itself an error or is about a flag, else the last of all."""
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("error: ") or "nknown flag" in line] or lines or ["it said nothing"]
    return _one_line(re.sub(r"^(error: |[EFIW]\d{4} .*?\] )", "", telling[-1]))


def check_host_memory(least: float = LEAST_MEMORY) -> Finding:
    """Memory of the machine that programs may still take, in bytes; less than `least` is a warning."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} free of {_gib(memory.total)}, {os.cpu_count()} CPU cores"
    if memory.available < least:
        remedy = f"Free {_gib(least)}: the quickstart peaks at 2 GiB. Large models are loaded piece by piece, but need more."
        return Finding("host memory", "warning", found, remedy)
    return Finding("host memory", "pass", found)


def check_shared_memory(folder: Path = Path("/dev/shm"), *, least: float = LEAST_SHARED) -> Finding:
    """The size of the shared memory; less than `least` bytes is a warning.

    NCCL, and loaders with processes of their own, hand data over in it. Containers come with 64 MiB.
    """
    if sys.platform != "linux":
        return Finding("shared memory", "pass", f"not a folder on {sys.platform}")
    remedy = f"Give the container at least {_gib(least)} of it: docker run --shm-size, or a volume of medium Memory at {folder}."
    if not folder.is_dir():
        return Finding("shared memory", "warning", f"{folder} is absent", remedy)
    size = shutil.disk_usage(folder).total
    found = f"{_gib(size)} at {folder}"
    return Finding("shared memory", "warning", found, remedy) if size < least else Finding("shared memory", "pass", found)


def check_open_files(least: int = LEAST_FILES) -> Finding:
    """How many files a process may hold open: each shard of a dataset is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} in a process"
    if soft != resource.RLIM_INFINITY and soft < least:
        allowed = "no limit" if hard == resource.RLIM_INFINITY else hard
        remedy = f"Raise it before training on more than {soft} shards: ulimit -n {least} (the hard limit is {allowed})."
        return Finding("open files", "warning", found, remedy)
    return Finding("open files", "pass", found)


def check_space(workdir: Path, *, least: float = LEAST_SPACE) -> Finding:
    """Free bytes at the work directory; less than `least` is a warning.

    A checkpoint takes 16 bytes a parameter (float32 weights, their average, two moments). Two are kept while a third is written, so
    10 GiB hold those of 220 million parameters.
    """
    usage = shutil.disk_usage(workdir)
    found = f"{_gib(usage.free)} free of {_gib(usage.total)} at {workdir}"
    if usage.free < least:
        remedy = f"Free {_gib(least)}: checkpoints take 48 bytes a parameter in all, those of the 13B model about 600 GB."
        return Finding("space", "warning", found, remedy)
    return Finding("space", "pass", found)


def check_writing(workdir: Path, *, size: int = 4 * 2**20) -> Finding:
    """A file of `size` random bytes in the work directory is flushed to disk and renamed, and reads back as the same bits."""
    if not workdir.is_dir():
        said = "is no folder" if workdir.exists() else "does not exist"
        return Finding("writing", "failure", f"{workdir} {said}", "Make it with mkdir -p, or name another --workdir.")
    data = os.urandom(size)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=workdir) as folder:
        temporary, path = Path(folder) / "written.tmp", Path(folder) / "written"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        seconds = time.perf_counter() - started
        same = _read_from_disk(path) == data
    if not same:
        remedy = "Use another disk or file system: checkpoints on this one would be damaged without a word."
        return Finding("writing", "failure", f"{size} bytes came back from {workdir} as others", remedy)
    return Finding("writing", "pass", f"{size / 2**20:.0f} MiB on disk and renamed in {seconds:.2f} s, and read back the same")


def _read_from_disk(path: Path) -> bytes:
    """A file's bytes, not from the kernel's memory where the system lets us say so."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def check_checkpoint(workdir: Path, *, seconds: float = PROCESS_SECONDS) -> Finding:
    """A small tree saved by Orbax in the work directory comes back in the same bits, dtypes and shapes.

    On the CPU and in a process of its own: where a disk is full, each of Orbax's threads says so at length.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=workdir.absolute()) as folder:
        command = command_for(save_and_restore, str(Path(folder) / "tree"))
        (ended,) = run_together([command], environment={**os.environ, "JAX_PLATFORMS": "cpu"}, seconds=seconds)
    if ended.code is None:
        remedy = "Use a faster or another file system, one that locks and renames files."
        return Finding("checkpoint", "failure", f"a small tree was not saved and restored in {workdir} in {seconds:.0f} s", remedy)
    if ended.code:
        remedy = "Mend what the message names, or use another disk or file system."
        return Finding("checkpoint", "failure", f"a small tree cannot be saved and restored in {workdir}: {ended.said}", remedy)
    return Finding("checkpoint", "pass", "a small tree is saved and restored in the same bits")


def save_and_restore(argv: list[str]) -> None:
    """What the process of `check_checkpoint` runs, given a path that does not exist. Raises `UserError` for what is not as it was."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    odd = jnp.asarray([0.0, -0.0, 1e-40, 3.4e38, jnp.inf, jnp.nan], jnp.float32)
    tree = {"kernel": jnp.arange(2**18, dtype=jnp.float32) / 7, "odd": odd, "half": odd.astype(jnp.bfloat16), "step": jnp.int32(7)}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(argv[1]), tree)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(Path(argv[1]), jax.eval_shape(lambda: tree))
    except Exception as error:
        raise UserError(explain_disk_error(error) or f"{type(error).__name__}: {_one_line(str(error))}") from error

    def bits(leaf: Any) -> tuple[str, tuple[int, ...], bytes]:
        return leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()

    if changed := [name for name in tree if bits(tree[name]) != bits(restored[name])]:
        raise UserError(f"{_some(changed)} came back changed")


def check_video(frames: Any = None, *, fps: float = 12.0) -> Finding:
    """uint8 RGB `frames` [T, H, W, 3], by default a moving gradient, are written as mp4 and read: as many, as large, much the same."""
    import numpy as np

    from hunyuan_jax.video_io import read_video, write_video

    frames = _moving_gradient() if frames is None else frames
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradient.mp4"
        write_video(path, frames, fps=fps)
        video = read_video(path)
    if video.frames.shape != frames.shape or not math.isclose(video.fps, fps, rel_tol=1e-3):
        found = f"{list(frames.shape)} at {fps} frames/s was written, {list(video.frames.shape)} at {video.fps} was read"
        return Finding("video", "failure", found, f"PyAV does not do what is expected of it. {INSTALL}")
    error = float(np.mean(np.square(video.frames.astype(float) - frames)))
    psnr = 10 * math.log10(255**2 / max(error, 1e-6))
    found = f"{len(frames)} frames through H.264 with {psnr:.1f} dB"
    if psnr < LEAST_PSNR:
        return Finding("video", "failure", found, f"At least {LEAST_PSNR:.0f} dB were expected; the codec is damaged. {INSTALL}")
    return Finding("video", "pass", found)


def _moving_gradient(num_frames: int = 9, height: int = 48, width: int = 64) -> Any:
    import numpy as np

    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([40 + 2 * x + t, 40 + 3 * y, 200 - x - y], axis=-1).astype(np.uint8)


def check_data(folder: Path) -> Finding:
    """The dataset opens, and its first record decodes to what it says it is. Raises `UserError` where it does not open."""
    from hunyuan_jax.data.dataset import open_dataset
    from hunyuan_jax.data.records import Clip

    dataset = open_dataset(folder, kind=_stated_kind(folder))
    (record,) = dataset.read([0])
    said, came = _clip_shapes(record) if isinstance(record, Clip) else _latent_shapes(record)
    if said != came:
        remedy = "Write the dataset again."
        return Finding("data", "failure", f"the first {dataset.kind} says that it is {said}, but it decodes to {came}", remedy)
    return Finding("data", "pass", f"{len(dataset.rows)} records of kind {dataset.kind} in {folder}; the first decodes to {came}")


def _stated_kind(folder: Path) -> str:
    """The kind that a dataset says it is of. Where it says none that is known, the first: opening it then says what is wrong."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stated = json.loads((folder / "dataset.json").read_text()).get("kind")
        return stated if stated in KINDS else KINDS[0]
    return KINDS[0]


def _clip_shapes(clip: Any) -> tuple[str, str]:
    """What a clip says that it is, and what it decodes to."""
    from hunyuan_jax.video_io import read_video

    frames, height, width, _ = read_video(clip.video).frames.shape
    return f"{clip.num_frames} frames of {clip.height} x {clip.width}", f"{frames} frames of {height} x {width}"


def _latent_shapes(latent: Any) -> tuple[str, str]:
    """What a latent should be, finite and with a variance for each mean, and what it is."""
    import numpy as np

    finite = all(np.isfinite(values.astype(np.float32)).all() for values in (latent.mean, latent.logvar))
    said = f"finite latents {list(latent.mean.shape)}"
    return said, f"{'finite' if finite else 'not finite'} latents {list(latent.logvar.shape)}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hunyuan_jax.doctor", description="Says what this machine lacks for training.")
    parser.add_argument(
        "--workdir", type=Path, default=Path("."), metavar="DIR", help="folder that runs will be written to (default: here)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset of clips or latents to open")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="local processes that exchange numbers (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    given = parser.parse_args(argv[1:])
    if not 2 <= given.processes <= MOST_PROCESSES:
        raise UserError(f"--processes must be between 2 and {MOST_PROCESSES}, not {given.processes}.")
    options = Options(workdir=given.workdir.absolute(), data=given.data, processes=given.processes)
    findings, output = [], sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries may print is none of our lines
        for finding in examine(options):
            findings.append(finding)
            if not given.json:
                print(format_finding(finding), file=output, flush=True)
    worst = max((finding.state for finding in findings), key=STATES.index)
    if given.json:
        print(json.dumps({"state": worst, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    sys.exit(1 if worst == "failure" else 0)


def format_finding(finding: Finding) -> str:
    """One line: `warning  open files: 1024 in a process. Remedy: Raise it ...`."""
    line = f"{finding.state:8} {finding.name}: {finding.found.rstrip('.')}."
    return f"{line} Remedy: {finding.remedy}" if finding.remedy else line


if __name__ == "__main__":
    run_command(main)
