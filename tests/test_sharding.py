"""Laws of placement: every parameter has a rule, every rule a parameter, no axis is used twice, and results do not change."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, PartitionSpec

from configs import t2v_13b
from hunyuan_jax.errors import UserError
from hunyuan_jax.models import layouts, text_encoders
from hunyuan_jax.models.critics import DiscriminatorConfig, init_discriminator
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.text_encoders import CLIPTextConfig, TextTowerConfig
from hunyuan_jax.models.vae import VAEConfig, abstract_params
from hunyuan_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import ACTIVATION_RULES, PARAM_RULES, param_shardings, path_of, rule_for, spec, split_rows
from hunyuan_jax.settings import build
from tests.commands import ROOT, run_program


def abstract_dit():
    """The parameters of the 13B model, with the guidance embedding that distillation adds."""
    section = t2v_13b.get_config().model.to_dict() | {"guidance_embed": True}
    return traverse_util.unflatten_dict(layouts.abstract_params(build(DiTConfig, section, where="model")), sep="/")


@pytest.fixture(scope="module")
def trees():
    critic = jax.eval_shape(lambda: init_discriminator(DiscriminatorConfig(), jax.random.key(0)))
    text = {"tower": text_encoders.abstract_params(TextTowerConfig()), "clip": text_encoders.abstract_params(CLIPTextConfig())}
    return {"dit": abstract_dit(), "vae": abstract_params(VAEConfig()), "critic": critic, **text}


@pytest.fixture(scope="module")
def leaves(trees):
    """(path, shape) of every parameter of the full models."""
    return [(path_of(path), leaf.shape) for tree in trees.values() for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_every_parameter_has_a_rule_that_fits_it(leaves):
    for path, size in leaves:
        assert len(rule_for(path, size)) == len(size), path


def test_every_parameter_has_only_one_rule(leaves):
    for path, _ in leaves:
        assert [pattern for pattern, _ in PARAM_RULES if re.search(pattern, path)][1:] == [], path


def test_every_rule_has_a_parameter(leaves):
    for pattern, _ in PARAM_RULES:
        assert any(re.search(pattern, path) for path, _ in leaves), pattern


def test_every_word_of_a_rule_is_a_name_in_a_model(leaves):
    paths = "\n".join(path for path, _ in leaves)
    for pattern, _ in PARAM_RULES:
        for word in re.findall(r"[A-Za-z]\w+", re.sub(r"\\d\??", "", pattern)):
            assert word in paths, f"{word} of {pattern}"


def test_no_axis_lands_on_two_dimensions_and_no_stack_of_layers_is_split(leaves):
    for path, size in leaves:
        axes = [axis for axis in rule_for(path, size) if axis]
        assert len(set(axes)) == len(axes) and set(axes) <= set(AXES), path  # noqa: PT018
        if "_blocks/" in path or "individual_token_refiner/" in path:
            assert rule_for(path, size)[0] is None, path


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="No sharding rule for new_layer/kernel"):
        rule_for("new_layer/kernel", (3, 4))


def test_the_13b_model_is_split_almost_wholly(trees):
    """On 4 x 2 devices each holds an eighth of the matrices, and nearly all parameters are in matrices."""
    mesh = AbstractMesh((1, 4, 1, 2), AXES)
    held = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), trees["dit"], param_shardings(trees["dit"], mesh)
    )
    assert sum(jax.tree.leaves(held)) < 1.01 * sum(leaf.size for leaf in jax.tree.leaves(trees["dit"])) / 8


def test_activations_are_split_over_axes_of_the_mesh_and_one_that_has_no_rule_is_an_error():
    for name, axes in ACTIVATION_RULES.items():
        assert set(axes) <= set(AXES), name
    assert spec("samples", "image tokens", "heads") == PartitionSpec(("data", "fsdp"), "sequence", "tensor")
    assert spec(None, "text tokens") == PartitionSpec(None, ())
    with pytest.raises(KeyError, match="image token"):
        spec("samples", "image token")


def test_every_rule_of_activations_is_used():
    source = "\n".join(path.read_text() for path in (ROOT / "hunyuan_jax").rglob("*.py") if path.name != "sharding.py")
    placing = source + (ROOT / "hunyuan_jax/parallel/sharding.py").read_text().split("def batch_sharding")[1]
    for name in ACTIVATION_RULES:
        assert f'"{name.removesuffix(" between products")}"' in placing, name


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        ({"data": 2}, "data=2, fsdp=4, sequence=1, tensor=1"),
        ({"data": 3, "fsdp": -1}, "data=4, fsdp=2, sequence=1, tensor=1"),
        ({"data": -1, "fsdp": -1}, "data=1, fsdp=8, sequence=1, tensor=1"),
        ({"fsdp": 0}, "data=1, fsdp=8, sequence=1, tensor=1"),
        ({"tensor": 16}, "data=1, fsdp=1, sequence=1, tensor=8"),
        ({"data": 1, "sequence": 4, "tensor": 3}, "data=1, fsdp=1, sequence=4, tensor=2"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_and_the_nearest_named(config, nearest):
    with pytest.raises(UserError, match=f"does not fit 8 devices.*The nearest that does is {nearest}"):
        make_mesh(MeshConfig(**config), devices=8 * jax.devices()[:1])


SHARDED_FORWARD = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from hunyuan_jax.models.critics import DiscriminatorConfig, init_discriminator
from hunyuan_jax.models.dit import DiT, DiTConfig
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings

config = DiTConfig(width=32, num_heads=2, num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1, text_dim=12, pooled_dim=6,
                   in_channels=4, out_channels=4, rope_axes=(4, 6, 6))
rng = np.random.default_rng(0)
inputs = [rng.normal(size=(4, 2, 4, 6, 4)), rng.uniform(size=4)]
inputs += [rng.normal(size=(4, 5, 12)), np.ones((4, 5), bool), rng.normal(size=(4, 6))]
inputs = [x if x.dtype == bool else x.astype(np.float32) for x in inputs]
shapes = jax.eval_shape(lambda *x: DiT(config).init(jax.random.key(0), *x)["params"], *inputs)
params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
apply = lambda params, *x: DiT(config).apply({"params": params}, *x)
whole = np.asarray(jax.jit(apply)(params, *inputs))
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
shardings = param_shardings(shapes, mesh)
placed = jax.device_put(params, shardings)
kernel = placed["double_blocks"]["img_attn_qkv"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (1, 16, 48), kernel.sharding
with jax.set_mesh(mesh):
    out = jax.jit(apply)(placed, *[jax.device_put(x, batch_sharding(mesh)) for x in inputs])
assert len(out.sharding.device_set) == 8
error = np.abs(np.asarray(out) - whole).max() / np.abs(whole).max()
assert error <= 1e-5, error
print("equal")
"""


def test_a_sharded_forward_pass_is_the_unsharded_one():
    assert run_program(SHARDED_FORWARD) == "equal"


BETWEEN_PRODUCTS = """
import jax, jax.numpy as jnp, re
jax.config.update("jax_num_cpu_devices", 4)
from hunyuan_jax.models.dit import DiT, DiTConfig
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings

config = DiTConfig(width=32, num_heads=2, num_double_blocks=0, num_single_blocks=5, num_refiner_blocks=0, text_dim=12, pooled_dim=6,
                   in_channels=4, out_channels=4, rope_axes=(4, 6, 6), remat="full")
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
laid = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
inputs = [laid((4, 2, 4, 12, 4)), laid((4,)), laid((4, 8, 12)), laid((4, 8), bool), laid((4, 6))]
model = DiT(config)
shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x)["params"], *inputs)
params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, param_shardings(shapes, mesh))
loss = lambda params, *x: jnp.sum(model.apply({"params": params}, *x) ** 2)
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss)).lower(params, *inputs).compile().as_text()
print(*sorted(set(re.findall(r"f32\\[5,(\\d+,\\d+),32\\]", text))))
"""


def test_tokens_are_split_over_the_tensor_axis_between_products():
    """What five blocks take, of two samples on two devices: 24 + 8 tokens each, of which a device keeps half."""
    assert run_program(BETWEEN_PRODUCTS) == "2,16"


SPLIT_ROWS = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.models.critics import DiscriminatorConfig
from hunyuan_jax.models.vae import VAEConfig, abstract_params
from hunyuan_jax.models.vae_tiling import Tiling
from hunyuan_jax.optimizer import OptimizerConfig
from hunyuan_jax.hlo import Program
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, param_shardings, path_of
from hunyuan_jax.tasks import VAETask
from hunyuan_jax.tasks.critic import CriticConfig
from hunyuan_jax.tasks.vae import VAELossConfig

model = VAEConfig(latent_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, spatial_compression=2,
                  temporal_compression=2)
judge = DiscriminatorConfig(widths=(4, 4), time_halvings=1, power_steps=1)
critic = CriticConfig(model=judge, optimizer=OptimizerConfig(learning_rate=1.0))
task = VAETask(model, VAELossConfig(), critic=critic, tiling=Tiling(tile=(4, 16, 8), overlap=(0, 0, 0)))
rng = np.random.default_rng(0)
frames = rng.uniform(-1, 1, (2, 3, 32, 8, 3)).astype(np.float32)
shapes = abstract_params(model), jax.eval_shape(task.init_critic, jax.random.key(0))
params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)

def step(params, frames):
    batch = VideoBatch(sample_id=jnp.arange(2, dtype=jnp.uint32), frames=frames, tiled=TILED)
    found = task.gradients(*params, batch, key=jax.random.key(1), step=jnp.asarray(1))
    drawn, _ = task.draw(params[0], batch, jax.random.key(1))
    return {"model": found.model, "critic": found.critic, "losses": [found.loss, found.critic_loss]}, drawn

def run(mesh):
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh)), jax.device_put(frames, batch_sharding(mesh))
        compiled = jax.jit(step).lower(*placed).compile()
        return *compiled(*placed), Program(compiled.as_text()).exchanges(mesh.shape)

whole, *_ = run(make_mesh(MeshConfig(), jax.devices()[:1]))
split, drawn, exchanges = run(make_mesh(MeshConfig(**MESH), jax.devices()[: MESH["tensor"] * 4]))
assert drawn.addressable_shards[0].data.shape == (1, 3, 16, 8, 3), drawn.sharding
for part in whole:
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[part]))
    for (path, one), four in zip(jax.tree_util.tree_leaves_with_path(whole[part]), jax.tree.leaves(split[part]), strict=True):
        error, size = np.abs(np.asarray(four) - np.asarray(one)).max(), np.abs(one).max()
        # The second term: some biases have no gradient but rounding.
        assert error <= 3e-4 * size + 3e-5 * largest, (part, path_of(path), error, size, largest)
of_rows = [e for e in exchanges if e.axes == ("sequence",)]
print(max(e.sent for e in of_rows if e.kind == "collective-permute"), max(e.sent for e in of_rows if e.kind == "all-gather"))
"""
ROWS_SPLIT = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 1}


@pytest.mark.parametrize(("tiled", "mesh"), [(False, ROWS_SPLIT), (True, ROWS_SPLIT), (False, {**ROWS_SPLIT, "tensor": 2})])
def test_a_vae_and_its_critic_learn_the_same_from_clips_whose_rows_are_split(tiled, mesh):
    """And of frames in whole, devices send each other but the rows at their borders, and in the middle the keys and values.

    At most two rows of 3 frames and 8 columns before the critic, in 4 widths; keys and values of 2 frames, 8 x 4 positions, 8 widths.
    """
    permuted, gathered = map(float, run_program(SPLIT_ROWS.replace("TILED", str(tiled)).replace("MESH", str(mesh))).split())
    if not tiled:
        assert 0 < permuted <= 4 * 2 * (3 * 8 * 4)
        assert 0 < gathered <= 4 * (2 * 8 * 4 * 8)


FRAMES_APART = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from hunyuan_jax.hlo import Program
from hunyuan_jax.models.critics import lpips_of_clips, lpips_shapes
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import split_rows

rng = np.random.default_rng(0)
weights = jax.tree.map(lambda leaf: np.abs(0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), lpips_shapes())
clips = rng.uniform(-1, 1, (2, 2, 5, 32, 16, 3)).astype(np.float32)
keys = jax.random.split(jax.random.key(0), 2)
judge = lambda a, b, weights: jnp.sum(lpips_of_clips(weights, split_rows(a), split_rows(b), keys=keys, frames=FRAMES))
found, exchanges = [], []
for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(fsdp=2, sequence=2))):
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(judge)).lower(*clips, weights).compile()
        found.append(jax.tree.map(np.asarray, compiled(*clips, weights)))
        exchanges = Program(compiled.as_text()).exchanges(mesh.shape)
for one, four in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(four, one, atol=2e-5 * np.abs(one).max())
print(*(e.kind for e in exchanges if e.axes == ("sequence",) and e.sent > 100))  # smaller are those of the keys
"""


def test_frames_are_judged_each_on_one_device_where_they_divide():
    """Two clips' frames there and one's gradient back are all that travels then; else there is something at each of 13 convolutions."""
    apart, in_rows = (run_program(FRAMES_APART.replace("FRAMES", str(frames))).split() for frames in (2, 3))
    assert apart == 3 * ["all-to-all"]
    assert len(in_rows) > 13


def test_rows_that_do_not_divide_are_refused():
    with jax.set_mesh(make_mesh(MeshConfig(sequence=4), devices=4 * jax.devices()[:1])), pytest.raises(UserError, match="sequence=4"):
        split_rows(jnp.zeros((1, 1, 6, 4, 3)))
