"""Schedules in closed form; rules against PyTorch's and their definitions; what is decayed; groups; where the optimizer's state lives."""

import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

from configs import t2v_13b
from hunyuan_jax.errors import UserError
from hunyuan_jax.models import layouts
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.optimizer import MUON_RMS, Group, Kind, OptimizerConfig, make_optimizer, make_schedule
from hunyuan_jax.parallel.mesh import AXES
from hunyuan_jax.settings import build
from hunyuan_jax.state import state_shardings
from hunyuan_jax.train_step import init_state
from tests.commands import run_program

KINDS = get_args(Kind)


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
    return jax.jit(lambda params, grads: optimizer.update(grads, optimizer.init(params), params)[0])(params, grads)


def trained(config: OptimizerConfig, params, grads):
    """The parameters after a step for each of `grads`."""
    optimizer = make_optimizer(config)

    @jax.jit
    def step(params, state, grad):
        change, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, change), state

    state = jax.jit(optimizer.init)(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_steps=110, final_fraction=0.1))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110), rate(500)], [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rate(35), 0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)


def test_a_linear_schedule_falls_along_a_line_and_one_without_steps_stays():
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay="linear", decay_steps=110, final_fraction=0.1))
    np.testing.assert_allclose([rate(n) for n in (0, 5, 10, 35, 110, 500)], [0, 1, 2, 1.55, 0.2, 0.2], rtol=1e-6)
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay="linear"))
    np.testing.assert_allclose([rate(n) for n in (5, 10, 500)], [1, 2, 2], rtol=1e-6)


# --- Rules ---------------------------------------------------------------------------------------------------------------------


def layers_of(params):
    """{name: array} with the layers of the stack apart, as PyTorch has them."""
    params = jax.tree.map(np.asarray, params)
    flat = {"proj/kernel": params["proj"]["kernel"], "proj/bias": params["proj"]["bias"]}
    return flat | {f"{n}/{name}": x[n] for name, x in params["blocks"]["linear1"].items() for n in range(len(x))}


@pytest.fixture(scope="module")
def large():
    """A matrix and two layers of very different size, all large enough to be factored, and three gradients for them."""
    scale = jnp.array([0.1, 10.0])
    params = {
        "proj": {"kernel": normal(128, 160), "bias": normal(160)},
        "blocks": {"linear1": {"kernel": normal(2, 160, 128) * scale[:, None, None], "bias": normal(2, 128) * scale[:, None]}},
    }
    rng = np.random.default_rng(0)
    # Rows of a gradient are of different size, and so are gradients, or second moments would not matter.
    draw = lambda p, size: jnp.asarray(size * rng.normal(size=p.shape) * rng.uniform(0.1, 2, p.shape[-1]), jnp.float32)  # noqa: E731
    return params, [jax.tree.map(lambda p, size=size: draw(p, size), params) for size in (1.0, 3.0, 0.2)]


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_rule_is_pytorchs_in_every_layer(large, kind):
    torch = pytest.importorskip("torch")
    params, grads = large
    config = OptimizerConfig(kind=kind, learning_rate=0.02, b2=0.98, weight_decay=0.3, clip_norm=1e9)
    ours = layers_of(trained(config, params, grads))
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in layers_of(params).items()}
    decayed, kept = ([x for name, x in theirs.items() if name.endswith("kernel") == is_kernel] for is_kernel in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.98), eps=1e-8)
    else:
        optimizer = torch.optim.Adafactor(groups, lr=0.02)
    for grad in grads:
        for name, x in layers_of(grad).items():
            theirs[name].grad = torch.tensor(np.asarray(x))
        optimizer.step()
    for name, x in theirs.items():
        moved = np.abs(np.asarray(x.detach()) - layers_of(params)[name]).max()
        np.testing.assert_allclose(ours[name], x.detach().numpy(), atol=1e-4 * moved, rtol=1e-6, err_msg=name)


def test_adafactor_keeps_means_of_rows_and_columns_alone(large):
    state = jax.eval_shape(make_optimizer(OptimizerConfig(kind="adafactor", learning_rate=1.0)).init, large[0])
    matrices, vectors = 3 * (128 + 160), 160 + 2 * 128
    assert matrices + vectors < sum(leaf.size for leaf in jax.tree.leaves(state)) < matrices + vectors + 20


def test_without_relative_adafactors_first_step_has_the_size_of_its_rate(large):
    """The root mean square of a first step, before the decay, is 1 for a vector, and at most that for a matrix."""
    change = one_step(OptimizerConfig(kind="adafactor", learning_rate=0.5, relative=False), large[0], large[1][0])
    for name, x in layers_of(change).items():
        size = np.sqrt(np.mean(np.square(x)))
        assert 0.5 * (1 if name.endswith("bias") else 0.8) * (1 - 1e-5) <= size <= 0.5 * (1 + 1e-5), name


def test_lion_moves_by_the_sign_of_its_momentum(large):
    params, grads = large
    config = OptimizerConfig(kind="lion", learning_rate=0.02, b1=0.8, b2=0.97, weight_decay=0.3, clip_norm=1e9)
    expected = {name: np.asarray(x, np.float64) for name, x in layers_of(params).items()}
    momentum = dict.fromkeys(expected, 0.0)
    for grad in grads:
        for name, g in layers_of(grad).items():
            decay = 0.3 * expected[name] if name.endswith("kernel") else 0.0
            expected[name] = expected[name] - 0.02 * (np.sign(0.8 * momentum[name] + 0.2 * np.asarray(g)) + decay)
            momentum[name] = 0.97 * momentum[name] + 0.03 * np.asarray(g)
    for name, x in layers_of(trained(config, params, grads)).items():
        np.testing.assert_allclose(x, expected[name], atol=1e-5, err_msg=name)


def test_gradients_are_clipped_by_their_global_norm(params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, clip_norm=2.0))

    @jax.jit
    def norm_of_moments(size):
        grads = jax.tree.map(lambda p: p * size / optax.tree.norm(params), params)
        return optax.tree.norm(optimizer.update(grads, optimizer.init(params), params)[1][1][0].mu)

    for size in (0.5, 1.0, 8.0):
        np.testing.assert_allclose(norm_of_moments(size), 0.1 * min(size, 2.0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
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
        assert cosine > 0.97
        values = np.linalg.svd(change, compute_uv=False) / (MUON_RMS * np.sqrt(max(matrix.shape)))
        assert 0.6 < values.min() <= values.max() < 1.3  # as near to 1 as five Newton-Schulz steps bring them
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


# --- Groups --------------------------------------------------------------------------------------------------------------------

GROUPS = ({"pattern": "attn", "learning_rate": 0.25, "weight_decay": 0.0}, {"pattern": "proj|blocks", "weight_decay": 0.7})


@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_is_trained_with_the_rate_and_decay_of_the_first_group_that_finds_it(params, kind):
    grads = [jax.tree.map(lambda p, n=n: 1e-2 * np.asarray(p) ** n, params) for n in (1, 2)]
    config = {"kind": kind, "learning_rate": 0.5, "weight_decay": 0.1, "newton_schulz_steps": 1}
    changed = trained(OptimizerConfig(**config, groups=GROUPS), params, grads)
    for own, names in [
        ({"learning_rate": 0.125, "weight_decay": 0.0}, ["img_attn_proj"]),
        ({"weight_decay": 0.7}, ["blocks"]),
        ({}, ["conv", "norm1"]),
    ]:
        expected = trained(OptimizerConfig(**{**config, **own}), params, grads)
        for name in names:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), changed[name], expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_without_a_rate_stays_and_one_decays_no_bias(params, kind):
    groups = ({"pattern": "^conv", "learning_rate": 0.0, "weight_decay": 0.5}, {"pattern": "", "weight_decay": 0.5})
    config = OptimizerConfig(kind=kind, learning_rate=0.5, groups=groups)
    change = one_step(config, params, jax.tree.map(jnp.ones_like, params))
    assert not any(np.any(x) for x in jax.tree.leaves(change["conv"]))
    change = one_step(config, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(change["img_attn_proj"]["kernel"], -0.25 * params["img_attn_proj"]["kernel"], rtol=1e-5)
    for path, moved in jax.tree_util.tree_leaves_with_path(change):
        assert not np.any(moved) or path[-1].key == "kernel", path


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"pattern": "atn"}], r"'atn' of groups\[0\] is found in no parameter's path; paths are such as blocks/linear1/bias, \w+/\w+"),
        ([{"pattern": "conv"}, {"pattern": "conv/bias"}], r"'conv/bias' of groups\[1\] finds only parameters of groups before it"),
        ([{"pattern": "bias", "weight_decay": 0.1}], "weight_decay=0.1 could change: only kernels that Muon trains are decayed"),
        ([{"pattern": "img_attn", "weight_decay": 0.1}], "only kernels that Muon trains are decayed"),
    ],
)
def test_a_group_that_would_do_nothing_is_refused_before_anything_is_compiled(params, groups, said):
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, not_muon=("attn",), groups=groups))
    with pytest.raises(UserError, match=said):
        jax.eval_shape(optimizer.init, params)


def test_groups_are_read_from_a_config_and_misspelt_ones_refused():
    section = ConfigDict({"learning_rate": 1.0, "groups": ({"pattern": "a", "learning_rate": 2.0},)})
    assert build(OptimizerConfig, section, where="optimizer").groups == (Group(pattern="a", learning_rate=2.0),)
    for group, said in [
        ({"patern": "a"}, r"optimizer.groups\[0\].patern is not known. Did you mean 'pattern'"),
        ({"pattern": "a("}, r"'a\(' is no regular expression"),
        ({"pattern": "a", "learning_rate": -1.0}, "must be at least 0, not -1.0 and None"),
        ({"pattern": "a", "weight_decay": -0.1}, "must be at least 0, not 1.0 and -0.1"),
    ]:
        with pytest.raises(UserError, match=said):
            build(OptimizerConfig, ConfigDict({"learning_rate": 1.0, "groups": (group,)}), where="optimizer")


def test_the_patterns_that_are_documented_find_what_they_say_in_the_13b_model():
    section = t2v_13b.get_config().model.to_dict() | {"guidance_embed": True}
    paths = list(layouts.abstract_params(build(DiTConfig, section, where="model")))
    patterns = re.findall(r"^ +`(\S+)`  ", OptimizerConfig.__doc__, flags=re.MULTILINE)
    found = [{path.rpartition("/")[0] for path in paths if re.search(pattern, path)} for pattern in patterns]
    refiner = "txt_in/individual_token_refiner"
    modulation = {f"{p}/linear" for p in ("double_blocks/img_mod", "double_blocks/txt_mod", "single_blocks/modulation")}
    ends = {f"{p}/{layer}" for p in ("time_in", "vector_in", "guidance_in", "txt_in/c_embedder", "txt_in/t_embedder")
            for layer in ("in_layer", "out_layer")}  # fmt: skip
    blocks = {"mlp/fc1", "mlp/fc2", "norm1", "norm2", "self_attn_proj", "self_attn_qkv", "adaLN_modulation"}
    assert found == [
        modulation | {f"{refiner}/adaLN_modulation", "final_layer/adaLN_modulation"},
        ends | {"img_in/proj", "txt_in/input_embedder"},
        {f"{refiner}/{name}" for name in blocks},
        {"final_layer/linear", "final_layer/adaLN_modulation"},
    ]


# --- Placement -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("groups", [(), ({"pattern": "blocks"},)])
def test_the_state_of_a_parameter_lies_where_the_parameter_lies(kind, groups):
    mesh = AbstractMesh((1, 4, 1, 2), AXES)
    params = {"blocks": {"linear1": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)}}}
    optimizer = make_optimizer(OptimizerConfig(kind=kind, learning_rate=1.0, groups=groups))
    state = jax.eval_shape(lambda: init_state(params, optimizer))
    placed = state_shardings(state, mesh)
    expected = placed.params["blocks"]["linear1"]["kernel"].spec
    assert expected == PartitionSpec(None, "fsdp", "tensor")
    moments = [
        s.spec for s, x in zip(jax.tree.leaves(placed.opt_state), jax.tree.leaves(state.opt_state), strict=True) if x.shape == (3, 8, 12)
    ]
    assert moments == [expected] * (2 if kind == "adamw" else 1)


def test_adafactors_means_of_rows_and_columns_lie_as_the_axes_that_they_keep():
    mesh = AbstractMesh((1, 4, 1, 2), AXES)
    params = {"blocks": {"linear1": {"kernel": normal(3, 128, 256)}}}
    optimizer = make_optimizer(OptimizerConfig(kind="adafactor", learning_rate=1.0))
    state = jax.eval_shape(lambda: init_state(params, optimizer))
    placed = jax.tree.leaves(state_shardings(state, mesh).opt_state)
    by_shape = {leaf.shape: place.spec for leaf, place in zip(jax.tree.leaves(state.opt_state), placed, strict=True)}
    means = {(3, 128): PartitionSpec(None, "fsdp"), (3, 256): PartitionSpec(None, "tensor")}
    assert by_shape == {(): PartitionSpec(), (1,): PartitionSpec(), **means}  # counts, and where other rules keep moments


MESH_STEP = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, path_of
from hunyuan_jax.state import make_state
from hunyuan_jax.train_step import EmaConfig, make_step

class Layers:
    critic = None

    def init(self, key):
        normal = lambda n, *shape: 0.1 * jax.random.normal(jax.random.fold_in(key, n), shape)
        layers = {"linear1": {"kernel": normal(0, 2, 128, 256), "bias": normal(1, 2, 256)}, "linear2": {"kernel": normal(2, 2, 256, 128)}}
        return {"blocks": layers, "final_layer": {"linear": {"kernel": normal(3, 128, 64)}}}

    def loss(self, params, batch, *, key):
        x, layers = batch.mean, params["blocks"]
        for n in range(2):
            x = x + jnp.tanh(x @ layers["linear1"]["kernel"][n] + layers["linear1"]["bias"][n]) @ layers["linear2"]["kernel"][n]
        return jnp.mean(jnp.square(x @ params["final_layer"]["linear"]["kernel"] - 1)), {"size": jnp.mean(jnp.square(x))}

def step(mesh, state, accumulate):
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_sharding(mesh))
        run = make_step(task, optimizer, ema=EmaConfig(), key=jax.random.key(1), accumulate=accumulate)
        run = jax.jit(run).lower(state, placed).compile()
        after, said = run(state, placed)
        return after, jax.device_get(said), run.as_text()

task = Layers()
rng = np.random.default_rng(0)
batch = VideoBatch(sample_id=np.arange(16, dtype=np.uint32), mean=rng.normal(size=(16, 1, 1, 8, 128)).astype(np.float32))
axes = {"data": 2, "fsdp": 2, "tensor": 2}
one, samples, eight = make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(data=8)), make_mesh(MeshConfig(**axes))
groups = ({"pattern": "final_layer", "learning_rate": 0.5, "weight_decay": 0.0},)
muon = {"not_muon": ("final",), "newton_schulz_steps": 3}
for kind, more, mesh in (("adamw", {}, samples), ("adafactor", {}, eight), ("lion", {"groups": groups}, eight), ("muon", muon, eight)):
    optimizer = make_optimizer(OptimizerConfig(kind=kind, learning_rate=0.01, weight_decay=0.1, **more))
    with jax.set_mesh(mesh):
        start = make_state(task, optimizer, key=jax.random.key(0), mesh=mesh)
    split, said_split, program = step(mesh, start, 2)
    whole, said, _ = step(one, jax.device_get(start), 1)
    for name in said:
        assert abs(said[name] - said_split[name]) <= 1e-5 * abs(said[name]), (kind, name)
    for part in ("params", "ema", "opt_state"):
        for (path, a), b, old in zip(jax.tree_util.tree_leaves_with_path(getattr(whole, part)), jax.tree.leaves(getattr(split, part)),
                                     jax.tree.leaves(getattr(start, part)), strict=True):
            a, b, old = np.asarray(a), np.asarray(b), np.asarray(old)
            wrong = np.abs(a - b) > 2e-3 * np.abs(a - old).max() + 1e-6 * np.abs(a)
            # Where a gradient is next to nothing rounding decides on its sign, and Lion and AdamW go by that.
            assert wrong.mean() <= (0 if part == "opt_state" else 1e-3), (kind, part, path_of(path), wrong.mean())
    if mesh is samples:
        assert "all-reduce" in program
        assert not any(word in program for word in ("all-gather", "all-to-all", "permute", "broadcast-start")), "samples move"
print("equal")
"""


def test_a_step_on_a_mesh_is_that_of_one_device_and_parts_of_a_batch_move_no_sample():
    assert run_program(MESH_STEP) == "equal"


OFFLOAD = """
import dataclasses, tempfile
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from hunyuan_jax import train as training
from hunyuan_jax.checkpoint import Checkpoints
from tests.tiny_trainings import Left, Linear, tiny_config, write_clips

training.make_task = Linear.from_config
folder = Path(tempfile.mkdtemp())
write_clips(folder / "clips")
lies, save = set(), Checkpoints.save

def look(self, step, state, **how):
    for x in jax.tree.leaves(state.opt_state):
        lies.add((x.ndim > 0, x.sharding.memory_kind))
    assert {x.sharding.memory_kind for x in jax.tree.leaves((state.params, state.ema))} == {"device"}
    return save(self, step, state, **how)

Checkpoints.save = look

def left_by(name, offload):
    for steps in (4, 12):
        config = tiny_config("linear", folder, batch=4, steps=steps, log_every=2, checkpoint_every=4)
        config.mesh.update({"data": 2, "fsdp": 2})
        config.optimizer.offload = offload
        training.train(config, folder / name)
    return Left.by(folder / name, 12)

here = left_by("device", False)
assert lies == {(True, "device"), (False, "device")}, lies
lies.clear()
there = left_by("host", True)
assert lies == {(True, "pinned_host"), (False, "device")}, lies
print("differ:", here.differing_bits(there), here.differing_values(there))
"""


def test_an_optimizer_in_host_memory_takes_the_same_steps_and_stays_there_over_a_checkpoint():
    assert "differ: 0 0\n" in run_program(OFFLOAD)


# --- What is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "sgd"}, "kind must be one of adamw, adafactor, lion, muon, not 'sgd'"),
        ({"decay": "square"}, "decay must be one of cosine, linear, not 'square'"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, not nan"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"b2": 1.0}, "b2 must be at least 0 and below 1, not 1.0"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps must be a whole number of at least 1"),
        ({"accumulate": 1.5}, "accumulate must be a whole number of at least 1, not 1.5"),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1, not 0"),
        ({"warmup_steps": 10, "decay_steps": 10}, "decay_steps=10 must be above warmup_steps=10"),
    ],
)
def test_a_value_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        build(OptimizerConfig, {"learning_rate": 1.0, **wrong}, where="optimizer")
