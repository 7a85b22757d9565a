"""Laws of watching: what is seen of a run while it trains changes none of its bits, and is what it says it is."""

import json
import signal

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hunyuan_jax import stops
from hunyuan_jax import train as training
from hunyuan_jax.data import loader
from hunyuan_jax.errors import UserError
from hunyuan_jax.held_out import LABEL_HEIGHT, below_each_other
from hunyuan_jax.metrics import read_metrics
from hunyuan_jax.train import LoopConfig, train
from hunyuan_jax.video_io import read_video
from tests.tiny_trainings import Left, Linear, tiny_config, write_clips

LAST = 12
LOOP = {"steps": LAST, "log_every": 3, "checkpoint_every": 4, "measure_every": 0, "preview_every": 6, "preview_samples": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder / "clips")
    return folder


@pytest.fixture
def run(data, monkeypatch):
    """Trains the linear task in a folder, with spikes skipped."""

    def train_in(workdir, *, skip_above: float = 3.0, **loop):
        config = tiny_config("linear", data, **{**LOOP, **loop})
        config.optimizer.skip_above, config.optimizer.skip_window = skip_above, 2
        train(config, workdir)

    monkeypatch.setattr(training, "make_task", Linear.from_config)
    return train_in


def test_a_run_that_is_profiled_stopped_and_resumed_equals_one_left_alone(run, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    read, reads = loader.Loader.__next__, iter(range(100))

    def interrupted(self):
        if next(reads) == 7:
            signal.raise_signal(signal.SIGUSR1)
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(loader.Loader, "__next__", interrupted)
        patch.setattr(stops.Agreement, "reached", lambda self: self._stop.done == 5)
        before = signal.getsignal(signal.SIGUSR1)
        how = {"profile_steps": (4, 6), "profile_signal_steps": 2}
        run(tmp_path / "watched", **how)
        stopped = json.loads((tmp_path / "watched" / "checkpoints" / "5" / "data" / "metadata").read_text())["ledger"]
        run(tmp_path / "watched", **how)
        assert signal.getsignal(signal.SIGUSR1) is before
    whole, watched = (Left.by(tmp_path / name, LAST) for name in ("whole", "watched"))
    assert watched.logged == whole.logged
    assert watched.position == whole.position
    assert watched.differing_bits(whole) == 0
    assert "spikes['norms']" in watched.arrays
    profiles = tmp_path / "watched" / "profile"
    # The range, its rest after the stop, and the steps after the signal.
    assert sorted(path.name for path in profiles.iterdir()) == ["step_00000004", "step_00000006", "step_00000008"]
    assert all(len(list(path.rglob("*.xplane.pb"))) == 1 for path in profiles.iterdir())
    last = read_metrics(tmp_path / "watched" / "metrics.jsonl")[-1]
    assert 0 < last["time/goodput"] < 1
    for phase, seconds in stopped["seconds"].items():
        assert last[f"time/{phase}_seconds"] >= seconds * (1 - 1e-6)
    assert last["time/away_seconds"] > 0


def test_a_line_of_the_log_says_how_fast_how_full_and_what_of(run, tmp_path):
    run(tmp_path, steps=3, preview_every=0)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    rates = [line[f"time/{name}_per_second"] for name in ("samples", "frames", "model_tflops")]
    assert rates[1] == pytest.approx(3 * rates[0])
    forward = 2 * 2 * 3 * 3 * 3 * 16 * 16  # two products with 3 x 3 of each pixel of 3 frames
    assert rates[2] == pytest.approx(3 * forward * rates[0] / 1e12)
    assert "time/mfu" not in line  # of a CPU no peak is known
    assert line["memory/host_peak_gib"] >= line["memory/host_gib"] > 0.05
    assert line["data/share/3x16x16"] == 1.0
    assert -0.2 < line["data/mean/3x16x16"] < 0.2
    assert 0.4 < line["data/std/3x16x16"] < 0.7  # of uniform noise in [-1, 1] 0.58, less what the codec of the clips took
    grads = [line[f"grad_norm/{name}"] for name in ("fc1", "fc2")]
    assert np.hypot(*grads) == pytest.approx(line["grad_norm"], rel=0.1)  # each a mean over three steps
    assert {f"param_norm/{name}" for name in ("fc1", "fc2")} <= line.keys()


def test_norms_of_blocks_can_be_left_out(run, tmp_path):
    run(tmp_path, steps=1, preview_every=0, block_norms=False)
    assert not [
        name for line in read_metrics(tmp_path / "metrics.jsonl") for name in line if name.startswith(("grad_norm/", "param_norm/"))
    ]


def test_previews_show_averaged_raw_and_first_weights_and_go_on_without_the_first(run, tmp_path):
    folder = tmp_path / "previews"
    run(tmp_path, steps=6)
    with np.load(folder / "step_00000000.npz") as file:
        first = file["reconstruction"]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    names = ["held_out", "reconstruction", "reconstruction_raw", "reconstruction_step_0"]
    assert events.Tags()["images"] == names
    steps = {name: [event.step for event in events.Images(name)] for name in names}
    assert steps == {"held_out": [0, 6], "reconstruction": [0, 6], "reconstruction_raw": [6], "reconstruction_step_0": [6]}
    shown = [event.encoded_image_string for event in (events.Images("reconstruction_step_0")[-1], events.Images("reconstruction")[0])]
    assert shown[0] == shown[1]
    assert len({events.Images(name)[-1].encoded_image_string for name in names}) == 4
    assert first.shape == (2, 3, 16, 16, 3)
    heights = [read_video(folder / f"step_{step:08d}.mp4").frames.shape[1] for step in (0, 6)]
    assert heights == [rows * (16 + LABEL_HEIGHT) for rows in (2, 4)]
    (folder / "step_00000000.npz").write_bytes(b"PK no longer")
    run(tmp_path, steps=12)
    assert read_video(folder / "step_00000012.mp4").frames.shape[1] == 3 * (16 + LABEL_HEIGHT)


def test_rows_stand_below_each_other_each_under_its_name():
    videos = {name: np.full((2, 3, 8, 16, 3), value, np.uint8) for name, value in (("held_out", 10), ("generated_raw", 200))}
    frames = below_each_other(videos)
    assert frames.shape == (3, 2 * (8 + LABEL_HEIGHT), 32, 3)
    assert (frames[:, LABEL_HEIGHT : LABEL_HEIGHT + 8] == 10).all()
    assert (frames[:, -8:] == 200).all()
    labels = frames[:, :LABEL_HEIGHT], frames[:, LABEL_HEIGHT + 8 : -8]
    assert (labels[0] != labels[1]).any()


def test_a_run_may_begin_and_cease_to_skip_spikes(run, tmp_path):
    for steps, above in ((4, 0.0), (8, 0.1), (12, 0.0)):
        run(tmp_path, steps=steps, skip_above=above, preview_every=0)
        assert (tmp_path / "checkpoints" / str(steps) / "spikes").exists() == bool(above)
    skipped = [line["skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert skipped[1] == 0 < skipped[-1]


def test_steps_to_profile_that_are_none_are_refused():
    for wrong in ((5, 3), (-1, 3), (1, 2, 3)):
        with pytest.raises(UserError, match="profile_steps are the first and the last step"):
            LoopConfig(steps=1, profile_steps=wrong)
