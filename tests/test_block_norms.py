"""Laws of the norms by block: together they are the norm of all, each of them that of its block alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from hunyuan_jax.block_norms import norms_by_block
from hunyuan_jax.tasks import planned_task


def random_params(part: str):
    task = planned_task(quickstart.get_config(part))
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("part", ["t2v", "vae"])
def test_norms_of_blocks_make_up_the_norm_of_all(part):
    params = random_params(part)
    norms = norms_by_block(params)
    total = np.sqrt(sum(np.sum(np.square(norm)) for norm in norms.values()))
    np.testing.assert_allclose(total, optax.tree.norm(params), rtol=1e-5)


def test_a_stack_has_a_norm_for_each_layer():
    params = random_params("t2v")
    norms = norms_by_block(params)
    layers = {name: norm.shape for name, norm in norms.items() if norm.ndim}
    assert layers == {"double_blocks": (2,), "single_blocks": (4,), "txt_in/individual_token_refiner": (1,)}
    third = jax.tree.map(lambda leaf: leaf[2], params["single_blocks"])
    np.testing.assert_allclose(norms["single_blocks"][2], optax.tree.norm(third), rtol=1e-5)
    np.testing.assert_allclose(norms["time_in/in_layer"], optax.tree.norm(params["time_in"]["in_layer"]), rtol=1e-5)


def test_a_module_is_known_by_two_names():
    norms = norms_by_block(random_params("vae"))
    assert {"decoder/up_blocks_1", "encoder/conv_in", "encoder/down_blocks_0", "quant_conv"} <= norms.keys()
    assert {norm.ndim for norm in norms.values()} == {0}


def test_norms_of_bfloat16_are_summed_in_float32():
    params = {"fc1": {"kernel": jnp.ones((64, 64), jnp.bfloat16)}}
    norm = norms_by_block(params)["fc1"]
    assert (float(norm), norm.dtype) == (64.0, jnp.float32)
