"""The diffusers HunyuanVideo transformer beside ours: a small random one, and its weights under our names.

The mapping is written from the published layout, by name; it is the tests' own, so that it can disagree with ours.
"""

import jax
import numpy as np
import torch
from diffusers import HunyuanVideoTransformer3DModel

from hunyuan_jax.models.dit import DiTConfig

# Ours -> diffusers, a fused projection being several of theirs.
EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "txt_in/t_embedder": "context_embedder.time_text_embed.timestep_embedder",
    "txt_in/c_embedder": "context_embedder.time_text_embed.text_embedder",
}
REFINER = {
    "adaLN_modulation": ["norm_out.linear"],
    "norm1": ["norm1"],
    "norm2": ["norm2"],
    "self_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "self_attn_proj": ["attn.to_out.0"],
    "mlp/fc1": ["ff.net.0.proj"],
    "mlp/fc2": ["ff.net.2"],
}
DOUBLE = {
    "img_mod/linear": ["norm1.linear"],
    "txt_mod/linear": ["norm1_context.linear"],
    "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn_q_norm": ["attn.norm_q"],
    "img_attn_k_norm": ["attn.norm_k"],
    "txt_attn_q_norm": ["attn.norm_added_q"],
    "txt_attn_k_norm": ["attn.norm_added_k"],
    "img_attn_proj": ["attn.to_out.0"],
    "txt_attn_proj": ["attn.to_add_out"],
    "img_mlp/fc1": ["ff.net.0.proj"],
    "img_mlp/fc2": ["ff.net.2"],
    "txt_mlp/fc1": ["ff_context.net.0.proj"],
    "txt_mlp/fc2": ["ff_context.net.2"],
}
SINGLE = {
    "modulation/linear": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "q_norm": ["attn.norm_q"],
    "k_norm": ["attn.norm_k"],
}


def diffusers_dit(config: DiTConfig, *, seed: int = 0, image_condition: str | None = None) -> HunyuanVideoTransformer3DModel:
    """A diffusers model of this config in which every parameter is random, those that start at 0 or 1 included."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.num_double_blocks,
        num_single_layers=config.num_single_blocks,
        num_refiner_layers=config.num_refiner_blocks,
        mlp_ratio=config.mlp_ratio,
        patch_size=config.patch_size[1],
        patch_size_t=config.patch_size[0],
        guidance_embeds=config.guidance_embed,
        text_embed_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        rope_theta=config.rope_theta,
        rope_axes_dim=config.rope_axes,
        image_condition_type=image_condition,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def swapped(values: np.ndarray) -> np.ndarray:
    """diffusers' final modulation holds [scale, shift], ours [shift, scale]."""
    scale, shift = np.split(values, 2, axis=-1)
    return np.concatenate([shift, scale], axis=-1)


def fused(tensors: dict[str, np.ndarray], sources: list[str]) -> dict[str, np.ndarray]:
    """One linear layer or norm of ours from one or several of theirs; removes what it takes."""
    weight = np.concatenate([tensors.pop(f"{source}.weight") for source in sources])
    ours = {"kernel": weight.T} if weight.ndim == 2 else {"scale": weight}
    if f"{sources[0]}.bias" in tensors:
        ours["bias"] = np.concatenate([tensors.pop(f"{source}.bias") for source in sources])
    return ours


def stacked(tensors: dict[str, np.ndarray], table: dict[str, list[str]], prefix: str, length: int) -> dict[str, dict]:
    """Blocks of a kind under our names, with a leading layer axis."""
    blocks: dict[str, dict] = {}
    for ours, theirs in table.items():
        layers = [fused(tensors, [f"{prefix}.{i}.{name}" for name in theirs]) for i in range(length)]
        place(blocks, ours, jax.tree.map(lambda *leaves: np.stack(leaves), *layers))
    return blocks


def place(tree: dict, path: str, value: dict) -> None:
    """Puts `value` at a slash-separated path of a nested dict."""
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def our_params(tensors: dict[str, np.ndarray], config: DiTConfig) -> dict:
    """A diffusers state (or anything linear in it, such as its gradient) as our params; every tensor must find a place."""
    tensors = dict(tensors)
    params: dict = {}
    patches = tensors.pop("x_embedder.proj.weight")
    params["img_in"] = {"proj": {"kernel": patches.reshape(len(patches), -1).T, "bias": tensors.pop("x_embedder.proj.bias")}}
    for ours, theirs in EMBEDDERS.items():
        if f"{theirs}.linear_1.weight" in tensors:
            layers = {"in_layer": fused(tensors, [f"{theirs}.linear_1"]), "out_layer": fused(tensors, [f"{theirs}.linear_2"])}
            place(params, ours, layers)
    params["txt_in"]["input_embedder"] = fused(tensors, ["context_embedder.proj_in"])
    refiner = stacked(tensors, REFINER, "context_embedder.token_refiner.refiner_blocks", config.num_refiner_blocks)
    params["txt_in"]["individual_token_refiner"] = refiner
    params["double_blocks"] = stacked(tensors, DOUBLE, "transformer_blocks", config.num_double_blocks)
    params["single_blocks"] = stacked(tensors, SINGLE, "single_transformer_blocks", config.num_single_blocks)
    params["final_layer"] = {
        "adaLN_modulation": jax.tree.map(swapped, fused(tensors, ["norm_out.linear"])),
        "linear": fused(tensors, ["proj_out"]),
    }
    if tensors:
        raise AssertionError(f"No place for {sorted(tensors)}.")
    return params
