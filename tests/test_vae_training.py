"""Laws of training the VAE: each network moves by its own loss alone, the critic waits its turn, and a run with one resumes exactly."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from scipy.ndimage import gaussian_filter

from configs import vae as recipe
from data_prep.encode import load_vae
from hunyuan_jax import convert, report
from hunyuan_jax.checkpoint import load_params
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.loader import DataConfig
from hunyuan_jax.errors import UserError
from hunyuan_jax.export import export
from hunyuan_jax.metrics import read_metrics, repeatable
from hunyuan_jax.models import critics
from hunyuan_jax.models.critics import DiscriminatorConfig
from hunyuan_jax.models.vae import VAE, VAEConfig, abstract_params
from hunyuan_jax.models.vae_tiling import Tiling
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import AXES, MeshConfig
from hunyuan_jax.parallel.sharding import path_of
from hunyuan_jax.settings import build
from hunyuan_jax.state import state_shardings
from hunyuan_jax.tasks import VAETask
from hunyuan_jax.tasks.critic import CriticConfig
from hunyuan_jax.tasks.task import normal_like, sample_keys
from hunyuan_jax.tasks.vae import VAELossConfig, psnr_db, sharpness, ssim
from hunyuan_jax.train import LoopConfig, train
from hunyuan_jax.train_step import EmaConfig, average, init_critic_state, init_state, make_step
from tests.tiny_trainings import write_clips

MODEL = VAEConfig(
    block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, latent_channels=2, spatial_compression=1, temporal_compression=1,
)  # fmt: skip
SMALL = DiscriminatorConfig(widths=(2, 4), time_halvings=1, power_steps=1)
CRITIC = CriticConfig(
    model=SMALL, optimizer=OptimizerConfig(learning_rate=1e-2), weight=0.5, start_step=2, lead_steps=1, adaptive_limit=1e6
)


class Linear(VAETask):
    """The task with a linear model in the VAE's place, which compiles in a moment; its losses and its critic are the real ones."""

    def init(self, key):
        encoder, decoder = 0.5 * jax.random.normal(key, (2, 3, 3))
        return {"encoder": encoder, "decoder": {"conv_out": {"kernel": decoder}}}

    def draw(self, params, batch, key):
        latents = batch.frames @ params["encoder"] + 0.1 * normal_like(sample_keys(key, batch), batch.frames)
        return latents @ params["decoder"]["conv_out"]["kernel"], jnp.mean(jnp.square(latents))

    def reconstruct(self, params, frames, *, tiled=False):
        return frames @ params["encoder"] @ params["decoder"]["conv_out"]["kernel"]


TASK = Linear(MODEL, VAELossConfig(kl_weight=1e-2), critic=CRITIC)
VAE_TASK = VAETask(MODEL, TASK.loss_config)
KEY = jax.random.key(7)
FAST = {"xla_backend_optimization_level": 0}  # to compile, not to run
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3))


def equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def batch() -> VideoBatch:
    frames = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32)
    return VideoBatch(sample_id=jnp.arange(2, dtype=jnp.uint32), frames=jnp.asarray(frames))


@pytest.fixture(scope="module")
def params():
    return TASK.init(jax.random.key(0))


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_step(TASK, OPTIMIZER, ema=EmaConfig(), key=KEY), compiler_options=FAST)


@pytest.fixture(scope="module")
def states(params, batch, step):
    """The states before each of 5 steps and after the last, and what each step said; for two critics."""

    begin = jax.jit(lambda key: init_state(params, OPTIMIZER, init_critic_state(TASK, key)))

    def run(seed):
        states, said = [begin(jax.random.key(seed))], []
        for _ in range(5):
            state, metrics = step(states[-1], batch)
            states.append(state)
            said.append(jax.device_get(metrics))
        return states, said

    return run(0), run(1)


def test_before_its_start_nothing_of_the_critic_moves_and_none_of_it_moves_the_model(states):
    (one, said), (other, _) = states
    assert not equal(one[0].critic.params, other[0].critic.params)
    for step in range(4):  # the critic learns from step 2 on, and joins the loss of the model in step 3
        assert equal(one[step].params, other[step].params)
        assert equal(one[step].critic, one[0].critic) == (step < 3)
    assert not equal(one[4].params, other[4].params)
    assert [metrics["d_loss"] > 0 for metrics in said] == [False, False, True, True, True]
    assert [metrics["adaptive_weight"] > 0 for metrics in said] == [False, False, False, True, True]
    counts = [int(state.critic.opt_state[1][0].count) for state in one]
    assert counts == [0, 0, 0, 1, 2, 3]
    assert int(one[-1].skipped) == 0


def test_until_the_critic_joins_the_model_learns_as_without_one(states, params, batch):
    plain = jax.jit(make_step(dataclasses.replace(TASK, critic=None), OPTIMIZER, ema=EmaConfig(), key=KEY))
    state = init_state(params, OPTIMIZER)
    for _ in range(3):
        state, metrics = plain(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, states[0][0][3].params)
    assert metrics.keys() < states[0][1][2].keys()
    assert metrics["loss"] == pytest.approx(states[0][1][2]["loss"], rel=1e-4)


def test_a_step_without_a_critic_is_bit_for_bit_the_plain_recipe(batch):
    """L1 and KL, the optimizer and the average, written out."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(MODEL)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)

    def loss(params):
        posterior = VAE(MODEL).apply({"params": params}, batch.frames, method="encode")
        latents = posterior.sample(normal_like(sample_keys(KEY, batch), posterior.mean))
        frames = VAE(MODEL).apply({"params": params}, latents, method="decode")
        kl = jnp.mean(posterior.kl()) / posterior.mean[0].size
        l1 = jnp.mean(jnp.abs(frames - batch.frames))
        return l1 + 1e-2 * kl, {"l1": l1, "kl": kl, "psnr_db": jnp.mean(psnr_db(frames, batch.frames))}

    @functools.partial(jax.jit, compiler_options=FAST)
    def expected(params, averaged, opt_state):
        (value, said), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        after = optax.apply_updates(params, updates)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(value)
        new, old = (after, average(averaged, after, step=jnp.array(0), decay=0.999), opt_state), (params, averaged, opt_state)
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old), {"loss": value, "grad_norm": norm, **said}

    state = init_state(params, OPTIMIZER)
    step = jax.jit(make_step(VAE_TASK, OPTIMIZER, ema=EmaConfig(), key=KEY), compiler_options=FAST)
    after, metrics = step(state, batch)
    whole, said = expected(params, state.ema, state.opt_state)
    assert equal((after.params, after.ema, after.opt_state), whole)
    of_the_recipe = {name: float(value) for name, value in metrics.items() if name != "skipped" and not name.startswith("data/")}
    assert of_the_recipe == {k: float(v) for k, v in said.items()}


def test_each_network_has_the_gradient_of_its_own_loss_alone(states, params, batch):
    critic = states[0][0][0].critic.params
    found = jax.jit(lambda p, c: TASK.gradients(p, c, batch, key=KEY, step=jnp.array(3)))(params, critic)

    def parts(params, critic):
        drawn, kl = TASK.drawn(params, batch, KEY)
        return TASK.fidelity(drawn, batch, KEY)[0], critics.hinge_loss_of_generator(CRITIC.logits(critic, drawn.frames)), kl

    def critic_loss(critic):
        made, _ = TASK.draw(params, batch, KEY)
        return critics.hinge_loss_of_discriminator(CRITIC.logits(critic, batch.frames), CRITIC.logits(critic, made))

    def weighed(rows):
        return jax.tree.map(lambda a, b, c: a[0] + 0.5 * adaptive * b[1] + 1e-2 * c[2], rows, rows, rows)

    rows = jax.jit(jax.jacrev(lambda p: jnp.stack(parts(p, critic))))(params)
    last = jax.tree.leaves(rows["decoder"]["conv_out"])
    norms = [np.sqrt(sum(float(jnp.sum(jnp.square(leaf[term]))) for leaf in last)) for term in (0, 1)]
    adaptive = norms[0] / (norms[1] + 1e-4)
    assert found.metrics["adaptive_weight"] == pytest.approx(adaptive, rel=1e-4)
    scale = float(optax.tree.norm(found.model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), found.model, weighed(rows))
    value, slope = jax.jit(jax.value_and_grad(critic_loss))(critic)
    assert found.critic_loss == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found.critic, slope)
    l1, adversarial, kl = (float(x) for x in parts(params, critic))
    assert found.loss == pytest.approx(l1 + 0.5 * adaptive * adversarial + 1e-2 * kl, rel=1e-4)


def test_a_critic_that_is_not_finite_moves_neither_network(states, batch, step):
    state = states[0][0][4]
    broken = jax.tree.map(lambda x: x * jnp.nan, state.critic.params)
    after, _ = step(state.replace(critic=state.critic.replace(params=broken)), batch)
    assert equal(
        (after.params, after.ema, after.opt_state, after.critic.opt_state),
        (state.params, state.ema, state.opt_state, state.critic.opt_state),
    )
    assert (int(after.step), int(after.skipped)) == (5, 1)


def test_lpips_enters_the_loss_with_its_weight_and_is_measured(params, batch, monkeypatch):
    monkeypatch.setattr(critics, "VGG_STAGES", tuple(tuple((3, 4) for _ in stage) for stage in critics.VGG_STAGES))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: np.abs(0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), critics.lpips_shapes())
    task = dataclasses.replace(TASK, lpips=weights, critic=None, loss_config=VAELossConfig(lpips_weight=0.7))
    loss, said = jax.jit(lambda p: task.loss(p, batch, key=KEY))(params)
    frames, _ = jax.jit(lambda p: task.draw(p, batch, KEY))(params)
    assert said["lpips"] == pytest.approx(float(jnp.mean(critics.lpips_of_clips(weights, frames, batch.frames))), rel=1e-4)
    assert loss == pytest.approx(float(said["l1"] + 0.7 * said["lpips"] + 1e-6 * said["kl"]), rel=1e-5)
    measured = jax.jit(lambda p: task.measure(p, batch, key=KEY))(params)
    assert {name: value.shape for name, value in measured.items()} == dict.fromkeys(("psnr_db", "ssim", "sharpness", "lpips"), (2,))


def test_ssim_is_that_of_the_usual_formula():
    """As scikit-image computes it with Gaussian weights: windows of 11 x 11, borders left out."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, 3, 20, 24, 3))
    b = np.clip(a + 0.3 * rng.standard_normal(a.shape), -1, 1)
    expected = []
    for one, other in zip(a, b, strict=True):
        rows = []
        for x, y in zip(np.moveaxis(one, -1, 1).reshape(-1, 20, 24), np.moveaxis(other, -1, 1).reshape(-1, 20, 24), strict=True):
            smooth = lambda z: gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]  # noqa: E731
            mx, my, c1, c2 = smooth(x), smooth(y), 0.02**2, 0.06**2
            vx, vy, both = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
            rows.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        expected.append(np.mean(rows))
    np.testing.assert_allclose(ssim(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), expected, rtol=1e-4)
    np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(a)), 1.0, atol=1e-5)


def test_a_critic_lies_on_the_mesh_by_the_table_and_its_optimizer_beside_it():
    wide = dataclasses.replace(TASK, critic=dataclasses.replace(CRITIC, model=DiscriminatorConfig()))
    state = jax.eval_shape(lambda: init_state(VAE_TASK.init(KEY), OPTIMIZER, init_critic_state(wide, KEY)))
    places = state_shardings(state, AbstractMesh((1, 4, 1, 1), AXES))
    assert jax.tree.structure(places) == jax.tree.structure(state)
    for part in (places.critic.params, places.critic.opt_state[1][0].mu):
        split = {path_of(path): tuple(place.spec) for path, place in jax.tree_util.tree_leaves_with_path(part)}
        assert split["level_2/patch/kernel"] == (None, None, None, None, "fsdp")
        assert split["logits/patch/kernel"] == (None,) * 5


@pytest.mark.parametrize("wrong", [{"start_step": -1}, {"lead": 3}, {"model": {"width": 3}}, {"optimizer": {}}])
def test_a_critic_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError, match="critic"):
        CriticConfig.from_section(ConfigDict({"optimizer": {"learning_rate": 1e-3}} | wrong))


def test_sharpness_is_one_for_equals_lower_for_blurred_and_higher_for_noisy_copies():
    rng = np.random.default_rng(0)
    clips = np.clip(gaussian_filter(rng.uniform(-9, 9, (2, 3, 20, 24, 3)), (0, 0, 1, 1, 0)), -1, 1)
    noisy = np.clip(clips + 0.5 * rng.standard_normal(clips.shape), -1, 1)
    np.testing.assert_allclose(sharpness(jnp.asarray(clips), jnp.asarray(clips)), 1.0, rtol=1e-6)
    assert np.all(sharpness(jnp.asarray(gaussian_filter(clips, (0, 0, 1, 1, 0))), jnp.asarray(clips)) < 0.7)
    assert np.all(sharpness(jnp.asarray(noisy), jnp.asarray(clips)) > 1.3)
    ramp = np.broadcast_to(np.linspace(-1, 1, 24)[:, None], clips.shape)  # has no detail, and no more of it where it is steep
    bent = ramp + 0.1 * np.eye(24)[12][:, None]
    inner = np.array([0.1, -0.2, 0.1])  # what the Laplacian makes of a line that is 0.1 brighter
    expected = np.sum(inner**2) / np.sum((2 * inner) ** 2)
    np.testing.assert_allclose(sharpness(jnp.asarray(bent), jnp.asarray(2 * bent - ramp)), expected, rtol=1e-3)


def test_a_tiled_batch_goes_through_tiles_and_its_seams_are_measured(batch):
    """Seams are what tiles of a clip differ by from the whole, in grey levels; one tile that holds the whole clip has none."""
    params = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(KEY, leaf.shape), abstract_params(MODEL))
    tiled = batch.replace(tiled=True)
    clip_in_one = dataclasses.replace(VAE_TASK, tiling=Tiling(tile=(3, 16, 16), overlap=(1, 1, 1)))
    cut = dataclasses.replace(VAE_TASK, tiling=Tiling(tile=(3, 16, 8), overlap=(0, 0, 0)))

    def run(task, batch):
        calls = jax.jit(lambda p: (task.measure(p, batch, key=KEY), task.draw(p, batch, KEY)[0]), compiler_options=FAST)
        return calls(params)

    (whole, drawn), (of_one, drawn_in_one), (of_tiles, drawn_in_tiles) = run(VAE_TASK, batch), run(clip_in_one, tiled), run(cut, tiled)
    np.testing.assert_allclose(drawn_in_one, drawn, atol=1e-4)
    assert np.abs(drawn_in_tiles - drawn).mean() > 1e-2
    assert "seam_error" not in whole
    np.testing.assert_allclose(of_one["seam_error"], 0, atol=1e-2)
    halves = np.split(np.asarray(batch.frames), 2, axis=3)
    code = jax.jit(lambda x: VAE_TASK.reconstruct(params, x), compiler_options=FAST)
    seams = np.clip(np.concatenate([code(half) for half in halves], axis=3), -1, 1) - np.clip(code(batch.frames), -1, 1)
    np.testing.assert_allclose(of_tiles["seam_error"], 127.5 * np.abs(seams).mean(axis=(1, 2, 3, 4)), rtol=1e-3)


def test_a_weight_of_seams_draws_tiles_and_the_whole_clip_together(batch):
    """By L1, with the same noise, and the gradients of both; other batches, and a weight of nothing, know nothing of it."""
    params = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(KEY, leaf.shape), abstract_params(MODEL))
    plain = dataclasses.replace(VAE_TASK, tiling=Tiling(tile=(3, 16, 8), overlap=(0, 0, 0)))
    drawn = dataclasses.replace(plain, loss_config=dataclasses.replace(plain.loss_config, seam_weight=3.0))
    tiled = batch.replace(tiled=True)

    def learnt(task, batch):
        return jax.jit(jax.value_and_grad(lambda p: task.loss(p, batch, key=KEY), has_aux=True), compiler_options=FAST)(params)

    ((loss, terms), grads), ((loss_without, without), grads_without) = learnt(drawn, tiled), learnt(plain, tiled)
    distance = lambda p: jnp.mean(jnp.abs(plain.draw(p, tiled, KEY)[0] - plain.draw(p, batch, KEY)[0]))  # noqa: E731
    seam, slope = jax.jit(jax.value_and_grad(distance), compiler_options=FAST)(params)
    assert seam > 1e-2
    assert terms["seam"] == pytest.approx(float(seam), rel=1e-4)
    assert loss == pytest.approx(float(loss_without + 3 * seam), rel=1e-4)
    scale = float(optax.tree.norm(grads))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + 3 * c, rtol=1e-3, atol=1e-4 * scale), grads, grads_without, slope)
    assert "seam" not in without
    assert equal(learnt(drawn, batch), learnt(plain, batch))
    judged = dataclasses.replace(drawn, critic=CRITIC)
    critic = judged.init_critic(KEY)
    found = jax.jit(lambda p: judged.gradients(p, critic, tiled, key=KEY, step=jnp.array(0)), compiler_options=FAST)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale), found.model, grads)


def test_tiles_that_cannot_be_are_refused_before_anything_is_compiled():
    config = recipe.get_config("shapes_tiling")
    config.tiling.tile = (8, 30, 32)
    with pytest.raises(UserError, match="multiples of"):
        VAETask.from_config(config, None)
    config.tiling = None
    with pytest.raises(UserError, match="no section tiling"):
        VAETask.from_config(config, None)


@pytest.mark.parametrize("part", [*recipe.STAGES, *recipe.SMALL])
def test_every_part_of_the_recipe_can_be_built_and_mixes_images_and_video(part):
    config = recipe.get_config(part)
    task = VAETask.from_config(config, None)
    assert (task.loss_config.lpips_weight, task.loss_config.kl_weight, task.critic.weight) == (0.1, 1e-6, 0.05)
    assert task.critic.joins_at < config.train.steps
    buckets = [build(Bucket, bucket, where="bucket") for bucket in config.data.buckets]
    shares = {image: sum(b.share for b in buckets if b.is_image == image) for image in (True, False)}
    assert shares == {True: 1.0, False: 4.0}
    tiled = sum(b.share for b in buckets if b.tiled)
    assert tiled == (2.5 if part in ("tiling", "shapes_tiling") else 0)
    assert all(b.intervals == (tuple(range(1, 9)) if part in recipe.STAGES else (1, 2)) for b in buckets)
    for bucket in buckets:
        task.model.latent_shape(*bucket.shape)
    for kind, section in ((DataConfig, {**config.data, "path": "x"}), (OptimizerConfig, config.optimizer)):
        build(kind, section, where="section")
    build(LoopConfig, config.train, where="train"), build(MeshConfig, config.mesh, where="mesh"), build(EmaConfig, config.ema, where="ema")
    if part in recipe.STAGES:
        assert task.tiling == Tiling()
        assert task.model == dataclasses.replace(VAEConfig(), convolution="planes", remat="full", dtype="bfloat16")


# --- Runs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains from a config of the recipe, made tiny, to a step."""
    folder = tmp_path_factory.mktemp("run")
    write_clips(folder / "clips")

    def train_to(steps: int, workdir: Path, *, start_step: int = 1) -> Path:
        config = recipe.get_config("shapes_tiling")
        config.start = ""
        config.model = ConfigDict({name: value for name, value in dataclasses.asdict(MODEL).items() if name != "dtype"})
        config.critic.model = ConfigDict(dataclasses.asdict(SMALL))
        config.critic.update({"start_step": start_step, "lead_steps": 1})
        config.data.update({"path": str(folder / "clips"), "held_out": 0.3})
        bucket = {"frames": 3, "height": 16, "width": 16, "intervals": (1, 2), "batch": 2}
        config.data.buckets, config.tiling.tile, config.tiling.overlap = ({**bucket, "tiled": True},), (3, 8, 16), (0, 0, 0)
        config.train.update({"steps": steps, "log_every": 1, "checkpoint_every": 2, "measure_every": 0, "preview_every": 0})
        train(config, workdir)
        return workdir

    return train_to


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> Path:
    return run(4, tmp_path_factory.mktemp("whole") / "vae")


def checkpoint(workdir: Path, part: str) -> dict:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir.absolute() / "checkpoints" / "4" / part)


def test_a_resumed_run_with_a_critic_equals_an_uninterrupted_one(run, trained, tmp_path):
    resumed = run(2, tmp_path / "vae")
    run(4, resumed)
    for part in ("params", "ema", "rest"):
        assert equal(checkpoint(trained, part), checkpoint(resumed, part))
    assert "critic" in checkpoint(trained, "rest")
    said = [[repeatable(row) for row in read_metrics(w / "metrics.jsonl")] for w in (trained, resumed)]
    assert said[0] == said[1]
    assert said[0][0]["d_loss"] == 0 < said[0][3]["d_loss"]
    assert {name for row in said[0] for name in row if name.startswith("loss/")} == {"loss/3x16x16-tiled"}


def test_a_run_with_a_critic_is_exported_and_encodes_as_any_vae(trained, tmp_path):
    assert json.loads((trained / "model.json").read_text())["critic"]["widths"] == [2, 4]
    export(trained, tmp_path / "vae", layout="native", weights="ema", dtype="keep")
    config, params = convert.load(tmp_path / "vae", component="vae")
    assert config == load_vae(trained)[0]
    averaged, at = load_params(trained, abstract_params(MODEL))
    assert at == 4
    assert equal(params, averaged)
    assert equal(averaged, load_vae(trained)[1])
    assert equal(averaged, checkpoint(trained, "ema"))


def test_a_run_says_that_lpips_is_off(trained, tmp_path, caplog):
    with caplog.at_level("INFO"):
        logging.use_python_logging()
        VAETask.from_config(ConfigDict(json.loads((trained / "config.json").read_text())), None)
    assert "LPIPS is off" in caplog.text
    page = report.make_page(report.read_run(trained.parent))
    assert "LPIPS was off" in page
    assert "adversary was off" not in page
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"task": "vae", "loss": {"lpips_files": "a,b"}}))
    page = report.make_page(report.read_run(tmp_path))
    assert not re.search("LPIPS was off", page)
    assert "adversary was off" in page
