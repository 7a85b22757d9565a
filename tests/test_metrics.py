"""Laws of the metric files: a resumed run leaves what an uninterrupted one leaves, and TensorBoard reads it back."""

import io
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.metrics import (
    MetricLog,
    MetricWriter,
    Throughput,
    environment,
    format_line,
    memory,
    progress,
    read_metrics,
    repeatable,
)


def write_steps(workdir, steps, *, start_step=0, offset=0.0):
    writer = MetricWriter(workdir, start_step=start_step)
    for step in steps:
        writer.write_scalars(step, {"loss": step + offset})
    writer.close()


def events_of(workdir):
    return EventAccumulator(str(workdir), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def without_time(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_resumed_metrics_equal_uninterrupted_metrics(tmp_path):
    write_steps(tmp_path / "whole", range(0, 10))
    write_steps(tmp_path / "resumed", range(0, 8), offset=0.0)
    (tmp_path / "resumed" / "metrics.jsonl").open("a").write('{"step": 8, "lo')
    write_steps(tmp_path / "resumed", range(5, 10), start_step=4)
    whole, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed"))
    assert without_time(resumed) == without_time(whole)
    assert len((tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()) == 10


def test_a_run_from_the_start_begins_its_files_anew(tmp_path):
    write_steps(tmp_path, range(0, 5))
    write_steps(tmp_path, range(0, 3))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [event.step for event in events_of(tmp_path).Scalars("loss")] == [0, 1, 2]


def test_tensorboard_forgets_what_was_written_after_the_restored_step(tmp_path):
    write_steps(tmp_path, range(1, 9), offset=100.0)
    write_steps(tmp_path, range(5, 8), start_step=4)
    events = events_of(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 101), (2, 102), (3, 103), (4, 104), (5, 5), (6, 6), (7, 7)]


def test_a_failed_rewrite_leaves_the_metrics_as_they_were(tmp_path, monkeypatch):
    write_steps(tmp_path, range(0, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="space"):
        MetricWriter(tmp_path, start_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp-*"))


def test_values_that_are_not_finite_leave_the_lines_valid_json(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": float("nan"), "grad_norm": np.float32(2.5)})
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["grad_norm"] == 2.5


def test_videos_read_back_as_animated_pictures_side_by_side(tmp_path):
    clips = np.zeros((3, 5, 8, 16, 3), np.uint8)
    clips[1, :, :, :, 0] = 255
    clips[2, 4] = 255
    writer = MetricWriter(tmp_path)
    writer.write_videos(7, {"samples": clips}, fps=10)
    writer.close()
    event = events_of(tmp_path).Images("samples")[0]
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.step, picture.size, picture.n_frames, picture.info["duration"]) == (7, (48, 8), 2, 400)
    assert np.asarray(picture.convert("RGB"))[0, [0, 16, 32]].tolist() == [[0, 0, 0], [255, 0, 0], [0, 0, 0]]
    picture.seek(1)
    assert np.asarray(picture.convert("RGB"))[0, 32].tolist() == [255, 255, 255]


def test_videos_of_another_type_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        MetricWriter(tmp_path).write_videos(0, {"samples": np.zeros((1, 2, 8, 8, 3), np.float32)})


def test_texts_and_hyperparameters_read_back(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_texts(0, {"parameters": "| a | b |"})
    writer.write_hparams({"batch": 64, "sizes": (1, 2), "name": "t2v", "ema": True})
    writer.flush()
    accumulator = events_of(tmp_path)
    assert accumulator.Tensors("parameters")[0].tensor_proto.string_val == [b"| a | b |"]
    assert "_hparams_/session_start_info" in accumulator.summary_metadata


def test_throughput_counts_since_the_last_reading_and_mfu_is_its_share_of_the_peak():
    times = iter([0.0, 2.0, 4.0])
    throughput = Throughput(peak=4e12, clock=lambda: next(times))
    throughput.add(samples=10, model_flops=1e12)
    throughput.add(samples=10, model_flops=3e12)
    assert throughput.take() == {"time/samples_per_second": 10.0, "time/model_tflops_per_second": 2.0, "time/mfu": 0.5}
    throughput.add(samples=3)
    assert throughput.take() == {"time/samples_per_second": 1.5}


BUCKETS = [Bucket(frames=1, height=8, width=8, batch=2), Bucket(frames=5, height=8, width=8, batch=1)]


def rows_of(count):
    rng = np.random.default_rng(0)
    for n in range(count):
        values = {"loss": rng.normal(), "skipped": n, "data/mean": rng.normal(), "grad_norm/blocks": rng.normal(size=2)}
        yield n % 2, {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def test_the_log_averages_all_and_each_bucket_and_the_layers_of_a_stack_apart():
    log, rows = MetricLog(BUCKETS), list(rows_of(5))
    for row in rows:
        log.add(*row)
    said = log.take()
    mean = lambda name, of=(0, 1): np.mean([values[name] for bucket, values in rows if bucket in of], axis=0)  # noqa: E731
    expected = {"loss": mean("loss"), "skipped": 4.0, "data/share/1x8x8": 6 / 8, "data/share/5x8x8": 2 / 8}
    expected |= {f"grad_norm/blocks/0{n}": value for n, value in enumerate(mean("grad_norm/blocks"))}
    for n, bucket in enumerate(("1x8x8", "5x8x8")):
        expected |= {f"loss/{bucket}": mean("loss", (n,)), f"data/mean/{bucket}": mean("data/mean", (n,))}
    assert said == pytest.approx(expected, rel=1e-6)


def test_a_log_continues_another_from_what_that_wrote_as_json():
    whole, first, rows = MetricLog(BUCKETS), MetricLog(BUCKETS), list(rows_of(5))
    for row in rows:
        whole.add(*row)
    for row in rows[:2]:
        first.add(*row)
    second = MetricLog(BUCKETS, [tuple(row) for row in json.loads(json.dumps(first.untaken()))])
    for row in rows[2:]:
        second.add(*row)
    assert second.take() == whole.take()


def test_memory_is_that_of_the_fullest_device_and_of_the_host(monkeypatch):
    said = memory()
    assert said.keys() == {"memory/host_gib", "memory/host_peak_gib"}
    device = lambda now, most: SimpleNamespace(memory_stats=lambda: {"bytes_in_use": now << 30, "peak_bytes_in_use": most << 30})  # noqa: E731
    monkeypatch.setattr("jax.local_devices", lambda: [device(1, 5), device(3, 4)])
    said = memory()
    assert (said["memory/device_gib"], said["memory/device_peak_gib"]) == (3.0, 5.0)


def test_what_the_machine_says_is_left_out_of_what_runs_have_alike():
    assert repeatable({"step": 3, "seconds": 1.0, "time/mfu": 0.5, "memory/host_gib": 2.0, "loss": 1.0}) == {"step": 3, "loss": 1.0}


def test_log_lines_carry_units():
    line = format_line(1200, {"loss": np.float32(0.14321), "psnr_db": 28.309, "learning_rate": 1e-4, "time/samples_per_second": 12.41})
    assert line == "step 1200  loss 0.1432  psnr 28.31 dB  learning_rate 0.0001  12.41 samples/s"
    assert format_line(1, {"time/mfu": 0.456}) == "step 1  MFU 46 %"


def test_progress_starts_where_the_run_resumed():
    with progress(100, 40) as bar:
        assert (bar.n, bar.total) == (40, 100)


def test_environment_is_json_and_names_the_devices():
    said = json.loads(json.dumps(environment()))
    assert said["devices"]
    assert said["packages"]["jax"]
