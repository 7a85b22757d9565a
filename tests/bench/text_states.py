"""Text states per second: of the full-size encoders by arithmetic, and of a small language model measured beside PyTorch's.

    python -m tests.bench.text_states [--tokens 351] [--batch 8] [--repeats 5] [--utilisation 0.4] [--device cpu|gpu]

The first table counts the products of llava-llama-3-8b's 30 layers and of CLIP-L, by XLA's own account of the lowered programs (nothing
is compiled or allocated), and divides a device's peak by them at an assumed utilisation. The second runs one language model here and in
transformers, the same weights and tokens: float32 with 2 threads on a CPU, bfloat16 on a GPU; best and median of `--repeats`.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from hunyuan_jax.chips import chip_named
from hunyuan_jax.models.text_encoders import CLIPText, CLIPTextConfig, TextTower, TextTowerConfig, abstract_params
from hunyuan_jax.text_weights import released_name

SMALL = {"vocab_size": 4096, "width": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "mlp_width": 1792}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.text_states", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=351, help="of a prompt with its template; the released most")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed share of a device's peak")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    return parser.parse_args()


def flops(module: Any, config: Any, *inputs: jax.ShapeDtypeStruct) -> float:
    lowered = jax.jit(lambda params, *x: module(config).apply({"params": params}, *x)).lower(abstract_params(config), *inputs)
    return float(lowered.cost_analysis()["flops"])


def full_size(tokens: int, utilisation: float) -> None:
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    tower = flops(TextTower, TextTowerConfig(dtype="bfloat16"), ids, jax.ShapeDtypeStruct((1, tokens), jnp.bool_))
    clip = flops(CLIPText, CLIPTextConfig(dtype="bfloat16"), jax.ShapeDtypeStruct((1, 77), jnp.int32))
    print(f"A prompt of {tokens} tokens: {tower / 1e12:.2f} TFLOP in the language model, {clip / 1e12:.3f} in CLIP\n")
    print(f"| device | peak | prompts per second at {utilisation:.0%} |\n|---|---|---|")
    for name in ("v5e", "v5p", "v6e", "a100", "h100"):
        peak = chip_named(name).flops
        print(f"| {name} | {peak / 1e12:.0f} TFLOP/s | {utilisation * peak / (tower + clip):.1f} |")


def measured(tokens: int, batch: int, repeats: int, device: str) -> None:
    dtype, place = ("float32", "cpu") if device == "cpu" else ("bfloat16", "cuda")
    config = TextTowerConfig(**SMALL, dtype=dtype)
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.width, "num_attention_heads": config.num_heads}
    theirs = transformers.LlamaModel(
        transformers.LlamaConfig(
            **sizes,
            num_hidden_layers=config.layers_run,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.mlp_width,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
        )
    ).eval()
    weights = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}

    def ours(path: Any, leaf: Any) -> jax.Array:
        name = "/".join(key.key for key in path)
        value = weights[released_name(name, config)]
        return jnp.asarray(value.T if name.endswith("/kernel") else value, dtype)

    params = jax.tree_util.tree_map_with_path(ours, abstract_params(config))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, config.vocab_size, (batch, tokens)), np.ones((batch, tokens), bool)
    run = jax.jit(lambda params, ids: TextTower(config).apply({"params": params}, ids, mask))
    theirs = theirs.to(place, getattr(torch, dtype))
    torch_ids = torch.from_numpy(ids).to(place)

    def run_theirs() -> np.ndarray:
        with torch.no_grad():
            return theirs(torch_ids, output_hidden_states=True).hidden_states[-2].float().cpu().numpy()

    # Their states before the last layer, which transformers norms, are ours one layer earlier.
    earlier = TextTowerConfig(**SMALL, skip_layers=config.skip_layers + 1, dtype=dtype)
    before = TextTower(earlier).apply({"params": {k: v for k, v in params.items() if k != f"layers_{config.layers_run - 1}"}}, ids, mask)
    error = np.abs(np.asarray(before, np.float32) - run_theirs()).max() / np.abs(run_theirs()).max()
    assert error <= (1e-5 if dtype == "float32" else 0.05), error
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    run(params, ids).block_until_ready()
    for _ in range(repeats):
        for name, call in (("ours", lambda: run(params, ids).block_until_ready()), ("theirs", run_theirs)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    print(f"\n{config.layers_run} layers of width {config.width}, {batch} prompts of {tokens} tokens, {dtype} on {place}:")
    print("| | prompts per second, best / median |\n|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {batch / min(times):.2f} / {batch / statistics.median(times):.2f} |")
    print(f"| ratio | {min(seconds['theirs']) / min(seconds['ours']):.2f} |")


def main() -> None:
    args = parse()
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        torch.set_num_threads(2)
    full_size(args.tokens, args.utilisation)
    measured(args.tokens, args.batch, args.repeats, args.device)


if __name__ == "__main__":
    main()
