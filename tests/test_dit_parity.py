"""Parity of the whole DiT with diffusers' HunyuanVideo transformer: random weights everywhere, float32, on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hunyuan_jax.models.dit import DiT, DiTConfig  # noqa: E402
from tests.diffusers_dit import diffusers_dit, our_params  # noqa: E402

SMALL = DiTConfig(
    width=96,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=3,
    text_dim=40,
    pooled_dim=20,
    rope_axes=(4, 10, 10),
)
VARIANTS = {
    "plain": (SMALL, None),
    "guidance": (dataclasses.replace(SMALL, guidance_embed=True), None),
    "latent_concat": (dataclasses.replace(SMALL, in_channels=33), "latent_concat"),
    "token_replace": (dataclasses.replace(SMALL, guidance_embed=True), "token_replace"),
    "narrow_mlp": (dataclasses.replace(SMALL, mlp_ratio=2.5, num_refiner_blocks=1, num_double_blocks=1, num_single_blocks=1), None),
}
TEXT_LENGTHS = np.array([11, 1, 6])


def inputs(config: DiTConfig, *, size: tuple[int, int, int] = (5, 6, 14)) -> dict[str, np.ndarray]:
    """Three samples of 5 x 6 x 14 latents (token grid 5 x 3 x 7) with texts of different lengths and random padding."""
    rng = np.random.default_rng(0)
    batch = len(TEXT_LENGTHS)
    arrays = {
        "latents": rng.normal(size=(batch, *size, config.in_channels)),
        "t": np.array([0.0371, 0.5, 1.0]),
        "txt": rng.normal(size=(batch, 11, config.text_dim)),
        "pooled": rng.normal(size=(batch, config.pooled_dim)),
    }
    if config.guidance_embed:
        arrays["guidance"] = np.array([6.0, 1.0, 3.5])
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {"txt_mask": np.arange(11) < TEXT_LENGTHS[:, None]}


def reference(model: torch.nn.Module, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """diffusers' velocity, channels last; it wants time and guidance in thousandths."""
    velocity = model(
        hidden_states=x["latents"].permute(0, 4, 1, 2, 3),
        timestep=1000 * x["t"],
        encoder_hidden_states=x["txt"],
        encoder_attention_mask=x["txt_mask"],
        pooled_projections=x["pooled"],
        guidance=1000 * x["guidance"] if "guidance" in x else None,
    ).sample
    return velocity.permute(0, 2, 3, 4, 1)


def difference(ours, theirs) -> float:
    """Norm of the difference over norm of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def converted(model: torch.nn.Module, config: DiTConfig) -> dict:
    params = our_params({name: x.detach().numpy() for name, x in model.state_dict().items()}, config)
    expected = jax.eval_shape(lambda: DiT(config).init(jax.random.key(0), **inputs(config)))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    return params


def clean_frames(image_condition: str | None) -> dict[str, jax.Array]:
    """The first frame of every sample is given where the variant replaces its tokens."""
    return {"clean_frames": jnp.ones(len(TEXT_LENGTHS), jnp.int32)} if image_condition == "token_replace" else {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_equals_diffusers(variant):
    config, image_condition = VARIANTS[variant]
    model = diffusers_dit(config, image_condition=image_condition)
    params, clean = converted(model, config), clean_frames(image_condition)
    for size in ((5, 6, 14), (3, 5, 7)):
        arrays = inputs(config, size=size)
        # Theirs takes whole patches only: odd rows and columns are padded as ours are, and the velocity cropped.
        ends = [(0, 0), (0, 0), (0, size[1] % 2), (0, size[2] % 2), (0, 0)]
        padded = arrays | {"latents": np.pad(arrays["latents"], ends, mode="edge")}
        with torch.no_grad():
            theirs = reference(model, {name: torch.from_numpy(x) for name, x in padded.items()})[:, :, : size[1], : size[2]]
        ours = jax.jit(DiT(config).apply)({"params": params}, **arrays, **clean)
        assert ours.shape == theirs.shape
        assert difference(ours, theirs) < 1e-5
        # Sample by sample a little wider: the last bit of torch's exp in one time frequency turns an angle by 2e-4 at 6000.
        for mine, other in zip(ours, theirs, strict=True):
            assert difference(mine, other) < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_parameters_and_inputs_equal_diffusers(variant):
    config, image_condition = VARIANTS[variant]
    model = diffusers_dit(config, image_condition=image_condition)
    arrays, clean = inputs(config), clean_frames(image_condition)
    target = np.random.default_rng(1).normal(size=(*arrays["latents"].shape[:-1], config.out_channels)).astype(np.float32)

    differentiable = [name for name in arrays if name != "txt_mask"]
    tensors = {name: torch.from_numpy(x).requires_grad_(name in differentiable) for name, x in arrays.items()}
    torch.mean((reference(model, tensors) - torch.from_numpy(target)) ** 2).backward()
    their_params = our_params({name: x.grad.numpy() for name, x in model.named_parameters()}, config)

    @jax.jit
    def gradients(params, chosen):
        def loss(params, chosen):
            return jnp.mean((DiT(config).apply({"params": params}, **{**arrays, **chosen}, **clean) - target) ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, chosen)

    our_grads, our_inputs = gradients(converted(model, config), {name: arrays[name] for name in differentiable})
    whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(their_params)))
    for path, theirs in jax.tree.leaves_with_path(their_params):
        ours = our_grads
        for key in path:
            ours = ours[key.key]
        # A key's bias shifts all scores of a query alike, so some true gradients are 0: the floor is a share of the whole.
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs) + 1e-8 * whole, jax.tree_util.keystr(path)
    for name in differentiable:
        assert difference(our_inputs[name], tensors[name].grad) < 1e-4
