"""What a run says about itself: metrics in files, one line in the log, a bar with the time left, and its environment.

`MetricWriter` has the methods of clu's interface, without TensorFlow, and writes two things into the working directory:

    metrics.jsonl         one JSON object a line: step, seconds since the epoch, and the scalars
    events.out.tfevents*  the same scalars for TensorBoard, with sample videos as animated pictures, texts and hyperparameters

A run that resumes at step S continues both as if what was written after S had never been.
"""

import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

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


class Throughput:
    """Samples per second between two readings; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since, self._samples = clock(), 0

    def add(self, samples: int) -> None:
        self._samples += samples

    def rate(self) -> float:
        """Samples per second since the last call, or since the start; a new interval begins here."""
        now = self._clock()
        rate = self._samples / max(now - self._since, 1e-9)
        self._since, self._samples = now, 0
        return rate


def format_line(step: int, scalars: Mapping[str, Any]) -> str:
    """One line for the log, with units: `step 1200  loss 0.1432  psnr 28.31 dB  12.4 samples/s`."""
    return "  ".join([f"step {step}", *(_format_scalar(name, float(value)) for name, value in scalars.items())])


def _format_scalar(name: str, value: float) -> str:
    if name == "samples_per_second":
        return f"{value:.4g} samples/s"
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
