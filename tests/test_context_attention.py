"""Laws of attention whose tokens are split over devices: it is that of one device, or refused."""

import dataclasses

import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.parallel.context_attention import degree_of
from tests.commands import run_module, run_program

EQUAL = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from hunyuan_jax.models.attention import attention
from hunyuan_jax import attention_kernels
from hunyuan_jax.parallel import context_attention as module
from hunyuan_jax.parallel.context_attention import How, context_attention
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh

attention_kernels.BLOCK_SCORES = 300  # several blocks of queries
rng = np.random.default_rng(0)
for sizes, heads, degree, backend, permutes in (
    ((1, 1, 8, 1), 3, 1, "reference", False),
    ((1, 1, 8, 1), 8, 8, "reference", False),
    ((1, 1, 4, 2), 12, 2, "reference", False),  # three heads to a device, in two turns
    ((1, 1, 8, 1), 4, 2, "reference", True),  # four groups in a ring
    ((2, 1, 4, 1), 4, 4, "reference", True),
    ((2, 1, 4, 1), 2, 1, "splash", False),
    ((2, 2, 1, 2), 2, 0, "splash", False),
):
    module.has_asynchronous_all_to_all = lambda: not permutes
    length, padded, txt = 53, 56, 7
    x = [rng.normal(size=(3, n, heads, 4)).astype(np.float32) for n in 3 * (padded,) + 3 * (txt,)]
    lengths = np.array([0, 3, 7], np.int32)
    slopes = [rng.normal(size=(3, n, heads, 4)).astype(np.float32) for n in (length, txt)]

    def score(img, txt):
        return jnp.sum(img[:, :length] * slopes[0]) + jnp.sum(txt * slopes[1])

    def whole(*x, backend="reference"):
        q, k, v = (jnp.concatenate([a[:, :length], b], axis=1) for a, b in zip(x[:3], x[3:]))
        out = attention(q, k, v, kv_lengths=length + lengths, backend=backend)
        return score(out[:, :length], out[:, length:])

    def split(*x):
        if not degree:
            return whole(*x, backend=backend)
        return score(*context_attention(x[:3], x[3:], txt_lengths=jnp.asarray(lengths), how=How(length, degree, backend)))

    value, grads = jax.jit(jax.value_and_grad(whole, argnums=range(6)))(*x)
    with jax.set_mesh(make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes))))):
        value2, grads2 = jax.jit(jax.value_and_grad(split, argnums=range(6)))(*x)
    assert abs(value - value2) <= 1e-5 * max(1, abs(value)), (value, value2)
    for one, other in zip(grads, grads2):
        error = np.abs(np.asarray(one) - np.asarray(other)).max() / np.abs(one).max()
        assert error <= 5e-6, (sizes, degree, backend, permutes, error)
print("equal")
"""


def test_attention_over_devices_is_attention_on_one_and_so_are_its_gradients():
    """Ring, all-to-all, both, neither, and a batch that the axes of a batch do not divide; an empty text and padding among the tokens."""
    assert run_program(EQUAL) == "equal"


def test_a_model_on_any_mesh_gives_the_loss_and_the_gradients_of_one_device():
    said = run_module("tests.context_cases", "--cases", "4", "--seed", "35")
    assert "4 cases equal one device" in said


def test_a_training_goes_the_same_way_on_a_mesh_of_all_axes_as_on_one_device():
    assert "1 meshes train as one device" in run_module("tests.mesh_curves", "--meshes", "1")


def test_heads_that_the_tensor_axis_does_not_divide_are_refused():
    mesh = {"data": 1, "fsdp": 1, "sequence": 2, "tensor": 4}
    assert degree_of("heads", 24, mesh) == 2
    assert degree_of("ring", 24, mesh) == 1
    with pytest.raises(UserError, match=r"mesh.tensor=4 does not divide the 6 heads; set it to one of 1, 2, 3, 6"):
        degree_of("ring", 6, mesh)


def test_as_many_devices_share_heads_as_can_or_as_a_config_says():
    mesh = {"data": 1, "fsdp": 1, "sequence": 16, "tensor": 1}
    assert degree_of("heads", 24, mesh) == 8
    assert degree_of("heads", 24, mesh, wanted=4) == 4
    with pytest.raises(UserError, match=r"context_degree=16 must divide mesh.sequence=16 and 24 heads.*nearest that does is 8"):
        degree_of("heads", 24, mesh, wanted=16)
    with pytest.raises(UserError, match=r"no two of the mesh.sequence=16 devices can share 9 heads.*'ring'"):
        degree_of("heads", 9, mesh)


def test_a_kernel_whose_parts_cannot_be_merged_is_refused_where_devices_share_tokens():
    config = DiTConfig(width=12, num_heads=1, rope_axes=(4, 4, 4), num_double_blocks=1, num_single_blocks=1, text_dim=5, pooled_dim=3)
    mesh = {"data": 1, "fsdp": 1, "sequence": 2, "tensor": 1}
    assert config.degree_on(mesh) == 1
    with pytest.raises(UserError, match=r"'cudnn' has no parts that mesh.sequence=2 devices could merge"):
        dataclasses.replace(config, attention="cudnn").degree_on(mesh)
