"""Laws of the layouts: the released names and shapes to the last one, and every row of every tensor in exactly one place."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from hunyuan_jax.models.dit import RELEASED, DiTConfig
from hunyuan_jax.models.layouts import LAYOUTS, places, table
from hunyuan_jax.models.vae import VAEConfig

KEYS = Path(__file__).resolve().parents[2] / "shared" / "keys"
TINY = DiTConfig(
    width=16, num_heads=2, num_double_blocks=2, num_single_blocks=3, text_dim=6, pooled_dim=5, rope_axes=(2, 2, 4), patch_size=(1, 2, 2)
)
TINY_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)


def shapes(layout, config):
    return {name: (part.num_rows, *places(config)[part.tensor].shape[1:]) for name, part in table(layout, config).items()}


@pytest.mark.skipif(not KEYS.exists(), reason=f"The lists of released tensor names are not beside this checkout ({KEYS}).")
@pytest.mark.parametrize(
    ("layout", "config", "file"),
    [
        ("tencent", RELEASED, "keys_dit_official.tsv"),
        ("diffusers", RELEASED, "keys_dit_diffusers.tsv"),
        ("tencent", VAEConfig(), "keys_vae.tsv"),
        ("diffusers", VAEConfig(), "keys_vae.tsv"),
    ],
)
def test_names_and_shapes_are_the_released_ones(layout, config, file):
    lines = [line.split("\t") for line in (KEYS / file).read_text().splitlines() if line.strip()]
    assert shapes(layout, config) == {name: tuple(int(n) for n in shape.strip("[]").split(",")) for name, shape in lines}


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 12_821_012_544),
        ({"guidance_embed": False}, 12_810_782_784),
        ({"guidance_embed": False, "in_channels": 33}, 12_810_991_680),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_size_has_the_released_number_of_parameters(layout, changes, parameters):
    assert sum(map(math.prod, shapes(layout, dataclasses.replace(RELEASED, **changes)).values())) == parameters


@pytest.mark.parametrize(
    "config", [TINY, dataclasses.replace(TINY, num_refiner_blocks=0, num_double_blocks=0), TINY_VAE], ids=["dit", "few", "vae"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_in_exactly_one_place(layout, config):
    rows = {tensor: np.zeros(place.shape[0], int) for tensor, place in places(config).items()}
    for part in table(layout, config).values():
        for start, stop in part.rows:
            rows[part.tensor][start:stop] += 1
    assert all((count == 1).all() for count in rows.values())
    assert len(table(layout, config)) == sum(1 for _ in table(layout, config).values())


@pytest.mark.parametrize("config", [TINY, TINY_VAE], ids=["dit", "vae"])
def test_ours_and_pytorchs_order_of_axes_are_inverse(config):
    rng = np.random.default_rng(0)
    for place in places(config).values():
        value = rng.standard_normal(place.native_shape)
        assert place.to_torch(value).shape == place.shape
        np.testing.assert_array_equal(place.from_torch(place.to_torch(value)), value)


def test_comfyuis_names_are_its_own():
    names = table("comfyui", RELEASED)
    for name in (
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "double_blocks.19.txt_attn.qkv.weight",
        "double_blocks.3.txt_mod.lin.bias",
        "double_blocks.3.img_mlp.2.weight",
        "single_blocks.39.norm.key_norm.scale",
        "single_blocks.39.modulation.lin.weight",
        "single_blocks.0.linear1.weight",
        "txt_in.individual_token_refiner.blocks.1.self_attn.proj.bias",
        "txt_in.individual_token_refiner.blocks.0.mlp.0.weight",
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight",
        "txt_in.t_embedder.out_layer.weight",
        "txt_in.c_embedder.in_layer.weight",
        "time_in.in_layer.bias",
        "guidance_in.out_layer.weight",
        "vector_in.in_layer.weight",
        "final_layer.adaLN_modulation.1.weight",
    ):
        assert name in names
