"""Weights in and out: from every layout they are kept in to every other, and to our parameters.

    python -m hunyuan_jax.convert --src PATH --dst PATH --to {native,diffusers,tencent,comfyui} [--dtype keep|fp32|bf16] [--verify]
    python -m hunyuan_jax.convert --src PATH --dst PATH --to LAYOUT --lora ADAPTER [--multiplier 0.8]    LoRA merged into weights
    python -m hunyuan_jax.convert --src ADAPTER --dst FILE --to {diffusers,musubi,diffusion-pipe,official}

    files --open_weights--> Weights: config, and released tensors that are read row by row --write--> another layout
                                                                                          \\--load--> parameters

Every tensor must be known and every parameter given, or nothing is written. What is written is safetensors, one tensor in memory
at a time. The checkpoints of a training run are read by `hunyuan_jax.export`.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from hunyuan_jax import adapters as adapter_files
from hunyuan_jax.data.dataset import write_json
from hunyuan_jax.errors import UserError, nearest, run_command
from hunyuan_jax.models import layouts, lora
from hunyuan_jax.models.dit import RELEASED, DiTConfig
from hunyuan_jax.models.layouts import LAYOUTS
from hunyuan_jax.models.lora import Adapter, Change
from hunyuan_jax.models.vae import VAEConfig
from hunyuan_jax.settings import parse_flags
from hunyuan_jax.tensor_files import write_safetensors, write_sharded
from hunyuan_jax.weights import COMPONENTS, CONFIG, LICENCE, LICENCE_KEY, Weights, diffusers_config, open_weights

DTYPES = {"keep": None, "fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
STEM = "diffusion_pytorch_model"  # of the files in a folder, as diffusers names them
VAE_WEIGHTS = f"{STEM}.safetensors"


def write(
    weights: Weights, target: Path, layout: str, *, dtype: str | np.dtype = "keep", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes weights in a layout: to one file if `target` ends with .safetensors, else into a folder.

    A folder has config.json beside the tensors, as diffusers reads it; the native layout says the same in its metadata alone.
    """
    chosen = DTYPES[dtype] if isinstance(dtype, str) else dtype
    table, places = layouts.table(layout, weights.config), layouts.places(weights.config)
    specs = {}
    for name, part in table.items():
        place = places[part.tensor]
        shape = place.native_shape if layout == "native" else (part.num_rows, *place.shape[1:])
        specs[name] = jax.ShapeDtypeStruct(shape, chosen or weights.dtype(part.tensor))
    said = _metadata(weights, metadata or {})
    tensors = _tensors(weights, layout, specs)
    if target.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(target, specs, tensors, metadata=said)
        return
    theirs = None if layout == "native" else diffusers_config(weights.config, said)  # before anything is written: not every config has one
    write_sharded(target, STEM, specs, tensors, metadata=said)
    if theirs is not None:
        write_json(target / "config.json", theirs)


def _tensors(weights: Weights, layout: str, specs: Mapping[str, Any]) -> Iterator[np.ndarray]:
    places, last, value = layouts.places(weights.config), None, np.empty(0)
    for name, part in tqdm(layouts.table(layout, weights.config).items(), desc="write", unit="tensor", dynamic_ncols=True, disable=None):
        if part.tensor != last:
            last, value = part.tensor, weights.read(part.tensor)
        runs = [value[start:stop] for start, stop in part.rows]
        out = runs[0] if len(runs) == 1 else np.concatenate(runs)
        out = places[part.tensor].from_torch(out) if layout == "native" else out
        yield out.astype(specs[name].dtype, copy=False)


def _metadata(weights: Weights, more: Mapping[str, str]) -> dict[str, str]:
    """What a reader should know: the config, and whether guidance is built in, in which case nobody may guide twice."""
    kept = {name: text for name, text in weights.metadata.items() if name not in (CONFIG, "format")}
    said = {"format": "pt", CONFIG: json.dumps(dataclasses.asdict(weights.config), sort_keys=True), **kept, **more}
    if isinstance(weights.config, DiTConfig):
        said["guidance_distilled"] = str(weights.config.guidance_embed).lower()
    return said


def verify(weights: Weights, written: Path, *, dtype: str) -> int:
    """Reads what was written and compares every bit; returns the number of tensors. Raises `UserError` at the first difference."""
    again = open_weights(written)
    for tensor in layouts.places(weights.config):
        expected, came = weights.read(tensor), again.read(tensor)
        expected = expected.astype(DTYPES[dtype] or expected.dtype, copy=False)
        if np.ascontiguousarray(expected).tobytes() != np.ascontiguousarray(came).tobytes():
            raise UserError(f"{tensor} in {written} is not what was read. Write it again; if that does not help, the disk is at fault.")
    return len(layouts.places(weights.config))


def load(path: str | Path, component: str = "transformer", *, shardings: Mapping[str, NamedSharding] | None = None) -> tuple[Any, Any]:
    """Config and float32 parameters of a component in any layout.

    With `shardings`, by parameter path, the parameters come to lie so on the mesh. Each process then reads its share of every
    tensor from the file, the devices exchange what was read, and no host holds more than a tensor at a time. Raises `UserError`
    where the weights are not whole.
    """
    if component not in COMPONENTS:
        raise UserError(f"Component {component!r} cannot be loaded. {nearest(component, list(COMPONENTS))}")
    weights = open_weights(path, component=component)
    by_path: dict[str, dict[int | None, str]] = {}
    for tensor, place in layouts.places(weights.config).items():
        by_path.setdefault(place.path, {})[place.layer] = tensor
    flat = {}
    for name, leaf in layouts.abstract_params(weights.config).items():
        tensors = by_path[name]
        flat[name] = _in_memory(weights, tensors) if shardings is None else _placed(weights, tensors, leaf.shape, shardings[name])
    return weights.config, traverse_util.unflatten_dict(flat, sep="/")


def _in_memory(weights: Weights, tensors: Mapping[int | None, str]) -> jax.Array:
    """A parameter on the default device."""
    read = lambda tensor: layouts.places(weights.config)[tensor].from_torch(weights.read(tensor)).astype(np.float32)  # noqa: E731
    return jnp.asarray(read(tensors[None]) if None in tensors else np.stack([read(tensors[layer]) for layer in range(len(tensors))]))


def _placed(weights: Weights, tensors: Mapping[int | None, str], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """A parameter on its devices, from one released tensor, or from one for each layer."""
    if None in tensors:
        return jax.jit(lambda value: value, out_shardings=sharding)(_read_apart(weights, tensors[None], sharding))
    stack = jax.jit(functools.partial(jnp.zeros, shape), out_shardings=sharding)()
    # The stack is given away at each call, so that there is one of it and not two.
    put = jax.jit(lambda stack, layer, value: stack.at[layer].set(value), out_shardings=sharding, donate_argnums=0)
    for layer in range(shape[0]):
        stack = put(stack, layer, _read_apart(weights, tensors[layer], sharding))
    return stack


def _read_apart(weights: Weights, tensor: str, near: NamedSharding) -> jax.Array:
    """A tensor as we have it, in float32, of which each device of a mesh has read a run of the file's rows, where these divide."""
    place = layouts.places(weights.config)[tensor]
    axes: tuple[str, ...] = ()
    for axis in near.mesh.axis_names:
        if place.shape[0] % math.prod(near.mesh.shape[a] for a in (*axes, axis)) == 0:
            axes = (*axes, axis)
    apart = NamedSharding(near.mesh, PartitionSpec(*(None,) * (len(place.native_shape) - 1), axes))
    read = functools.cache(lambda start, stop: place.from_torch(weights.read(tensor, start, stop)).astype(np.float32))

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[-1].indices(place.shape[0])
        return read(start, stop)

    return jax.make_array_from_callback(place.native_shape, apart, rows)


# --- Adapters --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Merged:
    """A released tensor with its adapter, merged when it is read."""

    weights: Weights
    tensor: str
    adapter: Adapter | None
    multiplier: float
    dtype: np.dtype

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        base = self.weights.read(self.tensor).astype(self.dtype, copy=False)
        return (base if self.adapter is None else lora.merged(base, self.adapter, self.multiplier))[index]

    def change(self) -> Change:
        return lora.change(self.weights.read(self.tensor).astype(self.dtype, copy=False), self.read_slice(()))


def merged_with(weights: Weights, adapters: Mapping[str, Adapter], multiplier: float, *, dtype: str = "keep") -> tuple[Weights, str]:
    """Weights with LoRA adapters in them, merged a tensor at a time, and what changed, in a sentence.

    Raises `UserError` where nothing did. A multiplier of 1 is the strength that the adapters were trained at.
    """
    stored = {
        tensor: Merged(weights, tensor, adapters.get(tensor), multiplier, DTYPES[dtype] or weights.dtype(tensor))
        for tensor in layouts.places(weights.config)
    }
    changed = lora.check_effect(adapters, {tensor: stored[tensor].change() for tensor in adapters})
    return Weights(weights.config, "tencent", stored, {**weights.metadata, "lora_multiplier": str(multiplier)}), changed


def convert_adapter(source: Path, target: Path, layout: str, *, model: Path | None) -> str:
    """Writes an adapter in another layout; returns the one it came in. `model` is what it was trained on, if not the released one."""
    if layout not in lora.LAYOUTS:
        raise UserError(f"{source} is an adapter, and adapters have the layouts {', '.join(lora.LAYOUTS)}, not {layout!r}.")
    if target.suffix != ".safetensors":
        raise UserError(f"An adapter is written to one .safetensors file, not to {target}.")
    config: Any = RELEASED if model is None else open_weights(model, component="transformer").config
    found = adapter_files.read(source, config)
    adapter_files.write(target, found.adapters, layout, config)
    return found.layout


def main(argv: list[str]) -> None:
    flags.DEFINE_string("src", None, "A file of weights or of adapters, or the folder of one component.")
    flags.DEFINE_string("dst", None, "A .safetensors file or a folder.")
    flags.DEFINE_enum("to", None, list(dict.fromkeys((*LAYOUTS, *lora.LAYOUTS))), "The layout to write.")
    flags.DEFINE_enum("dtype", "keep", sorted(DTYPES), "The type that tensors are stored in.")
    flags.DEFINE_bool("verify", False, "Read what was written and compare every bit.")
    flags.DEFINE_multi_string("ignore", [], "Pattern of tensors to leave out that no model has; may be given several times.")
    flags.DEFINE_string("key", None, "Entry of a .pt file that holds the weights, such as module or ema.")
    flags.DEFINE_string("lora", None, "A file of LoRA adapters to merge into the weights.")
    flags.DEFINE_float("multiplier", 1.0, "The strength at which --lora is merged.")
    flags.DEFINE_string("model", None, "Weights of the model that an adapter in --src is of, where that is not the released one.")
    parse_flags(argv, required=("src", "dst", "to"))
    f = flags.FLAGS
    is_run = (Path(f.src) / "model.json").exists()  # which `open_weights` knows what to say to
    if not is_run and adapter_files.holds_adapters(f.src, key=f.key):
        layout = convert_adapter(Path(f.src), Path(f.dst), f.to, model=Path(f.model) if f.model else None)
        print(f"convert: adapters in the {layout} layout; {f.dst} is written in the {f.to} layout")
        return
    if f.to not in LAYOUTS:
        raise UserError(f"{f.src} holds weights, and weights have the layouts {', '.join(LAYOUTS)}, not {f.to!r}.")
    weights = open_weights(Path(f.src), ignore=f.ignore, key=f.key)
    if LICENCE_KEY in weights.metadata:
        print(LICENCE, file=sys.stderr)
    kind = "VAE" if isinstance(weights.config, VAEConfig) else "transformer"
    print(f"convert: a {kind} in the {weights.layout} layout, {len(weights.stored)} tensors")
    if f.lora:
        if not isinstance(weights.config, DiTConfig):
            raise UserError(f"{f.src} is a {kind}; adapters are merged into transformers.")
        weights, changed = merged_with(weights, adapter_files.read(f.lora, weights.config).adapters, f.multiplier, dtype=f.dtype)
        print(f"convert: {f.lora}: {changed}")
    write(weights, Path(f.dst), f.to, dtype=f.dtype)
    done = f", {verify(weights, Path(f.dst), dtype=f.dtype)} tensors verified" if f.verify else ""
    print(f"convert: {f.dst} is written{done}")


if __name__ == "__main__":
    run_command(main)
