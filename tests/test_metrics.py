"""Laws of the metric files: a resumed run leaves what an uninterrupted one leaves, and TensorBoard reads it back."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hunyuan_jax.metrics import MetricWriter, Throughput, environment, format_line, progress, read_metrics


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


def test_throughput_counts_since_the_last_reading():
    times = iter([0.0, 2.0, 4.0])
    throughput = Throughput(clock=lambda: next(times))
    throughput.add(10)
    throughput.add(10)
    assert throughput.rate() == 10.0
    throughput.add(3)
    assert throughput.rate() == 1.5


def test_log_lines_carry_units():
    line = format_line(1200, {"loss": np.float32(0.14321), "psnr_db": 28.309, "learning_rate": 1e-4, "samples_per_second": 12.41})
    assert line == "step 1200  loss 0.1432  psnr 28.31 dB  learning_rate 0.0001  12.41 samples/s"


def test_progress_starts_where_the_run_resumed():
    with progress(100, 40) as bar:
        assert (bar.n, bar.total) == (40, 100)


def test_environment_is_json_and_names_the_devices():
    said = json.loads(json.dumps(environment()))
    assert said["devices"]
    assert said["packages"]["jax"]
