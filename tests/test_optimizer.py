"""Schedules in closed form; what is decayed; Muon's steps against their definition; where the optimizer's state lives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hunyuan_jax.errors import UserError
from hunyuan_jax.optimizer import MUON_RMS, OptimizerConfig, make_optimizer, make_schedule
from hunyuan_jax.parallel.mesh import AXES
from hunyuan_jax.train import state_shardings
from hunyuan_jax.train_step import init_state


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


@pytest.fixture
def params():
    """A matrix, the same in three scanned layers, a convolution, their biases and a norm."""
    return {
        "img_attn_proj": {"kernel": normal(8, 12), "bias": normal(12)},
        "blocks": {"linear1": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)}},
        "conv": {"kernel": normal(3, 3, 3, 4, 16), "bias": normal(16)},
        "norm1": {"scale": normal(3, 12)},
    }


def one_step(config: OptimizerConfig, params, grads):
    """The change of the first step."""
    optimizer = make_optimizer(config)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_steps=110, final_fraction=0.1))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110), rate(500)], [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_kernels_are_decayed(params, kind):
    nothing = jax.tree.map(jnp.zeros_like, params)
    change = one_step(OptimizerConfig(kind=kind, learning_rate=0.5, weight_decay=0.1), params, nothing)
    for path, moved in jax.tree_util.tree_leaves_with_path(change):
        assert (np.abs(moved).max() > 0) == (path[-1].key == "kernel"), path
    np.testing.assert_allclose(change["img_attn_proj"]["kernel"], -0.05 * params["img_attn_proj"]["kernel"], rtol=1e-5)


def as_matrices(kernel):
    """Kernels as [number, in, out]: layers apart, a convolution's taps among the inputs."""
    return np.asarray(kernel).reshape(-1, *kernel.shape[-2:]) if kernel.ndim < 5 else np.asarray(kernel).reshape(1, -1, kernel.shape[-1])


def test_muon_moves_every_matrix_by_an_orthogonal_one_of_the_size_of_an_adam_step(params):
    grads = jax.tree.map(lambda p: 1e-3 * p, params)
    change = one_step(OptimizerConfig(kind="muon", learning_rate=1.0), params, grads)
    for name in ("img_attn_proj", "conv"):
        check_muon(change[name]["kernel"], grads[name]["kernel"])
    check_muon(change["blocks"]["linear1"]["kernel"], grads["blocks"]["linear1"]["kernel"])
    # What is no kernel moves as by Adam with Nesterov's momentum: first against the gradient's sign, by 1 + b1 (1 - b1) / (1 - b1^2).
    np.testing.assert_allclose(change["conv"]["bias"], -(1 + 0.09 / 0.19) * np.sign(grads["conv"]["bias"]), rtol=1e-3)


def check_muon(moved, grad):
    for change, matrix in zip(as_matrices(moved), as_matrices(grad), strict=True):
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        expected = -MUON_RMS * np.sqrt(max(matrix.shape)) * (u @ vt)
        cosine = np.sum(change * expected) / (np.linalg.norm(change) * np.linalg.norm(expected))
        assert cosine > 0.97  # five Newton-Schulz steps bring the singular values to 1 within about a third
        assert np.linalg.norm(change) == pytest.approx(np.linalg.norm(expected), rel=0.2)


def test_kernels_that_muon_is_kept_from_are_trained_by_adam_at_its_own_rate(params):
    grads = jax.tree.map(lambda p: 1e-3 * p, params)
    change = one_step(OptimizerConfig(kind="muon", learning_rate=1.0, not_muon=("attn",), adam_rate=0.25), params, grads)
    step = 0.25 * (1 + 0.09 / 0.19)
    np.testing.assert_allclose(change["img_attn_proj"]["kernel"], -step * np.sign(grads["img_attn_proj"]["kernel"]), rtol=1e-2)
    check_muon(change["blocks"]["linear1"]["kernel"], grads["blocks"]["linear1"]["kernel"])


def test_a_name_that_no_parameter_has_is_refused(params):
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, not_muon=("attn", "atn")))
    with pytest.raises(UserError, match=r"not_muon names 'atn', .* such as \w+/\w+"):
        jax.eval_shape(optimizer.init, params)


def test_three_newton_schulz_steps_are_enough_for_singular_values_of_1_to_20():
    left, _ = np.linalg.qr(normal(8, 8))
    right, _ = np.linalg.qr(normal(12, 8))
    params = {"proj": {"kernel": jnp.asarray((left * np.geomspace(1e-3, 2e-2, 8)) @ right.T, jnp.float32)}}
    change = one_step(OptimizerConfig(kind="muon", learning_rate=1.0, newton_schulz_steps=3), params, params)
    check_muon(change["proj"]["kernel"], params["proj"]["kernel"])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_of_a_parameter_lies_where_the_parameter_lies(kind):
    mesh = AbstractMesh((1, 4, 1, 2), AXES)
    params = {"blocks": {"linear1": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)}}}
    state = init_state(params, make_optimizer(OptimizerConfig(kind=kind, learning_rate=1.0)))
    placed = state_shardings(state, mesh)
    expected = placed.params["blocks"]["linear1"]["kernel"].spec
    assert expected == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    moments = [
        s.spec for s, x in zip(jax.tree.leaves(placed.opt_state), jax.tree.leaves(state.opt_state), strict=True) if x.shape == (3, 8, 12)
    ]
    assert moments == [expected] * (2 if kind == "adamw" else 1)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="adamw, muon"):
        OptimizerConfig(kind="sgd", learning_rate=1.0)  # type: ignore[arg-type]
