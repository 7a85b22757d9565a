"""Laws of the training step: the guard, the moving average, gradient descent, and batches in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from hunyuan_jax import train
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.critics import DiscriminatorConfig
from hunyuan_jax.models.vae import VAEConfig
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.tasks import VAETask
from hunyuan_jax.tasks.critic import CriticConfig
from hunyuan_jax.tasks.task import normal_like, sample_keys
from hunyuan_jax.tasks.vae import VAELossConfig
from hunyuan_jax.train_step import EmaConfig, average, check_accumulation, init_critic_state, init_state, make_step


@dataclasses.dataclass(frozen=True)
class Parabola:
    """A task with loss (w - frames)^2, made non-finite by a non-finite frame; the gradient alone by `bad_gradient`."""

    bad_gradient: bool = False

    def loss(self, params, batch, *, key):
        loss = jnp.mean(jnp.square(params["w"] - batch.frames))
        if self.bad_gradient:
            loss = loss + jnp.sqrt(jnp.sum(jnp.square(params["w"] - params["w"])))  # finite, with a gradient of nan
        return loss, {"w": params["w"]}


def batch_of(value: float) -> VideoBatch:
    return VideoBatch(sample_id=jnp.zeros(1, jnp.uint32), frames=jnp.full((1, 1, 1, 1, 3), value))


def prepared(task, *, decay: float = 0.5):
    optimizer = optax.adam(0.1)
    step = jax.jit(make_step(task, optimizer, ema=EmaConfig(decay=decay), key=jax.random.key(0)))
    return step, init_state({"w": jnp.array(3.0)}, optimizer)


def without_counts(state):
    return state.params, state.ema, state.opt_state


@pytest.mark.parametrize(("task", "value"), [(Parabola(), np.nan), (Parabola(), np.inf), (Parabola(bad_gradient=True), 1.0)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(task, value):
    step, state = prepared(task)
    state, _ = prepared(Parabola())[0](state, batch_of(1.0))
    after, metrics = step(state, batch_of(value))
    jax.tree.map(np.testing.assert_array_equal, without_counts(after), without_counts(state))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert float(metrics["skipped"]) == 1.0


def test_training_goes_on_after_a_bad_step():
    step, state = prepared(Parabola())
    for value in [1.0, np.nan, *[1.0] * 200]:
        state, metrics = step(state, batch_of(value))
    assert (int(state.step), int(state.skipped)) == (202, 1)
    np.testing.assert_allclose(state.params["w"], 1.0, atol=0.05)
    assert float(metrics["loss"]) < 0.01


def test_a_finite_step_is_the_optimizers():
    step, state = prepared(Parabola())
    after, metrics = step(state, batch_of(1.0))
    np.testing.assert_allclose(after.params["w"], 3.0 - 0.1, rtol=1e-5)  # Adam's first step has the size of its rate
    np.testing.assert_allclose(metrics["grad_norm"], 4.0, rtol=1e-6)
    assert (int(after.step), int(after.skipped)) == (1, 0)


def test_the_average_of_constant_parameters_has_its_closed_form():
    ema, params = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
    left = 1.0
    for step in range(30):
        ema = average(ema, params, step=jnp.array(step), decay=0.6)
        left *= min(0.6, (1 + step) / (10 + step))
        np.testing.assert_allclose(ema["w"], 1 - left, rtol=1e-5)


def test_the_average_of_moving_parameters_is_the_weighted_sum():
    """After the warm-up the weight of the parameters k steps ago is (1 - decay) decay^k."""
    decay, values = 0.9, np.random.default_rng(0).normal(size=200).astype(np.float32)
    ema = {"w": jnp.array(0.0)}
    for step, value in enumerate(values):
        ema = average(ema, {"w": jnp.array(value)}, step=jnp.array(1000 + step), decay=decay)
    expected = sum((1 - decay) * decay**k * value for k, value in enumerate(values[::-1]))
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-4)


def test_the_average_stays_in_float32_when_parameters_do_not():
    ema = average({"w": jnp.zeros(2)}, {"w": jnp.ones(2, jnp.bfloat16)}, step=jnp.array(0), decay=0.9)
    assert ema["w"].dtype == jnp.float32


def test_a_state_begins_with_its_average_at_the_parameters():
    _, state = prepared(Parabola())
    np.testing.assert_array_equal(state.ema["w"], state.params["w"])
    assert state.ema["w"] is not state.params["w"]


def test_an_average_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"decay must lie in \[0, 1\], not 1.5"):
        EmaConfig(decay=1.5)


# --- Batches in parts ----------------------------------------------------------------------------------------------------------

JUDGED = CriticConfig(
    model=DiscriminatorConfig(widths=(2, 2), time_halvings=0, power_steps=1),
    optimizer=OptimizerConfig(learning_rate=1e-2), weight=0.5, adaptive=False,
)  # fmt: skip


class Linear(VAETask):
    """A linear model in the VAE's place, which compiles in a moment; the losses, noise by sample and the critic are the real ones."""

    def init(self, key):
        encoder, decoder = 0.5 * jax.random.normal(key, (2, 3, 3))
        return {"encoder": encoder, "decoder": {"conv_out": {"kernel": decoder}}}

    def draw(self, params, batch, key):
        latents = batch.frames @ params["encoder"] + 0.5 * normal_like(sample_keys(key, batch), batch.frames)
        return latents @ params["decoder"]["conv_out"]["kernel"], jnp.mean(jnp.square(latents))


@pytest.mark.parametrize("critic", [None, JUDGED])
def test_a_batch_in_parts_makes_the_step_of_the_whole(critic):
    task = Linear(VAEConfig(), VAELossConfig(kl_weight=1e-2), critic=critic)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, eps=1e-3))
    state = jax.jit(lambda: init_state(task.init(jax.random.key(0)), optimizer, init_critic_state(task, jax.random.key(1))))()
    frames = np.random.default_rng(0).uniform(-1, 1, (6, 2, 8, 8, 3)).astype(np.float32)
    batch = VideoBatch(sample_id=jnp.arange(6, dtype=jnp.uint32), frames=jnp.asarray(frames))

    def stepped(accumulate):
        step = make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(2), accumulate=accumulate)
        return jax.jit(step)(state, batch)

    (whole, said), (parts, said_of_parts) = stepped(1), stepped(3)
    assert said.keys() == said_of_parts.keys()
    assert critic is None or float(said["critic_grad_norm"]) > 0
    for name in said:
        np.testing.assert_allclose(said_of_parts[name], said[name], rtol=1e-5, err_msg=name)
    for a, b, before in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-3 * np.abs(b - before).max())


@dataclasses.dataclass(frozen=True)
class Slope:
    """A task whose gradient is the mean of the samples."""

    def loss(self, params, batch, *, key):
        return jnp.mean(params["w"] * batch.frames), {}


def test_gradients_of_parts_are_averaged_in_float32():
    """In bfloat16 256 + 1 is 256."""
    state = init_state({"w": jnp.ones((), jnp.bfloat16)}, optax.sgd(1.0))
    frames = jnp.array([256, 1, 1, 2], jnp.bfloat16)[:, None, None, None, None] * jnp.ones((1, 1, 1, 1, 3), jnp.bfloat16)
    batch = VideoBatch(sample_id=jnp.zeros(4, jnp.uint32), frames=frames)
    step = make_step(Slope(), optax.sgd(1.0), ema=EmaConfig(), key=jax.random.key(0), accumulate=4)
    after, metrics = jax.jit(step)(state, batch)
    assert (float(metrics["grad_norm"]), after.params["w"].dtype) == (65.0, jnp.bfloat16)


def test_one_part_that_is_not_finite_skips_the_whole_step():
    step = jax.jit(make_step(Parabola(), optax.adam(0.1), ema=EmaConfig(), key=jax.random.key(0), accumulate=2))
    _, state = prepared(Parabola())
    frames = jnp.array([1.0, jnp.nan])[:, None, None, None, None] * jnp.ones((1, 1, 1, 1, 3))
    after, _ = step(state, VideoBatch(sample_id=jnp.zeros(2, jnp.uint32), frames=frames))
    jax.tree.map(np.testing.assert_array_equal, without_counts(after), without_counts(state))
    assert (int(after.step), int(after.skipped)) == (1, 1)


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    task, mesh = Linear(VAEConfig(), VAELossConfig()), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=8 * jax.devices()[:1])
    check = lambda batch, accumulate: check_accumulation(  # noqa: E731
        accumulate, task=task, buckets=[Bucket(frames=9, height=64, width=64, batch=batch)], mesh=mesh
    )
    check(24, 3)
    check(1, 1)  # how it divides over the mesh is the loader's to say
    with pytest.raises(UserError, match=r"9x64x64: a batch of 32 .*accumulate=3 parts over 4 devices.* multiple of 12, such as 36"):
        check(32, 3)
    with pytest.raises(UserError, match="such as 12"):
        check(1, 3)


def test_a_run_knows_whether_its_batches_divide_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(train, "open_dataset", lambda *_, **__: None)
    monkeypatch.setattr(train.loader, "training_schedule", lambda *_, **__: None)
    config = quickstart.get_config("vae_first")
    config.data.path, config.optimizer.accumulate = "clips", 4
    with pytest.raises(UserError, match=r"9x64x64: a batch of 1 does not divide into optimizer.accumulate=4 parts"):
        train.Setup.from_config(config)
    config.optimizer.accumulate = 1
    assert train.Setup.from_config(config).optimizer.accumulate == 1


def test_a_critic_has_no_parts_of_its_own():
    own = dataclasses.replace(JUDGED, optimizer=OptimizerConfig(learning_rate=1.0, accumulate=2))
    with pytest.raises(UserError, match=r"critic.optimizer.accumulate must be 1"):
        check_accumulation(1, task=Linear(VAEConfig(), VAELossConfig(), critic=own), buckets=[], mesh=make_mesh(MeshConfig()))
