"""A training run's weights for inference:

python -m hunyuan_jax.export --checkpoint WORKDIR --to diffusers --output DIR [--weights ema|raw] [--dtype bf16]

Of a VAE run the VAE; of a text-to-video run transformer/, vae/ and, for diffusers, scheduler/ and model_index.json, which its
pipelines read. What was written is read back and compared, every bit, before this says that it is there.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import flags

from hunyuan_jax import convert
from hunyuan_jax.checkpoint import Kept, param_reader, read_model
from hunyuan_jax.convert import DTYPES
from hunyuan_jax.data.dataset import write_json
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.models import layouts
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.layouts import LAYOUTS, Config
from hunyuan_jax.models.vae import VAEConfig
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.weights import Weights, open_weights

TASKS: dict[str, type[Config]] = {"vae": VAEConfig, "t2v": DiTConfig}


@dataclasses.dataclass(frozen=True)
class InCheckpoint:
    """A tensor of a training run: a parameter, or one layer of it."""

    read: Callable[[], np.ndarray]
    layer: int | None
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        value = self.read()
        return (value if self.layer is None else value[self.layer])[index]


def weights_of_run(workdir: Path, config: Config, *, weights: Kept, metadata: dict[str, str]) -> tuple[Weights, int]:
    """The trained model of a run, read a parameter at a time, and the step it was trained to."""
    read, step = param_reader(workdir, weights=weights)
    read = functools.lru_cache(maxsize=1)(read)  # the layers of a stack are asked for one after another
    shapes = layouts.abstract_params(config)
    places = layouts.places(config).values()
    stored = {p.name: InCheckpoint(functools.partial(read, p.path, shapes[p.path].shape), p.layer) for p in places}
    return Weights(config, "native", stored, {"step": str(step), "weights": weights, **metadata}), step


def export(workdir: Path, output: Path, *, layout: str, weights: Kept, dtype: str) -> int:
    """Writes the models of the run in `workdir` and verifies them; returns the step they were trained to.

    Raises `UserError` where the layout has no such model.
    """
    model = read_model(workdir)
    if model.get("task") not in TASKS:
        raise UserError(f"{workdir} is a run of task {model.get('task')!r}; runs of {', '.join(TASKS)} can be exported.")
    prediction = model.get("prediction", "velocity")
    if prediction != "velocity" and layout != "native":
        raise UserError(
            f"The model in {workdir} predicts {prediction}, and whoever reads the layout {layout!r} takes its output for a velocity. "
            "Use --to native, or train with prediction='velocity'."
        )
    config: Config = build(TASKS[model["task"]], model["model"], where="model")
    trained, step = weights_of_run(workdir, config, weights=weights, metadata={"prediction": prediction} if model["task"] == "t2v" else {})
    if isinstance(config, VAEConfig):
        _write(trained, output, layout, dtype)
        return step
    _write(trained, output / "transformer", layout, dtype)
    _write(open_weights(workdir / "codec" / "vae", component="vae"), output / "vae", layout, dtype)
    if layout == "diffusers":
        (output / "scheduler").mkdir(exist_ok=True)
        write_json(output / "scheduler" / "scheduler_config.json", scheduler_config(model["sampling"]["shift"]))
        write_json(output / "model_index.json", MODEL_INDEX)
    return step


def _write(weights: Weights, target: Path, layout: str, dtype: str) -> None:
    convert.write(weights, target, layout, dtype=dtype)
    convert.verify(weights, target, dtype=dtype)


def scheduler_config(shift: float) -> dict[str, Any]:
    """diffusers' Euler steps on times shifted as ours are."""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift, "use_dynamic_shifting": False}


# The text encoders stay out (`from_pretrained(..., text_encoder=None, ...)`): prompts come as the states that the run's own codec
# makes of them, `prompt_embeds` and its like.
MODEL_INDEX = {
    "_class_name": "HunyuanVideoPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    **{name: [None, None] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")},
}


def main(argv: list[str]) -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a training run.")
    flags.DEFINE_string("output", None, "Folder for the weights.")
    flags.DEFINE_enum("to", "diffusers", LAYOUTS, "The layout to write.")
    flags.DEFINE_enum("weights", "ema", get_args(Kept), "The averaged weights, or the last ones.")
    flags.DEFINE_enum("dtype", "keep", sorted(DTYPES), "The type that tensors are stored in; the transformer is trained in fp32.")
    parse_flags(argv, required=("checkpoint", "output"))
    f = flags.FLAGS
    step = export(Path(f.checkpoint), Path(f.output), layout=f.to, weights=f.weights, dtype=f.dtype)
    print(f"export: {f.weights} weights of step {step} in {f.output}, {f.to} layout, verified")


if __name__ == "__main__":
    run_command(main)
