"""A training checkpoint as weights for inference: `python -m hunyuan_jax.export --checkpoint WORKDIR --output DIR --dtype bf16`.

Writes the averaged weights of a VAE run in the released layout (config.json and safetensors, the names of Tencent's and
diffusers' VAE), reads them back and compares every tensor before it says that they are there.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from hunyuan_jax import convert
from hunyuan_jax.checkpoint import load_params, read_model
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.models.vae import VAEConfig, abstract_params
from hunyuan_jax.settings import build, parse_flags

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export_vae(workdir: Path, output: Path, *, weights: str, dtype: str) -> int:
    """Writes the VAE of the run in `workdir` and verifies what was written; returns the step it was trained to."""
    model = read_model(workdir)
    if model.get("task") != "vae":
        raise UserError(f"{workdir} is a run of task {model.get('task')!r}; only runs of task 'vae' can be exported.")
    config = build(VAEConfig, model["model"], where="model")
    params, step = load_params(workdir, abstract_params(config), weights=weights)
    convert.save_vae(output, config, params, dtype=dtype, metadata={"step": str(step), "weights": weights})
    written = convert.load(output, component="vae")[1]
    rounded = jax.tree.map(lambda p: jnp.asarray(p, dtype).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, written, rounded)
    return step


def main(argv: list[str]) -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a training run.")
    flags.DEFINE_string("output", None, "Folder for the weights.")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "The averaged weights, or the last ones.")
    flags.DEFINE_enum("dtype", "fp32", sorted(DTYPES), "The type that tensors are stored in.")
    parse_flags(argv, required=("checkpoint", "output"))
    f = flags.FLAGS
    output = Path(str(f.output))
    step = export_vae(Path(str(f.checkpoint)), output, weights=f.weights, dtype=DTYPES[f.dtype])
    print(f"export: {f.weights} weights of step {step} in {output}, verified")


if __name__ == "__main__":
    run_command(main)
