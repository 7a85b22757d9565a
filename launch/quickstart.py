"""The quickstart: from nothing to a report on generated videos, step by step, each step a command anyone can run by hand.

    shapes world -> curate -> train VAE -> encode -> train DiT -> generate -> evaluate -> report

It knows the steps and nothing of what they do: it runs them as subprocesses, measures their time and memory, and remembers which
are done (`.steps.json`), so the same command after a kill continues. `timings.json` holds seconds and peak memory of each step,
added up over all attempts; time lost to a kill counts too.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.children import ends_with_parent, passing_signals_to

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 1.0  # between two measurements of memory
SAVE_SECONDS = 5.0  # between two writes of the time used; a kill loses at most this much of the account
GRACE_SECONDS = 60.0  # that a step has to end after a signal
STOPPED = 128 + signal.SIGTERM  # exit code of a training that someone told to stop, and that has saved and is not done
# What makes small programs on a CPU quick; what the user has set stands. XLA frees its temporary memory after every step, and huge
# pages make faulting it in again cheap; the lowest level that optimises compiles sooner and runs as fast (BENCHMARKS.md).
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_FLAGS": "--xla_backend_optimization_level=1"}
OWNER = "HUNYUAN_JAX_RUN"  # environment variable that marks the processes of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command: `arguments` follow `python -m`, with {run} for the run directory; `leaves` is what it leaves there."""

    name: str
    says: str
    arguments: tuple[str, ...]
    leaves: str
    expected_seconds: float


def _training(name: str, says: str, *, part: str, data: str, expected_seconds: float, more: tuple[str, ...] = ()) -> Step:
    """A training of the part of configs/quickstart.py, in the folder `name`, on what lies in the folder `data`."""
    config = f"--config=configs/quickstart.py:{part}"
    return Step(
        name=name,
        says=says,
        arguments=(
            *("hunyuan_jax.train", config, "--workdir", f"{{run}}/{name}", f"--config.data.path={{run}}/{data}"),
            *(f"--stopped_code={STOPPED}", *more),
        ),
        leaves=f"{name}/checkpoints",
        expected_seconds=expected_seconds,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything: `suffix` picks the parts of configs/quickstart.py, `seconds` is each step's expected time on two cores."""

    shots: int
    suffix: str
    seconds: dict[str, float]


SHORT = Size(shots=1200, suffix="", seconds={"raw": 20, "clips": 45, "vae": 60, "latents": 90, "t2v": 320, "videos": 42, "evaluation": 35})
LONG = Size(
    shots=6000, suffix="_long", seconds={"raw": 75, "clips": 165, "vae": 42, "latents": 400, "t2v": 2100, "videos": 40, "evaluation": 30}
)
WANDER = 0.08  # frame widths; with shapes near the middle of the frame fewer clips tell apart what the words mean


def _clip_steps(size: Size) -> tuple[Step, ...]:
    """Raw videos and the clips in them."""
    return (
        Step(
            name="raw",
            says=f"Drawing raw videos of the shapes world, {size.shots} shots in all",
            arguments=(
                *("data_prep.shapes_world", "--output", "{run}/raw", "--clips", str(size.shots), "--seed", "0"),
                *("--wander", str(WANDER), "--workers", "2"),
            ),
            leaves="raw/prompts.jsonl",
            expected_seconds=size.seconds["raw"],
        ),
        Step(
            name="clips",
            says="Curating them into single-shot clips",
            arguments=(
                *("data_prep.curate", "--input", "{run}/raw", "--output", "{run}/clips"),
                *("--config", "configs/curation.py", "--workers", "2"),
            ),
            leaves="clips/dataset.json",
            expected_seconds=size.seconds["clips"],
        ),
    )


def _vae_steps(size: Size, *, from_scratch: bool) -> tuple[Step, ...]:
    """Either a few steps further from the carried weights, or the two halves of the training that made them."""
    if not from_scratch:
        further = "Training the VAE a few steps further"
        return (_training("vae", further, part="vae", data="clips", expected_seconds=size.seconds["vae"]),)
    first = _training("vae_first", "Training the VAE from nothing, first half", part="vae_first", data="clips", expected_seconds=2000)
    export = Step(
        name="vae_export",
        says="Exporting it, for the second half to start from",
        arguments=("hunyuan_jax.export", "--checkpoint", "{run}/vae_first", "--output", "{run}/vae_exported", "--dtype", "bf16"),
        leaves="vae_exported/config.json",
        expected_seconds=10,
    )
    start = ("--config.start={run}/vae_exported",)
    second = _training("vae", "Training the VAE, second half", part="vae_finish", data="clips", expected_seconds=2000, more=start)
    return (first, export, second)


def _latent_step(size: Size) -> Step:
    return Step(
        name="latents",
        says="Encoding clips and captions",
        arguments=(
            *("data_prep.encode", "--clips", "{run}/clips", "--vae", "{run}/vae", "--output", "{run}/latents"),
            *("--config", f"configs/quickstart.py:encode{size.suffix}"),
        ),
        leaves="latents/dataset.json",
        expected_seconds=size.seconds["latents"],
    )


def _result_steps(size: Size) -> tuple[Step, ...]:
    """What is made with the trained models and said of it."""
    return (
        Step(
            name="videos",
            says="Generating a video for each held-out prompt",
            arguments=(
                *("hunyuan_jax.generate", "--checkpoint", "{run}/t2v", "--prompts", "{run}/raw/prompts.jsonl"),
                *("--output", "{run}/videos"),
            ),
            leaves="videos/index.json",
            expected_seconds=size.seconds["videos"],
        ),
        Step(
            name="evaluation",
            says="Measuring the VAE, the flow loss and what the videos show",
            arguments=(
                *("hunyuan_jax.evaluate", "--checkpoint", "{run}/t2v", "--latents", "{run}/latents", "--clips", "{run}/clips"),
                *("--videos", "{run}/videos", "--output", "{run}/evaluation.json"),
            ),
            leaves="evaluation.json",
            expected_seconds=size.seconds["evaluation"],
        ),
        Step(
            name="report",
            says="Writing the report",
            arguments=("hunyuan_jax.report", "--run", "{run}"),
            leaves="report.html",
            expected_seconds=2,
        ),
    )


def quickstart_steps(*, from_scratch: bool, long: bool) -> tuple[Step, ...]:
    """Every step of a variant, in order."""
    size = LONG if long else SHORT
    dit = _training(
        "t2v",
        "Training the diffusion transformer by flow matching",
        part=f"t2v{size.suffix}",
        data="latents",
        expected_seconds=size.seconds["t2v"],
    )
    return (*_clip_steps(size), *_vae_steps(size, from_scratch=from_scratch), _latent_step(size), dit, *_result_steps(size))


class QuickstartError(Exception):
    """Why the quickstart ends: its text is printed, `code` is the exit code."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


def run_steps(steps: Sequence[Step], folder: Path, *, variant: str) -> None:
    """Runs what is not done yet of `steps` in `folder`. `variant` names the steps' kind; a folder holds one kind only.

    Raises `QuickstartError` when a step fails, a signal came, or the folder is in use or of another variant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        _end_leftovers(folder)
        done = _read_done(folder, variant)
        redo = False
        for number, step in enumerate(steps, start=1):
            head = f"[{number}/{len(steps)}]"
            # What comes after a step that ran again may rest on other input; the commands themselves find out cheaply.
            redo = redo or done.get(step.name) != list(step.arguments) or not (folder / step.leaves).exists()
            if not redo:
                print(f"{head} {step.says}: done before", flush=True)
                continue
            print(f"{head} {step.says} {_overall(steps, number - 1, _read_timings(folder))}", flush=True)
            done = {earlier.name: done[earlier.name] for earlier in steps[: number - 1]}
            _write_json(folder / ".steps.json", {"variant": variant, "done": done})
            _run_step(step, folder, head)
            done[step.name] = list(step.arguments)
            _write_json(folder / ".steps.json", {"variant": variant, "done": done})


def _run_step(step: Step, folder: Path, head: str) -> None:
    """Runs one step to its end, passing on signals and keeping account; raises `QuickstartError` unless it ended well."""
    account = _Account(folder, step.name)
    arguments = [argument.replace("{run}", str(folder)) for argument in step.arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", OWNER: str(folder)},
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=ends_with_parent(),
    )
    with passing_signals_to([process]) as received:
        code = _watch(process, account, received)
    # Workers that a step left behind would go on writing under the next one.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if received or code == STOPPED:
        raise QuickstartError(
            f"{head} {step.name} was interrupted; the same command continues here", 128 + received[0] if received else code
        )
    if code:
        again = "Run the same command again; it continues here."
        raise QuickstartError(
            f"{head} {step.name} ended with code {code}; its own words stand above. {again}", code if code > 0 else 128 - code
        )


def _watch(process: subprocess.Popen[bytes], account: "_Account", received: list[int]) -> int:
    deadline = None
    while True:
        try:
            code = process.wait(timeout=SAMPLE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            account.sample()
        if received:
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline or len(received) > 1:
                process.kill()
    account.finish()
    return code


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases however this process ends."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuickstartError(f"Another quickstart is at work in {folder}. Wait for it, end it, or choose another folder.") from error
        yield


def _end_leftovers(folder: Path) -> None:
    """Ends processes that a killed quickstart left at work in `folder`, known by the mark in their environment."""
    leftovers = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(OWNER) == str(folder):
                process.terminate()
                leftovers.append(process)
    if leftovers:
        print(f"Ending {len(leftovers)} processes of an earlier run that was killed", flush=True)
    for process in psutil.wait_procs(leftovers, timeout=GRACE_SECONDS)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


class _Account:
    """Seconds and peak memory of one step, on top of what earlier attempts used, saved now and then."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._name = folder / "timings.json", name
        self._before = next((row for row in _read_timings(folder) if row["step"] == name), {"seconds": 0.0, "peak_gib": 0.0})
        self._start = self._saved = time.monotonic()
        self._largest_before = _largest_child_bytes()
        self._peak = 0

    def sample(self) -> None:
        self._peak = max(self._peak, _tree_bytes())
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def finish(self) -> None:
        # The kernel's own maximum for single processes catches a peak between two samples.
        largest = _largest_child_bytes()
        if largest > self._largest_before:
            self._peak = max(self._peak, largest)
        self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        row = {
            "step": self._name,
            "seconds": round(self._before["seconds"] + self._saved - self._start, 2),
            "peak_gib": round(max(self._before.get("peak_gib", 0.0), self._peak / 2**30), 3),
        }
        others = [other for other in _read_timings(self._path.parent) if other["step"] != self._name]
        _write_json(self._path, [*others, row])


def _tree_bytes() -> int:
    """Memory of this process and all below it. Pages that processes share are counted once, by proportional set size."""
    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_full_info()
            # Where the system does not know the proportional size, what belongs to the process alone stands in.
            total += getattr(memory, "pss", 0) or memory.uss
    return total


def _largest_child_bytes() -> int:
    """The largest resident size that any one process below this one, now ended, ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _overall(steps: Sequence[Step], finished: int, timings: Sequence[dict[str, Any]]) -> str:
    """A bar of the whole quickstart with the time left, from expected times scaled by how fast this machine has been."""
    measured = {row["step"]: row["seconds"] for row in timings}
    known = [step for step in steps[:finished] if step.name in measured]
    expected = sum(step.expected_seconds for step in known)
    pace = sum(measured[step.name] for step in known) / expected if expected else 1.0
    left = sum(step.expected_seconds for step in steps[finished:])
    share = 1 - left / sum(step.expected_seconds for step in steps)
    bar = "#" * round(20 * share)
    return f"|{bar:.<20}| {share:.0%} of all, about {_duration(left * pace)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _read_done(folder: Path, variant: str) -> dict[str, list[str]]:
    state = _read_json(folder / ".steps.json", {"variant": variant, "done": {}})
    if state["variant"] != variant:
        raise QuickstartError(f"{folder} was made by the variant {state['variant']!r}, this is {variant!r}. Choose another folder.")
    return state["done"]


def _read_timings(folder: Path) -> list[dict[str, Any]]:
    return _read_json(folder / "timings.json", [])


def _read_json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return otherwise
    except ValueError as error:
        raise QuickstartError(f"{path} is damaged ({error}). Delete it and run the same command again.") from error


def _write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finish_summary(folder: Path) -> dict[str, Any]:
    """Puts seconds and peak memory into summary.json again, now that the report step itself is measured; returns it."""
    summary, timings = _read_json(folder / "summary.json", {}), _read_timings(folder)
    summary["seconds"] = round(sum(row["seconds"] for row in timings), 1)
    summary["peak_gib"] = max((row["peak_gib"] for row in timings), default=0.0)
    _write_json(folder / "summary.json", summary)
    return summary


def closing_words(folder: Path, summary: dict[str, Any]) -> str:
    """Where things are, and the figures, as text."""
    percent = lambda value: "-" if value is None else f"{value:.1%}"  # noqa: E731
    psnr = summary.get("vae_psnr_db")
    rows = [("all prompts", summary.get("accuracy")), ("unseen together in training", summary.get("accuracy_unseen"))]
    names = ("colour", "shape", "direction")
    return "\n".join(
        [
            "",
            f"Done in {_duration(summary['seconds'])}, peak memory {summary['peak_gib']:.2f} GiB",
            f"VAE PSNR on held-out clips: {'-' if psnr is None else f'{psnr:.2f} dB'}",
            f"{'Generated videos are right in':<30}" + "".join(f"{name:>11}" for name in names),
            *(f"  {label:<28}" + "".join(f"{percent((row or {}).get(name)):>11}" for name in names) for label, row in rows),
            "",
            f"Report   {folder / 'report.html'}",
            f"Videos   {folder / 'videos'}{os.sep}",
            f"Figures  {folder / 'summary.json'}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quickstart.sh", description="From raw video to generated videos and a report, in minutes.")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="run directory (default: runs/quickstart in the repository)")
    parser.add_argument("--from-scratch", action="store_true", help="train the VAE from nothing too; takes hours")
    parser.add_argument("--long", action="store_true", help="more shots, longer clips and a wider model; takes about an hour")
    options = parser.parse_args(argv)
    variant = "_".join(name for name in ("long", "from_scratch") if getattr(options, name)) or "quickstart"
    folder = Path(options.folder).resolve() if options.folder else ROOT / "runs" / variant
    try:
        run_steps(quickstart_steps(from_scratch=options.from_scratch, long=options.long), folder, variant=variant)
        print(closing_words(folder, finish_summary(folder)), flush=True)
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}. Free some space or choose another folder, then run the same command again.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
