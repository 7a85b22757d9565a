"""The whole path on a small world, by the commands a user types: raw video to generated video, and what survives a kill."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from data_prep.encode import EncodeConfig, bytes_of_a_clip, encode, is_done, load_vae
from hunyuan_jax import convert, evaluate, generate
from hunyuan_jax.checkpoint import load_params
from hunyuan_jax.data.dataset import open_dataset
from hunyuan_jax.errors import UserError
from hunyuan_jax.metrics import read_metrics
from hunyuan_jax.models.dit import DiT
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.sampling import SamplingConfig
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.t2v import encode_texts
from hunyuan_jax.train import train
from hunyuan_jax.video_io import read_video
from hunyuan_jax.weights import weights_of
from tests.commands import ROOT, run_module
from tests.tiny_towers import make_towers, save_towers

QUICKSTART_SIZE = (13, 64, 64)  # frames, height, width
TINY_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, convolution="planes")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """raw/, clips/, a random VAE and latents/ of a world of 48 shots."""
    run = tmp_path_factory.mktemp("run")
    run_module("data_prep.shapes_world", "--output", f"{run}/raw", "--clips", "48", "--seed", "3", "--workers", "2")
    run_module("data_prep.curate", "--input", f"{run}/raw", "--output", f"{run}/clips", "--config", "configs/curation.py", "--workers", "1")
    params = jax.jit(lambda key: VAE(TINY_VAE).init(key, np.zeros((1, 5, 16, 16, 3), np.float32)))(jax.random.key(0))["params"]
    convert.write(weights_of(TINY_VAE, params), run / "random_vae", "diffusers")
    config = ("--config=configs/quickstart.py:encode", "--config.clips_per_shard=20")
    run_module("data_prep.encode", "--clips", f"{run}/clips", "--vae", f"{run}/random_vae", "--output", f"{run}/latents", *config)
    return run


def tiny_t2v(world: Path, steps: int):
    config = quickstart.get_config("t2v")
    config.model.update({"width": 32, "num_heads": 2, "num_double_blocks": 1, "num_single_blocks": 1, "rope_axes": (4, 6, 6)})
    config.data.path = str(world / "latents")
    config.data.held_out = 0.3
    for bucket in config.data.buckets:
        bucket["batch"] = 2
    config.sampling.steps = 2
    config.train.update({"steps": steps, "log_every": 1, "checkpoint_every": 3, "measure_every": 0, "preview_every": 0})
    return config


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """An uninterrupted run of 6 steps."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train(tiny_t2v(world, 6), workdir)
    return workdir


def test_latents_hold_every_clip_in_every_bucket_it_fits(world):
    clips, latents = open_dataset(world / "clips", kind="Clip"), open_dataset(world / "latents", kind="Latent")
    names = {row["id"] for row in latents.rows}
    assert names == {f"{row['id']}/{bucket}" for row in clips.rows for bucket in ("13x64x64", "1x64x64")}
    record = latents.read([0])[0]
    assert record.mean.shape == (4, 8, 8, 16)
    assert record.texts[0].prompt == json.loads(clips.rows[0]["caption"])["short"]


def test_encoding_says_before_what_a_clip_takes(world):
    latents = open_dataset(world / "latents", kind="Latent")
    clip = latents.rows[0]["id"].split("/")[0]
    found = latents.read([n for n, row in enumerate(latents.rows) if row["id"].startswith(clip)])
    config = build(EncodeConfig, quickstart.get_config("encode"), where="encode")
    said_latents, said_texts = bytes_of_a_clip(TINY_VAE, config)
    assert said_latents == sum(x.nbytes for record in found for x in (record.mean, record.logvar))
    most = said_texts / len(found)
    for record in found:
        (text,) = record.texts
        assert text.txt.nbytes + text.pooled.nbytes == most - (8 - len(text.txt)) * text.pooled.nbytes


def test_encoding_again_does_nothing_and_a_lost_shard_comes_back_the_same(world):
    again = ("data_prep.encode", "--clips", f"{world}/clips", "--vae", f"{world}/random_vae", "--output", f"{world}/latents")
    config = ("--config=configs/quickstart.py:encode", "--config.clips_per_shard=20")
    assert "nothing to do" in run_module(*again, *config)
    index = json.loads((world / "latents" / "dataset.json").read_text())
    (world / "latents" / "dataset.json").unlink()
    (world / "latents" / index["shards"][0]["name"]).unlink()
    run_module(*again, *config)
    assert json.loads((world / "latents" / "dataset.json").read_text()) == index


def test_several_workers_write_the_dataset_that_one_writes(world, tmp_path):
    command = ("data_prep.encode", "--clips", f"{world}/clips", "--vae", f"{world}/random_vae", "--output", f"{tmp_path}/latents")
    command += ("--config=configs/quickstart.py:encode", "--config.clips_per_shard=20", "--workers=2")
    waiting = subprocess.Popen([sys.executable, "-m", *command, "--worker=1"], cwd=ROOT)  # for the first worker's codec
    try:
        run_module(*command, "--worker=0")
        assert waiting.wait(timeout=300) == 0
    finally:
        waiting.kill()
    there, here = ((folder / "latents" / "dataset.json").read_text() for folder in (world, tmp_path))
    assert here == there
    assert "is none of 2 workers" in run_module(*command, "--worker=2", expect=2)


def test_resumed_run_equals_uninterrupted_run(world, trained, tmp_path):
    train(tiny_t2v(world, 3), tmp_path)
    train(tiny_t2v(world, 6), tmp_path)
    model = generate.load_model(trained)
    abstract = jax.eval_shape(lambda: model.task.init(jax.random.key(0)))
    for weights in ("ema", "raw"):
        (whole, at), (resumed, also_at) = (load_params(folder, abstract, weights=weights) for folder in (trained, tmp_path))
        assert at == also_at == 6
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    losses = [[(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")] for folder in (trained, tmp_path)]
    assert losses[0] == losses[1]


def test_one_euler_step_of_a_model_of_the_data_lands_on_its_prediction(trained):
    model = generate.load_model(trained)
    assert model.task.prediction == "data"
    text = encode_texts(model.task.codec, ["a red circle moving left"], length=9)
    noise = generate.noise_for([0], model.task.codec.vae.latent_shape(*QUICKSTART_SIZE), seed=0)
    sampling = SamplingConfig(steps=1, shift=1.0)
    out = DiT(model.task.model).apply({"params": model.params}, noise, np.ones(1, np.float32), text.txt, text.mask, text.pooled)
    frames = model.task.sample(model.params, text, noise, sampling=sampling)
    np.testing.assert_allclose(frames, model.task.codec.decode(out), rtol=1e-3, atol=1e-3)


def test_a_model_that_is_told_its_scale_is_not_guided_a_second_time(world, tmp_path):
    config = tiny_t2v(world, 1)
    config.model.guidance_embed, config.sampling.cfg_scale = True, 2.0
    with pytest.raises(UserError, match=r"set sampling\.cfg_scale to 1"):
        train(config, tmp_path)


def test_a_prediction_of_anything_else_is_refused(world, tmp_path):
    config = tiny_t2v(world, 1)
    config.prediction = "noise"
    with pytest.raises(UserError, match="velocity, data, not 'noise'"):
        train(config, tmp_path / "run")


def test_generated_videos_do_not_depend_on_the_batch_and_can_be_scored(world, trained, tmp_path):
    model = generate.load_model(trained)
    prompts = ["a red circle moving left", "", "ein blaues Quadrat \N{SNOWMAN}"]
    one_by_one, at_once = (
        list(generate.generate(model, prompts, sampling=model.task.sampling, seed=1, batch=batch, size=QUICKSTART_SIZE)) for batch in (1, 3)
    )
    for alone, together in zip(one_by_one, at_once, strict=True):
        assert alone.shape == (*QUICKSTART_SIZE, 3)
        assert np.abs(alone.astype(int) - together).max() <= 1
    lines = (world / "raw" / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[: len(prompts)]))  # as many as above: the same program
    run_module(
        "hunyuan_jax.generate", "--checkpoint", str(trained), "--prompts", f"{tmp_path}/prompts.jsonl", "--output", f"{tmp_path}/videos"
    )
    index = json.loads((tmp_path / "videos" / "index.json").read_text())
    assert read_video(tmp_path / "videos" / index[0]["file"]).frames.shape == (13, 64, 64, 3)
    arguments = ("--checkpoint", str(trained), "--latents", f"{world}/latents", "--clips", f"{world}/clips", "--held_out", "0.3")
    run_module("hunyuan_jax.evaluate", *arguments, "--videos", f"{tmp_path}/videos", "--output", f"{tmp_path}/evaluation.json")
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(figures["flow_loss_by_time"]) == len(evaluate.TIMES)
    assert len(figures["videos"]) == len(index)
    assert set(figures["accuracy"]["all"]) == {"colour", "shape", "direction"}


def test_videos_are_decoded_within_the_memory_that_is_asked_for_or_not_at_all(trained, tmp_path):
    command = ("hunyuan_jax.generate", "--checkpoint", str(trained), "--prompt", "a red circle", "--output", str(tmp_path))
    assert "the smallest tile needs" in run_module(*command, "--vae_memory_gib=0.0001", expect=2)
    said = run_module(*command, "--vae_memory_gib=0.02")
    assert re.search(r"decoding in tiles of \d+ frames, \d+ x \d+", said)
    (video,) = tmp_path.glob("*.mp4")
    assert read_video(video).frames.shape == (*QUICKSTART_SIZE, 3)


def test_accuracy_counts_each_reading_by_itself_and_groups_apart():
    def row(colour, shape, *, seen):
        expected = {"colour": "red", "shape": "circle", "direction": "up"}
        return {"seen": seen, "expected": expected, "read": {"colour": colour, "shape": shape, "direction": "up"}}

    table = evaluate.accuracy_table([row("red", "cross", seen=True), row("blue", "circle", seen=False)])
    assert table["all"] == {"colour": 0.5, "shape": 0.5, "direction": 1.0}
    assert table["seen"] == {"colour": 1.0, "shape": 0.0, "direction": 1.0}
    assert table["unseen"] == {"colour": 0.0, "shape": 1.0, "direction": 1.0}


def test_a_run_of_another_model_is_refused_and_left_alone(world, trained):
    before = (trained / "model.json").read_bytes()
    config = tiny_t2v(world, 8)
    config.model.num_single_blocks = 2
    with pytest.raises(UserError, match="another model: its model differs"):
        train(config, trained)
    assert (trained / "model.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--config=configs/quickstart.py:t2v", "--config.train.stps=3"), 'Did you mean "steps"'),
        (("--config=configs/quickstart.py:nonsense",), "nonsense"),
        (("--config=configs/missing.py",), "missing.py"),
        (("--config=configs/quickstart.py:t2v", "--config.data.path=/nowhere"), "/nowhere"),
        (("--config=configs/quickstart.py:t2v",), "data.path"),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_line_and_exit_code_2(arguments, says, tmp_path):
    said = run_module("hunyuan_jax.train", *arguments, "--workdir", f"{tmp_path}/run", expect=2)
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_ends_in_one_line_and_nothing_is_taken_for_whole(world, tmp_path):
    """In a name space of its own, on a file system of a few hundred KiB."""
    place = tmp_path / "small"
    place.mkdir()
    inside = 'mount -t tmpfs -o size="$2" tmpfs "$1" && shift 2 && "$@"'

    def on_small_disk(size: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        call = ["unshare", "-rm", "bash", "-c", inside, "bash", str(place), size, *arguments]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)

    if not shutil.which("unshare") or on_small_disk("1m", "true").returncode:
        pytest.skip("This system lets no user mount a small file system (unshare -rm), so a full disk cannot be made.")
    raw = ("data_prep.shapes_world", "--output", f"{place}/raw", "--clips", "400", "--workers", "1")
    latents = ("data_prep.encode", "--clips", f"{world}/clips", "--vae", f"{world}/random_vae", "--output", f"{place}/latents")
    latents += ("--config=configs/quickstart.py:encode",)
    training = ("hunyuan_jax.train", "--config=configs/quickstart.py:t2v", "--workdir", f"{place}/t2v", "--config.train.steps=2")
    training += ("--config.model.width=32", "--config.model.num_heads=1", "--config.model.num_double_blocks=1")
    training += ("--config.model.num_single_blocks=1", f"--config.data.path={world}/latents")
    training += ("--config.train.measure_every=0", "--config.train.preview_every=0")
    cases = ((raw, "1m", "raw/world.json"), (latents, "300k", "latents/dataset.json"), (training, "600k", "t2v/checkpoints/2"))
    for arguments, size, whole in cases:
        check = f'"$@"; code=$?; test ! -e {place}/{whole} || echo WHOLE; exit $code'
        done = on_small_disk(size, "bash", "-c", check, "bash", sys.executable, "-m", *arguments)
        said = done.stdout + done.stderr
        assert done.returncode == 2, said[-2000:]
        assert "error: The disk is full" in said
        assert "Traceback" not in said
        assert "WHOLE" not in said


def test_a_model_of_encoders_with_weights_is_trained_without_them_or_with_them_to_the_same_bits_and_finds_them_to_generate(world, tmp_path):
    save_towers(make_towers(), tmp_path / "models")
    section = quickstart.get_config("encode")
    places = {name: str(tmp_path / "models" / name) for name in ("language", "clip")}
    text = {**places, "template": "A video is described here: {} <end>", "max_tokens": 12, "dtype": "float32"}
    section.text, section.measure_text = ConfigDict(text), False
    config = build(EncodeConfig, section, where="encode")
    clips, vae = open_dataset(world / "clips", kind="Clip"), load_vae(world / "random_vae")
    encode(clips, vae, tmp_path / "latents", config=config)
    assert is_done(tmp_path / "latents", clips.folder, vae, config)

    bare = dataclasses.replace(config, store_text=False)
    encode(clips, vae, tmp_path / "bare", config=bare)
    assert bytes_of_a_clip(TINY_VAE, bare)[1] == 0
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    index = json.loads((tmp_path / "latents" / "dataset.json").read_text())
    (tmp_path / "latents" / "dataset.json").unlink()
    (tmp_path / "latents" / index["shards"][0]["name"]).unlink()
    elsewhere = {name: str(tmp_path / "elsewhere" / name) for name in places}
    encode(clips, vae, tmp_path / "latents", config=dataclasses.replace(config, text={**text, **elsewhere}))
    assert json.loads((tmp_path / "latents" / "dataset.json").read_text()) == index

    training = tiny_t2v(world, 2)
    training.data.update({"path": str(tmp_path / "latents"), "text_length": 12})
    training.model.update({"text_dim": 32, "pooled_dim": 24})
    train(training, tmp_path / "run")

    online = training.copy_and_resolve_references()
    online.data.path = str(tmp_path / "bare")
    with pytest.raises(UserError, match=f"language is missing: {tmp_path}/models/language"):
        train(online, tmp_path / "online")
    online.text = elsewhere
    train(online, tmp_path / "online")
    model = generate.load_model(tmp_path / "run")
    abstract = jax.eval_shape(lambda: model.task.init(jax.random.key(0)))
    cached, encoded = (load_params(tmp_path / run, abstract)[0] for run in ("run", "online"))
    for one, other in zip(jax.tree.leaves(cached), jax.tree.leaves(encoded), strict=True):
        np.testing.assert_array_equal(one, other)

    generation = ("hunyuan_jax.generate", "--checkpoint", f"{tmp_path}/run", "--prompt", "a red circle", "--output", f"{tmp_path}/made")
    generation += (f"--text_cache={tmp_path}/cache",)
    assert f"language is missing: {tmp_path}/models/language" in run_module(*generation, expect=2)
    run_module(*generation, f"--language={tmp_path}/elsewhere/language", f"--clip={tmp_path}/elsewhere/clip")
    (video,) = (tmp_path / "made").glob("*.mp4")
    made = video.read_bytes()
    assert read_video(video).frames.shape == (*QUICKSTART_SIZE, 3)
    video.unlink()
    run_module(*generation)  # the prompt's states were kept
    assert video.read_bytes() == made


def test_prompt_files_with_strange_bytes_are_refused_by_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for content, says in (
        (b"\xff\xfe", "UTF-8"),
        (b"{}", "line 1"),
        (b'{"prompt": 3}', "line 1"),
        (b'{"caption": {"short": 3}}', "line 1: Caption field 'short' must be text"),
        (b'{"caption": {"shot": "a"}}', "line 1: .*short"),
        (b"[" * 100_000, "line 1"),
        (b"", "0 prompts"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            generate.read_prompts(file)
    file.write_text('{"prompt": "a\\u0000 red\\ncircle", "seen": true}\n')
    assert generate.read_prompts(file) == [{"prompt": "a red circle", "seen": True}]
    caption = {"short": "a dog", "dense": "a dog runs", "lighting": "evening sun"}
    file.write_text(json.dumps({"caption": caption}))
    assert generate.read_prompts(file) == [{"prompt": "a dog runs, evening sun", "caption": caption}]


def test_a_killed_training_run_continues_to_the_same_parameters(world, trained, tmp_path):
    """SIGKILL somewhere after the first checkpoint; what is there then continues to the uninterrupted run's bits."""
    config = tiny_t2v(world, 6)
    script = (
        "import sys; from pathlib import Path; from tests.test_path import tiny_t2v; from hunyuan_jax.train import train;"
        f"train(tiny_t2v(Path({str(world)!r}), 6), Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path / "checkpoints" / "3").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train(config, tmp_path)
    model = generate.load_model(trained)
    abstract = jax.eval_shape(lambda: model.task.init(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, load_params(trained, abstract)[0], load_params(tmp_path, abstract)[0])
