"""Parity of every part of the DiT with its counterpart in diffusers: random weights everywhere, float32, on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers.models.embeddings import apply_rotary_emb  # noqa: E402
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm  # noqa: E402
from flax import linen as nn  # noqa: E402

from hunyuan_jax.models.dit import (  # noqa: E402
    Conditions,
    DiT,
    DiTConfig,
    DoubleBlock,
    FinalLayer,
    PatchEmbed,
    RefinerBlock,
    SingleBlock,
    TokenRefiner,
    joint_conditions,
    valid_first,
)
from hunyuan_jax.models.layers import RMSNorm, apply_rope, rope_table, sinusoid  # noqa: E402
from tests.diffusers_dit import diffusers_dit, our_params  # noqa: E402
from tests.test_dit_parity import SMALL, difference  # noqa: E402

B, S = 3, 9
GRID = (3, 2, 5)  # frames, rows, columns of tokens
L = 3 * 2 * 5
TEXT_LENGTHS = np.array([9, 1, 4])
TEXT_MASK = np.arange(S) < TEXT_LENGTHS[:, None]
TIMES = np.array([0.0371, 0.5, 1.0], np.float32)
LARGEST_ERROR = 1e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def first_layer(params: dict) -> dict:
    return jax.tree.map(lambda leaf: leaf[0], params)


@pytest.fixture(scope="module", params=[None, "token_replace"])
def pair(request) -> tuple[DiTConfig, torch.nn.Module, dict]:
    """A config, a diffusers model with or without tokens of a clean first frame, and its weights as our params."""
    config = dataclasses.replace(SMALL, guidance_embed=True, num_double_blocks=1, num_single_blocks=1)
    model = diffusers_dit(config, image_condition=request.param).requires_grad_(False)
    return config, model, our_params({name: x.numpy() for name, x in model.state_dict().items()}, config)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in arrays]


def test_sinusoid_equals_diffusers(pair):
    _, model, _ = pair
    t = np.array([0.0, 37.1, 500.0, 999.0, 6000.0], np.float32)
    assert difference(sinusoid(jnp.asarray(t)), model.time_text_embed.time_proj(torch.from_numpy(t))) < LARGEST_ERROR


def test_patch_embedding_equals_diffusers(pair):
    config, model, params = pair
    latents = normal(B, 3, 4, 10, config.in_channels)
    theirs = model.x_embedder(torch.from_numpy(latents).permute(0, 4, 1, 2, 3))
    assert difference(PatchEmbed(config).apply({"params": params["img_in"]}, latents), theirs) < LARGEST_ERROR


class ConditionEmbedding(DiT):
    """The part of the DiT that turns time, pooled text and guidance into vectors, by itself."""

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.modulation_vectors(*args, **kwargs)


def test_condition_embedding_equals_diffusers(pair):
    config, model, params = pair
    pooled, guidance = normal(B, config.pooled_dim), np.array([6.0, 1.0, 3.5], np.float32)
    t, p, g = tensors(TIMES, pooled, guidance)
    theirs = [x for x in model.time_text_embed(1000 * t, p, 1000 * g) if x is not None]
    arguments = (sinusoid(1000 * TIMES), pooled, guidance)
    ours = ConditionEmbedding(config).apply({"params": params}, *arguments, with_clean=len(theirs) == 2)
    assert ours.shape[1] == len(theirs)
    for segment, other in enumerate(theirs):
        assert difference(ours[:, segment], other) < LARGEST_ERROR


def test_refiner_blocks_equal_diffusers_at_valid_tokens(pair):
    config, model, params = pair
    txt, vec = normal(B, S, config.width), normal(B, config.width, seed=1)
    theirs = model.context_embedder.token_refiner(*tensors(txt, vec, TEXT_MASK))
    ours = txt
    for layer in range(config.num_refiner_blocks):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["txt_in"]["individual_token_refiner"])
        ours, _ = RefinerBlock(config).apply({"params": weights}, ours, vec, TEXT_LENGTHS)
    assert difference(np.asarray(ours)[TEXT_MASK], theirs.numpy()[TEXT_MASK]) < LARGEST_ERROR


def test_one_refiner_block_equals_diffusers(pair):
    config, model, params = pair
    txt, vec = normal(B, S, config.width), normal(B, config.width, seed=1)
    mask = torch.from_numpy(TEXT_MASK)[:, None, None, :]
    theirs = model.context_embedder.token_refiner.refiner_blocks[0](*tensors(txt, vec), mask)
    weights = first_layer(params["txt_in"]["individual_token_refiner"])
    ours, _ = RefinerBlock(config).apply({"params": weights}, txt, vec, TEXT_LENGTHS)
    assert difference(ours, theirs) < LARGEST_ERROR


def test_token_refiner_equals_diffusers_at_valid_tokens(pair):
    config, model, params = pair
    txt = normal(B, S, config.text_dim)
    x, t, mask = tensors(txt, TIMES, TEXT_MASK)
    theirs = model.context_embedder(x, 1000 * t, mask).numpy()
    ours = TokenRefiner(config).apply({"params": params["txt_in"]}, valid_first(txt, TEXT_MASK)[0], sinusoid(1000 * TIMES), TEXT_LENGTHS)
    for mine, other, length in zip(ours, theirs, TEXT_LENGTHS, strict=True):
        assert difference(mine[:length], other[:length]) < LARGEST_ERROR


def their_rope(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    t, y, x = GRID
    return model.rope(torch.zeros(1, 16, t, 2 * y, 2 * x))


def test_rope_table_equals_diffusers(pair):
    config, model, _ = pair
    cos, sin = their_rope(model)
    rope = rope_table(GRID, config.rope_axes, config.rope_theta)
    # Theirs repeats the angle of a pair for both of its channels.
    assert difference(np.repeat(rope.cos, 2, axis=1), cos) < LARGEST_ERROR
    assert difference(np.repeat(rope.sin, 2, axis=1), sin) < LARGEST_ERROR


def test_rope_turns_as_diffusers_does(pair):
    config, model, _ = pair
    q = normal(B, L, config.num_heads, config.head_dim)
    theirs = apply_rotary_emb(torch.from_numpy(q), their_rope(model), sequence_dim=1)
    assert difference(apply_rope(q, rope_table(GRID, config.rope_axes, config.rope_theta)), theirs) < LARGEST_ERROR


def test_rms_norm_equals_diffusers():
    x, scale = 3 * normal(B, L, 4, 24), normal(24, seed=1)
    norm = DiffusersRMSNorm(24, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(scale))
    assert difference(RMSNorm().apply({"params": {"scale": scale}}, x), norm(torch.from_numpy(x))) < LARGEST_ERROR


def block_inputs(config: DiTConfig, model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray, Conditions, tuple]:
    """Both streams, what our block is told besides, and what theirs is told: the first frame is clean where the model knows such."""
    img, txt = normal(B, L, config.width), normal(B, S, config.width, seed=1)
    vec, clean_vec = normal(2, B, config.width, seed=2)
    replaces = model.config.image_condition_type == "token_replace"
    conditions = joint_conditions(
        config,
        GRID,
        jnp.stack([vec, clean_vec], axis=1) if replaces else vec[:, None],
        jnp.asarray(TEXT_LENGTHS),
        num_txt=S,
        clean_frames=jnp.ones(B, jnp.int32) if replaces else None,
    )
    mask = torch.from_numpy(np.arange(L + S) < L + TEXT_LENGTHS[:, None])[:, None, None, :]
    told = (torch.from_numpy(vec), mask, their_rope(model), torch.from_numpy(clean_vec), GRID[1] * GRID[2])
    return img, txt, conditions, told


def test_double_block_equals_diffusers(pair):
    config, model, params = pair
    img, txt, conditions, told = block_inputs(config, model)
    their_img, their_txt = model.transformer_blocks[0](*tensors(img, txt), *told)
    (our_img, our_txt), _ = DoubleBlock(config).apply({"params": first_layer(params["double_blocks"])}, (img, txt), conditions)
    assert difference(our_img, their_img) < LARGEST_ERROR
    assert difference(our_txt, their_txt) < LARGEST_ERROR


def test_single_block_equals_diffusers(pair):
    config, model, params = pair
    img, txt, conditions, told = block_inputs(config, model)
    theirs = torch.cat(model.single_transformer_blocks[0](*tensors(img, txt), *told), dim=1)
    joint = np.concatenate([img, txt], axis=1)
    (ours,), _ = SingleBlock(config).apply({"params": first_layer(params["single_blocks"])}, (joint,), conditions)
    assert difference(ours, theirs) < LARGEST_ERROR


def test_final_layer_equals_diffusers(pair):
    config, model, params = pair
    img, vec = normal(B, L, config.width), normal(B, config.width, seed=1)
    x, condition = tensors(img, vec)
    theirs = model.proj_out(model.norm_out(x, condition))
    assert difference(FinalLayer(config).apply({"params": params["final_layer"]}, img, vec), theirs) < LARGEST_ERROR
