"""What a run says about itself: metrics in files, one line in the log, a bar with the time left, and its environment.

`MetricWriter` has the methods of clu's interface, without TensorFlow, and writes two things into the working directory:

    metrics.jsonl         one JSON object a line: step, seconds since the epoch, and the scalars
    events.out.tfevents*  the same scalars for TensorBoard, with sample videos as animated pictures, texts and hyperparameters

A run that resumes at step S continues both as if what was written after S had never been. Its scalars are the bits that an uninterrupted
run would have written, but for what the machine says: names under `time/` and `memory/`.
"""

import collections
import io
import json
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import psutil
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from hunyuan_jax.chips import peak_flops
from hunyuan_jax.data.buckets import Bucket

MACHINE = ("time/", "memory/")  # beginnings of names whose values no two runs have alike
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "clu", "ml-collections", "numpy", "av", "apache-beam")


class MetricWriter:
    """Writes metrics of process 0 to `workdir`; on other processes it writes nothing, so that the loop needs no condition.

    `start_step` is the last step done before: 0 for a run from the start, which begins its files anew, else the step restored
    from, after which earlier records are dropped; of those up to it the first `lines` stay, all where that is None. Values may be
    arrays on a device; they are fetched here and nowhere else.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0, lines: int | None = None) -> None:
        self.lines = 0  # in metrics.jsonl
        if jax.process_index() == 0:
            self.lines = _forget_after(Path(workdir) / "metrics.jsonl", start_step, lines)
        self._lines, self._events = _open_files(Path(workdir)) if jax.process_index() == 0 else _open_nowhere()
        self._event(0, file_version="brain.Event:2")
        # TensorBoard forgets what an earlier run wrote from this step on.
        self._event(start_step + 1 if start_step else 0, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line and one event; a value that is not finite becomes null in the line, since JSON has no NaN."""
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "seconds": round(time.time(), 3)} | finite) + "\n")
        self.lines += 1
        self._event(step, summary=_summary(simple_value=values))

    def write_videos(self, step: int, videos: Mapping[str, np.ndarray], *, fps: float = 8.0) -> None:
        """Writes uint8 videos [N, T, H, W, 3] for TensorBoard, each a GIF with its N clips side by side."""
        self._event(step, summary=_summary(image={name: _gif_image(np.asarray(clips), fps=fps) for name, clips in videos.items()}))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts for TensorBoard, which shows them as Markdown."""
        for name, text in texts.items():
            self._event(step, summary=text_pb(name, text))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping of hyperparameters for TensorBoard; what is no number, truth value or string is written as one."""
        plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in hparams.items()}
        self._event(0, summary=hparams_summary.hparams_pb(plain))

    def flush(self) -> None:
        """Returns when the lines are on the disk: a checkpoint that comes later must not be there without them."""
        self._lines.flush()
        self._events.flush()
        if jax.process_index() == 0:
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _event(self, step: int, **fields: Any) -> None:
        self._events.write(event_pb2.Event(wall_time=time.time(), step=step, **fields).SerializeToString())
        self._events.flush()


def _open_files(workdir: Path) -> tuple[IO[str], RecordWriter]:
    workdir.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names, so the name begins with the time.
    events = workdir / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
    return (workdir / "metrics.jsonl").open("a", buffering=1), RecordWriter(events.open("wb"))


def _open_nowhere() -> tuple[IO[str], RecordWriter]:
    return open(os.devnull, "w"), RecordWriter(open(os.devnull, "wb"))


def _forget_after(path: Path, start_step: int, lines: int | None) -> int:
    """Rewrites `path` with the first `lines` of steps 1 to `start_step` (and 0 if there are any such), whole or not at all; counts them."""
    if not path.exists():
        return 0
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if start_step and line["step"] <= start_step][:lines]
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order. A line that a kill cut short, or that has no step, is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _summary(**values: Mapping[str, Any]) -> summary_pb2.Summary:
    """A TensorBoard summary from {field of its value: {tag: content}}."""
    pairs = [(tag, {field: content}) for field, tags in values.items() for tag, content in tags.items()]
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, **content) for tag, content in pairs])


def _gif_image(clips: np.ndarray, *, fps: float) -> summary_pb2.Summary.Image:
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8:
        raise ValueError(f"A uint8 array [N, T, H, W, 3] of videos was expected; {clips.dtype} {list(clips.shape)} came.")
    frames = np.concatenate(list(clips), axis=2)  # T H (N W) 3
    pictures = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    return summary_pb2.Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=file.getvalue())


def last_written(workdir: Path) -> float:
    """When the metrics in `workdir` were last written, in seconds since the epoch; 0 where there are none."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return float(lines[-1].get("seconds") or 0.0) if lines else 0.0


def repeatable(line: Mapping[str, Any]) -> dict[str, Any]:
    """What any run of the same course writes into this line: all but what the machine says."""
    return {name: value for name, value in line.items() if name != "seconds" and not name.startswith(MACHINE)}


class MetricLog:
    """Averages of what steps return, overall and by bucket; values stay on the device until they are taken.

    A value is a number, or, of a stack of layers, an array of one for each.
    """

    def __init__(self, buckets: Sequence[Bucket], untaken: Sequence[tuple[int, dict[str, Any]]] = ()) -> None:
        self._buckets = buckets
        self._values: list[tuple[int, dict[str, Any]]] = list(untaken)

    def add(self, bucket: int, values: dict[str, jax.Array]) -> None:
        self._values.append((bucket, values))

    def untaken(self) -> tuple[tuple[int, dict[str, Any]], ...]:
        """What the next `take` will average: with it another log continues this one."""
        rows = jax.device_get(self._values)
        return tuple((bucket, {name: np.asarray(value).tolist() for name, value in values.items()}) for bucket, values in rows)

    def take(self) -> dict[str, float]:
        """The averages since the last call. Of batches, what is under `data/`, there are those of each bucket alone."""
        rows = self.untaken()
        self._values = []
        everything = [values for _, values in rows]
        out = _averages([{name: value for name, value in row.items() if not name.startswith("data/")} for row in everything])
        for count in out.keys() & {"skipped", "spikes"}:
            out[count] = everything[-1][count]
        samples = sum(self._buckets[bucket].batch for bucket, _ in rows)
        for bucket in sorted({bucket for bucket, _ in rows}):
            name, batch = self._buckets[bucket].name, self._buckets[bucket].batch
            mine = [values for of, values in rows if of == bucket]
            own = _averages([{key: value for key, value in row.items() if key == "loss" or key.startswith("data/")} for row in mine])
            out |= {f"{key}/{name}": value for key, value in own.items()} | {f"data/share/{name}": len(mine) * batch / samples}
        return out


def _averages(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means by name, over the rows that have it; those of an array's elements by their numbers, such as `param_norm/double_blocks/03`."""
    out: dict[str, float] = {}
    for key in {key: None for row in rows for key in row}:
        mean = np.mean([row[key] for row in rows if key in row], axis=0)
        out |= {key: float(mean)} if mean.ndim == 0 else {f"{key}/{n:02}": float(value) for n, value in enumerate(mean)}
    return out


class Throughput:
    """What a run goes through in a second, between two readings: samples, and whatever else is counted; `clock` gives seconds.

    With a `peak`, the FLOPs that all devices could do in a second, the share that `model_flops` are of it is `time/mfu`.
    """

    def __init__(self, *, peak: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._peak = clock, peak
        self._since = clock()
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, **counts: float) -> None:
        self._counts.update(counts)  # type: ignore[arg-type]

    def take(self) -> dict[str, float]:
        """Rates since the last call, or since the start, as `time/NAME_per_second`; a new interval begins here."""
        now = self._clock()
        rates = {name: count / max(now - self._since, 1e-9) for name, count in self._counts.items()}
        self._since = now
        self._counts.clear()
        flops = rates.pop("model_flops", None)
        out = {f"time/{name}_per_second": rate for name, rate in rates.items()}
        if flops is not None:
            out["time/model_tflops_per_second"] = flops / 1e12
            if self._peak is not None:
                out["time/mfu"] = flops / self._peak
        return out


def peak_of(devices: Sequence[jax.Device]) -> float | None:
    """FLOPs that all these devices can do in a second; None where that is not known, as of CPUs."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


def memory() -> dict[str, float]:
    """GiB of this process: in use and at the most, on the fullest of its devices, where they say so, and on the host."""
    kept = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"bytes_in_use": "memory/device_gib", "peak_bytes_in_use": "memory/device_peak_gib"}
    out = {ours: max(stats[name] for stats in kept) / 2**30 for name, ours in names.items() if kept and all(name in s for s in kept)}
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return out | {"memory/host_gib": psutil.Process().memory_info().rss / 2**30, "memory/host_peak_gib": peak / 2**30}


def format_line(step: int, scalars: Mapping[str, Any]) -> str:
    """One line for the log, with units: `step 1200  loss 0.1432  psnr 28.31 dB  12.4 samples/s`."""
    return "  ".join([f"step {step}", *(_format_scalar(name, float(value)) for name, value in scalars.items())])


def _format_scalar(name: str, value: float) -> str:
    if name == "time/samples_per_second":
        return f"{value:.4g} samples/s"
    if name == "time/mfu":
        return f"MFU {100 * value:.0f} %"
    if name.endswith("_db"):
        return f"{name.removesuffix('_db')} {value:.2f} dB"
    return f"{name} {value:.4g}"


def progress(total: int, initial: int) -> tqdm:
    """A bar over `total` steps, `initial` of them done before, with the time left, on process 0; the caller updates and closes it."""
    return tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, smoothing=0.05, disable=jax.process_index() != 0)


def environment() -> dict[str, Any]:
    """What this process runs on: versions of Python and of the packages that matter, the devices and the number of CPU cores."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "process_count": jax.process_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
