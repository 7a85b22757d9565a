"""Low-rank adapters (LoRA) of the DiT: W + multiplier * up @ (scale * down), in every layout they are kept in.

    layout          module                                      halves                scale
    diffusers       transformer. diffusers' path                lora_A, lora_B        alpha / rank of settings or .alpha, else 1
    musubi          lora_unet_ released path, _ for .           lora_down, lora_up    .alpha / rank
    diffusion-pipe  transformer. or diffusion_model.            lora_A, lora_B        alpha / rank of settings or .alpha, else 1
                    released path or ComfyUI's
    official        Hunyuan_video_I2V_lora_ released path, _    lora_down, lora_up    1, whatever .alpha says

    file <--parse / tensors_in--> modules of a layout <--fused / split--> released weights --merged / merge_params--> model

All are told in terms of the released weights. Settings are what PEFT keeps: r, lora_alpha, rank_pattern, alpha_pattern.

diffusers splits fused projections. Parts with one `down` are one adapter of the same rank; others stand along a diagonal:

    up [q|k|v rows, r]  =  q 0 0        down [r, in]  =  q
                           0 k 0                         k
                           0 0 v                         v
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.models import layouts
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.models.layouts import Part, Place

LAYOUTS = ("diffusers", "musubi", "diffusion-pipe", "official")
SETTINGS = "lora_adapter_metadata"  # key of the metadata where diffusers keeps PEFT's settings

# What comes before a module's name; the first is the one we write.
_PREFIXES = {
    "diffusers": ("transformer.", "base_model.model.", "diffusion_model."),
    "musubi": ("lora_unet_",),
    "diffusion-pipe": ("transformer.", "diffusion_model.", "base_model.model."),
    "official": ("Hunyuan_video_I2V_lora_",),
}
_PEFT_DEFAULT = 8  # rank and alpha where PEFT's settings have none
_UNDERSCORED = ("musubi", "official")
_TEXT_ENCODERS = ("text_encoder", "lora_te", "base_model.model.text_encoder")
_KEY = re.compile(r"(.+)\.(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
_HALVES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """The change of a weight [out, in...] seen as a matrix: `up * scale @ down`."""

    down: np.ndarray  # [r, in]
    up: np.ndarray  # [out, r]
    scale: np.ndarray  # [r] float64, alpha / rank; it differs along a diagonal alone

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def one_scale(self) -> bool:
        return bool(np.allclose(self.scale, self.scale[0], rtol=1e-12, atol=0))


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
    """A set of adapters by the released weight that they change, and the layout they came in."""

    layout: str
    adapters: Mapping[str, Adapter]


@functools.cache
def modules(layout: str, config: DiTConfig) -> Mapping[str, Part]:
    """Every module that an adapter can change, by its name in a layout without prefix, and which rows of a released weight it has."""
    places = layouts.places(config)
    table = layouts.table(layout if layout in ("diffusers", "comfyui") else "tencent", config)
    found = {name.removesuffix(".weight"): part for name, part in table.items() if len(places[part.tensor].shape) > 1}
    return {name.replace(".", "_"): part for name, part in found.items()} if layout in _UNDERSCORED else found


def _readable(layout: str, config: DiTConfig) -> dict[str, Part]:
    """The modules that a file in a layout may name; the tools that write released paths also write ComfyUI's."""
    also = modules("comfyui", config) if layout == "diffusion-pipe" else {}
    return {**modules(layout, config), **also}


# --- Reading -------------------------------------------------------------------------------------------------------------------


def parse(
    tensors: Mapping[str, np.ndarray], config: DiTConfig, *, settings: Mapping[str, Any] | None = None, source: str = "the file"
) -> LoRA:
    """The adapters in the tensors of a file, all of which must be used. Raises `UserError` that names what does not fit."""
    layout = _detect(tensors, config, source)
    known = _readable(layout, config)
    halves, rest = _by_module(tensors, layout, known)
    said = [_unknown(key, module, known) for key, module in list(rest.items())[:10]]
    parts: dict[str, list[tuple[Part, Adapter]]] = {}
    for module, found in halves.items():
        part = known[module]
        problem = _problem(found, layouts.places(config)[part.tensor], part)
        problem = problem or _disagreement(layout, module, len(found["down"]), settings)
        if any(part == other for other, _ in parts.get(part.tensor, [])):
            problem = "is there under two names."
        if problem:
            said.append(f"{module} {problem}")
        else:
            parts.setdefault(part.tensor, []).append((part, _adapter(layout, module, found, settings)))
    if said:
        count = f"{len(rest)} unknown tensors, {len(halves)} modules"
        raise UserError(f"{source} is no adapter of this model in the {layout} layout ({count}): {' '.join(said[:10])}")
    order = [tensor for tensor in layouts.places(config) if tensor in parts]
    return LoRA(layout, {tensor: fused(parts[tensor], layouts.places(config)[tensor].shape[0]) for tensor in order})


def settings_in(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's settings of the transformer from the metadata of a file that diffusers wrote, or None if there are none."""
    if SETTINGS not in metadata:
        return None
    try:
        given = json.loads(metadata[SETTINGS])
    except (ValueError, RecursionError) as error:
        raise UserError(f"The metadata {SETTINGS} is no JSON: {error}. Write the adapter again or remove the metadata.") from error
    if not isinstance(given, dict):
        raise UserError(f"The metadata {SETTINGS} should be a JSON object and is {str(given)[:100]}.")
    own = {name.removeprefix("transformer."): value for name, value in given.items() if name.startswith("transformer.")}
    return own or {name: value for name, value in given.items() if not name.startswith(_TEXT_ENCODERS)}


def _detect(tensors: Mapping[str, np.ndarray], config: DiTConfig, source: str) -> str:
    text = sorted(key for key in tensors if key.startswith(_TEXT_ENCODERS))
    if text:
        raise UserError(
            f"{source} adapts a text encoder too ({len(text)} tensors such as {text[0][:100]}), and text encoders are used as released. "
            "Give an adapter of the transformer alone; one trained together with a text encoder does not do the same without it."
        )
    for layout in _UNDERSCORED:
        if any(key.startswith(_PREFIXES[layout]) for key in tensors):
            return layout
    counts = {layout: len(_by_module(tensors, layout, _readable(layout, config))[0]) for layout in ("diffusers", "diffusion-pipe")}
    best = max(counts, key=lambda layout: counts[layout])
    if not counts[best]:
        names = ", ".join(sorted(tensors)[:3])[:300] or "none"
        raise UserError(
            f"{source} holds no adapter of a HunyuanVideo transformer in the layouts {', '.join(LAYOUTS)}; its tensors: {names}."
        )
    return best


def _by_module(
    tensors: Mapping[str, np.ndarray], layout: str, known: Mapping[str, Part]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """`down`, `up` and `alpha` of each module, and of every tensor that is none of these the module it could have been."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    rest = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        module, half = (_bare(match[1], layout), _HALVES.get(match[2], "alpha")) if match else (_bare(key, layout), "")
        if not match or module not in known or half in halves.get(module, {}):
            rest[key] = module
        else:
            halves.setdefault(module, {})[half] = value
    return halves, rest


def _bare(name: str, layout: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES[layout] if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _unknown(key: str, module: str, known: Mapping[str, Part]) -> str:
    if module in known:
        return f"{key[:200]} comes twice, under two prefixes or endings."
    if any(module.startswith(f"{name}.") for name in known):
        return f"{key[:200]} is neither down, up nor alpha; LoRA alone is understood, without bias, DoRA and the like."
    return f"{key[:200]} is unknown. {nearest(module, list(known))}"[:400]


def _problem(found: Mapping[str, np.ndarray], place: Place, part: Part) -> str | None:
    """What is wrong with the halves of a module, in words that follow its name."""
    if not {"down", "up"} <= found.keys():
        return f"has {' and '.join(sorted(found))} and lacks {' and '.join(sorted({'down', 'up'} - found.keys()))}."
    down, up, alpha = found["down"], found["up"], found.get("alpha", np.ones(()))
    rank = len(down) if down.ndim else 0
    expected = (rank, *place.shape[1:]), (part.num_rows, rank, *(1 for _ in place.shape[2:]))
    if not rank or (down.shape, up.shape) != expected:
        into, out = ", ".join(map(str, place.shape[1:])), part.num_rows
        return f"has down {down.shape} and up {up.shape}, where [rank, {into}] and [{out}, rank] of one rank were expected."
    for name, value in (("down", down), ("up", up), ("alpha", alpha)):
        if (name != "alpha" and not jnp.issubdtype(value.dtype, jnp.floating)) or value.dtype.itemsize == 1:
            return f"has {name} of {value.dtype}; give float32, bfloat16 or float16."
        if not np.isfinite(value.astype(np.float32)).all():
            return f"has NaN or infinite numbers in {name}; the training broke down, take an earlier save."
    return None if alpha.size == 1 else f"has alpha of shape {alpha.shape}, one number was expected."


def _disagreement(layout: str, module: str, rank: int, settings: Mapping[str, Any] | None) -> str | None:
    if settings is None or layout in _UNDERSCORED:
        return None
    if settings.get("use_dora"):
        return "is a DoRA adapter by its settings, which is not understood."
    said = _number(settings, module, default="r", patterns="rank_pattern")
    return None if said == rank else f"has rank {rank}, and {said} by its settings. Take the settings that were written with it."


def _adapter(layout: str, module: str, found: Mapping[str, np.ndarray], settings: Mapping[str, Any] | None) -> Adapter:
    rank = len(found["down"])
    if layout == "official":
        scale = 1.0
    elif "alpha" in found:
        scale = float(found["alpha"].reshape(())) / rank
    elif settings is None or layout == "musubi":
        scale = 1.0
    else:
        alpha = _number(settings, module, default="lora_alpha", patterns="alpha_pattern")
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Adapter(found["down"].reshape(rank, -1), found["up"].reshape(-1, rank), np.full(rank, scale))


def _number(settings: Mapping[str, Any], module: str, *, default: str, patterns: str) -> float:
    """Rank or alpha of a module as PEFT finds them: of the first name that it ends with, or that it is if the name begins with ^."""
    value = settings.get(default, _PEFT_DEFAULT)
    by_name = settings.get(patterns) or {}
    for pattern, given in by_name.items() if isinstance(by_name, dict) else [(str(by_name), None)]:
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(
                f"The settings have in {patterns} {pattern[:100]!r}, where names of modules alone are understood; write them out."
            )
        if name == module or (module.endswith(f".{name}") and not pattern.startswith("^")):
            value = given
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"The settings have {str(value)[:100]!r} as {default} of {module}, where a number was expected.")
    return value


# --- Fused and split -----------------------------------------------------------------------------------------------------------


def fused(parts: Sequence[tuple[Part, Adapter]], num_rows: int) -> Adapter:
    """One adapter of a released weight of `num_rows` from those of its parts; parts that are absent stay as they are."""
    parts = sorted(parts, key=lambda item: item[0].rows)
    adapters = [adapter for _, adapter in parts]
    first = adapters[0]
    shared = all(_bits(first.down) == _bits(a.down) and np.array_equal(first.scale, a.scale) for a in adapters)
    up = np.zeros((num_rows, first.rank if shared else sum(a.rank for a in adapters)), _type([a.up for a in adapters]))
    column = 0
    for part, adapter in parts:
        row = 0
        for start, stop in part.rows:
            up[start:stop, column : column + adapter.rank] = adapter.up[row : row + stop - start]
            row += stop - start
        column += 0 if shared else adapter.rank
    if shared:
        return Adapter(first.down, up, first.scale)
    down = np.concatenate([a.down.astype(_type([a.down for a in adapters])) for a in adapters])
    return Adapter(down, up, np.concatenate([a.scale for a in adapters]))


def split(adapter: Adapter, parts: Sequence[Part]) -> list[tuple[Part, Adapter]]:
    """The inverse of `fused`: of a diagonal the blocks, else the whole `down` for each part that changes.

    Nothing of a fused adapter is lost. A component of a part that changes nothing can end up in the part before.
    """
    parts = sorted(parts, key=lambda part: part.rows)
    ups = [np.concatenate([adapter.up[start:stop] for start, stop in part.rows]) for part in parts]
    acts = np.stack([_nonzero(up).any(axis=0) for up in ups])  # [parts, r]
    block = np.maximum.accumulate(acts.argmax(axis=0))
    diagonal = (acts.sum(axis=0) <= 1).all() and (block == acts.argmax(axis=0))[acts.any(axis=0)].all()
    kept = [block == n if diagonal else np.full(adapter.rank, acts[n].any()) for n in range(len(parts))]
    return [(part, Adapter(adapter.down[k], up[:, k], adapter.scale[k])) for part, up, k in zip(parts, ups, kept, strict=True) if k.any()]


def _type(values: Sequence[np.ndarray]) -> np.dtype:
    return values[0].dtype if len({value.dtype for value in values}) == 1 else np.dtype(np.float32)


def _bits(value: np.ndarray) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.tobytes()


def _nonzero(value: np.ndarray) -> np.ndarray:
    """Where any bit is set, so that -0 is kept."""
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}") != 0


# --- Writing -------------------------------------------------------------------------------------------------------------------


def tensors_in(adapters: Mapping[str, Adapter], layout: str, config: DiTConfig) -> dict[str, np.ndarray]:
    """The tensors of a file in a layout.

    Nothing is lost but where "official", which has no scale, takes it into `up`, or where parts that were scaled each on its own
    come to be one; that is exact for powers of two, and else `up` becomes float32.
    """
    tensors, (down, up) = {}, ("lora_down", "lora_up") if layout in _UNDERSCORED else ("lora_A", "lora_B")
    for module, adapter in _modules_of(adapters, layout, config):
        shape = layouts.places(config)[modules(layout, config)[module].tensor].shape
        name = f"{_PREFIXES[layout][0]}{module}"
        tensors[f"{name}.{down}.weight"] = adapter.down.reshape(-1, *shape[1:])
        tensors[f"{name}.{up}.weight"] = adapter.up.reshape(*adapter.up.shape, *(1 for _ in shape[2:]))
        if layout in _UNDERSCORED:
            tensors[f"{name}.alpha"] = np.asarray(_alpha(adapter), np.float32)
    return tensors


def settings_of(adapters: Mapping[str, Adapter], layout: str, config: DiTConfig) -> dict[str, Any]:
    """PEFT's settings of adapters in a layout: the commonest rank and alpha, and by name those of modules that differ."""
    found = dict(_modules_of(adapters, layout, config))
    ranks, alphas = {name: a.rank for name, a in found.items()}, {name: _alpha(a) for name, a in found.items()}
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(found),
    }


def metadata_of(adapters: Mapping[str, Adapter], layout: str, config: DiTConfig) -> dict[str, str]:
    """What the tools of a layout look for in a file's metadata."""
    said = {"format": "pt"}
    if layout == "diffusers":
        settings = {f"transformer.{name}": value for name, value in settings_of(adapters, layout, config).items()}
        said[SETTINGS] = json.dumps(settings, sort_keys=True)
    if layout == "musubi":
        found = [adapter for _, adapter in _modules_of(adapters, layout, config)]
        said["ss_network_module"] = "networks.lora"
        for name, values in (("dim", {a.rank for a in found}), ("alpha", {_alpha(a) for a in found})):
            said[f"ss_network_{name}"] = str(values.pop()) if len(values) == 1 else "Dynamic"
    return said


def _modules_of(adapters: Mapping[str, Adapter], layout: str, config: DiTConfig) -> Iterator[tuple[str, Adapter]]:
    """Adapters by a layout's modules, each with one scale."""
    by_tensor: dict[str, dict[Part, str]] = {}
    for name, part in modules(layout, config).items():
        by_tensor.setdefault(part.tensor, {})[part] = name
    for tensor, adapter in adapters.items():
        for part, own in split(adapter, list(by_tensor[tensor])):
            yield by_tensor[tensor][part], own if own.one_scale and layout != "official" else _folded(own)


def _folded(adapter: Adapter) -> Adapter:
    """With the scale in `up`, in its type if that is exact."""
    exact = adapter.up.astype(np.float64) * adapter.scale
    up = exact.astype(adapter.up.dtype)
    if (up.astype(np.float64) != exact).any() and up.dtype.itemsize < 4:
        up = exact.astype(np.float32)
    return Adapter(adapter.down, up, np.ones(adapter.rank))


def _alpha(adapter: Adapter) -> int | float:
    alpha = float(f"{adapter.scale[0] * adapter.rank:.12g}")  # 12 digits: what alpha / rank * rank adds is gone
    return int(alpha) if alpha.is_integer() else alpha


# --- Merging -------------------------------------------------------------------------------------------------------------------


def merged(base: np.ndarray, adapter: Adapter, multiplier: float = 1.0) -> np.ndarray:
    """A released weight with its adapter, computed in float32 and given in the weight's own type."""
    up = adapter.up.astype(np.float32) * (multiplier * adapter.scale).astype(np.float32)
    delta = up @ adapter.down.astype(np.float32)
    return (base.astype(np.float32) + delta.reshape(base.shape)).astype(base.dtype)


def merge_params(config: DiTConfig, params: Any, adapters: Mapping[str, Adapter], multiplier: float = 1.0) -> Any:
    """Our parameters with adapters; those that none changes are the same arrays. Layers of a stack are merged all at once."""
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    by_path: dict[str, dict[int | None, Adapter]] = {}
    for tensor, adapter in adapters.items():
        place = layouts.places(config)[tensor]
        by_path.setdefault(place.path, {})[place.layer] = adapter
    for path, layers in by_path.items():
        stack = [layers.get(layer) for layer in range(len(flat[path]))] if None not in layers else [layers[None]]
        down, up = _stacked(stack, multiplier)
        flat[path] = _merge_kernels(flat[path], down, up)
    return traverse_util.unflatten_dict(flat, sep="/")


def _stacked(stack: Sequence[Adapter | None], multiplier: float) -> tuple[np.ndarray, np.ndarray]:
    """The adapters of a stack with zeros up to one rank: [layers, in, r] and [layers, r, out]."""
    some = [adapter for adapter in stack if adapter is not None]
    rank = max(adapter.rank for adapter in some)
    down = np.zeros((len(stack), some[0].down.shape[1], rank), np.float32)
    up = np.zeros((len(stack), rank, len(some[0].up)), np.float32)
    for layer, adapter in enumerate(stack):
        if adapter is not None:
            down[layer, :, : adapter.rank] = adapter.down.T
            up[layer, : adapter.rank] = (adapter.up.astype(np.float32) * (multiplier * adapter.scale).astype(np.float32)).T
    return down, up


@jax.jit
def _merge_kernels(kernels: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    delta = jnp.einsum("lir,lro->lio", down, up, precision="highest").reshape(kernels.shape)
    return (kernels.astype(jnp.float32) + delta).astype(kernels.dtype)


# --- What an adapter changes -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """How far a weight moved: norm of the change over norm of the weight, and the fraction of elements with other bits."""

    relative: float
    elements: float


def change(base: np.ndarray, after: np.ndarray) -> Change:
    moved = np.linalg.norm((after.astype(np.float32) - base.astype(np.float32)).reshape(-1))
    norm = np.linalg.norm(base.astype(np.float32).reshape(-1))
    kind = f"u{base.dtype.itemsize}"
    bits = np.ascontiguousarray(base).view(kind) != np.ascontiguousarray(after).view(kind)
    return Change(float(moved / norm) if norm else float(np.inf if moved else 0.0), float(bits.mean()))


def check_effect(adapters: Mapping[str, Adapter], changes: Mapping[str, Change]) -> str:
    """What merging changed, in a sentence. Raises `UserError` if it changed no bit of any weight, and says why."""
    changed = {tensor: found for tensor, found in changes.items() if found.elements}
    if not changed:
        zero = [tensor for tensor, a in adapters.items() if not (a.down.any() and a.up.any() and a.scale.any())]
        raise UserError(
            f"The adapter changes none of its {len(adapters)} weights. In {len(zero)} of them down, up or alpha is all zero, as before "
            f"training; in {len(adapters) - len(zero)} the change is lost when it is rounded to the type of the weights. "
            "Give a trained adapter, a multiplier other than 0, or weights in fp32."
        )
    least, most = (pick(changed, key=lambda tensor: changed[tensor].relative) for pick in (min, max))
    elements = np.mean([found.elements for found in changed.values()])
    return (
        f"{len(changed)} of {len(changes)} weights changed, {elements:.1%} of their elements; "
        f"relative change {changed[least].relative:.2e} ({least}) to {changed[most].relative:.2e} ({most})"
    )
