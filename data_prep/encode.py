"""Turns clips into what the DiT trains on: `python -m data_prep.encode --clips DIR --vae DIR --output DIR --config FILE:encode`.

For each bucket of the config: decode the clips that fit, encode them with the VAE, add the text states of their prompts, write
shards of `Latent` records. The codec (VAE and text tower) is written beside them. Shards have names made from everything that
decides their content, so a run that was stopped goes on with the missing ones, and one with another VAE, tower or config never
mixes with them. Shards depend on no other shard: with `--worker I --workers N` N processes, on as many machines as see the folder, each
write a part of them. The first makes the codec, the one that ends last the index. Clips of a batch are spread over a process's devices.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from hunyuan_jax import convert
from hunyuan_jax.checkpoint import load_params, read_model
from hunyuan_jax.codec import Codec, load_codec, text_config
from hunyuan_jax.data import records
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.captions import Caption
from hunyuan_jax.data.dataset import Dataset, open_dataset, sha256_of, write_index, write_json, write_shard
from hunyuan_jax.data.prompts import PromptConfig, make_prompt, prompt_variants
from hunyuan_jax.data.transforms import fit_to_bucket
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.models.vae import VAE, LatentMoments, Posterior, VAEConfig, abstract_params, whitened
from hunyuan_jax.models.vae_tiling import Tiling, encode_tiled
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import batch_sharding, replicated
from hunyuan_jax.settings import build, parse_flags
from hunyuan_jax.video_io import read_video

Encoder = Callable[[np.ndarray], Posterior]  # frames [B, T, H, W, 3] in [-1, 1] to their posterior

CODEC_WAIT_SECONDS = 3600
REMEMBERED_PROMPTS = 4096
FORMAT = 4  # part of every fingerprint; raised when the same inputs would give other records


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is encoded: buckets, the text side, and the prompts of a clip.

    `prompts` names the caption fields of each prompt; or `assemble`, a `PromptConfig` (data/prompts.py), draws up to `variants` different
    ones for each clip, by `seed` and the clip's id. Training takes one of them anew each epoch, and drops some itself. Without
    `store_text` prompts are stored without their states, and training loads the text encoders itself: for states that would take more
    room than there is. They are the same either way.

    With a `whitening_ridge` above 0 the VAE's latents are whitened (`whitened` in models/vae.py) by their moments over the first
    `measure_clips` clips: a small VAE puts nearly all variance into a few directions, brightness above all, and what the others
    say would drown in noise until the very end of sampling. With 0 latents and scaling_factor stay the VAE's own, as released
    weights need it. `measure_text` normalises the text states by their statistics over all prompts, as random towers need it and
    trained ones do not. `tiling`, a `Tiling` (models/vae_tiling.py), says in which tiles clips larger than one of them are encoded, for
    clips too large to be encoded at once; None encodes all clips whole. What it says is part of what the latents are.
    """

    buckets: tuple[Any, ...]
    text: Any
    prompts: tuple[tuple[str, ...], ...] = (("short",),)
    assemble: Any = None
    variants: int = 4
    store_text: bool = True
    seed: int = 0
    clips_per_shard: int = 512
    whitening_ridge: float = 0.0
    measure_text: bool = False
    measure_clips: int = 64
    tiling: Any = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """One shard to be: a bucket and the clips (row numbers) that go into it."""

    name: str
    bucket: Bucket
    rows: tuple[int, ...]


def encode(clips: Dataset, vae: tuple[VAEConfig, Any], output: Path, *, config: EncodeConfig, worker: int = 0, workers: int = 1) -> None:
    """Writes the latent dataset of `clips` into `output`, or what is missing of it; of several workers each writes its part."""
    buckets = [build(Bucket, section, where=f"buckets[{i}]") for i, section in enumerate(config.buckets)]
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    # The parameters are an argument: measuring and encoding share what is compiled for the longest bucket.
    whole: Any = jax.jit(lambda params, frames: VAE(vae[0]).apply({"params": params}, frames, method="encode"))
    encode_frames: Any = lambda params, frames: whole(params, jax.device_put(frames, batch_sharding(mesh)))  # noqa: E731
    if config.tiling:
        encode_frames = functools.partial(encode_tiled, vae[0], tiling=build(Tiling, config.tiling, where="tiling"))
    spread = [dataclasses.replace(b, batch=-(-b.batch // mesh.size) * mesh.size) for b in buckets]
    prompts = prompts_of(clips.rows, config)
    base = {"format": FORMAT, "clips": sha256_of(clips.folder / "dataset.json"), "vae": fingerprint_vae(*vae), "config": identity(config)}

    def make() -> Codec:
        return make_codec(clips, vae, prompts, config=config, buckets=spread, encode_frames=encode_frames)

    codec = _codec_for(base, output, make, wait=worker > 0)
    codec = codec.with_text(codec.text.at(text_config(config.text).places))
    made_from = base | {"codec": codec.fingerprint(output / "codec")}
    pieces = plan_pieces(clips, spread, made_from, clips_per_shard=config.clips_per_shard)
    states = PromptStates(codec if config.store_text else None)
    encoder = functools.partial(encode_frames, jax.device_put(codec.vae_params, replicated(mesh)))
    mine = pieces[worker::workers]
    with tqdm(total=sum(len(p.rows) for p in mine), unit="clip", desc="encode", dynamic_ncols=True) as bar:
        for piece in mine:
            path = output / piece.name
            if not path.exists():
                write_shard(path, _encode_piece(piece, clips, prompts, states, encoder))
            bar.update(len(piece.rows))
    if missing := sum(not (output / piece.name).exists() for piece in pieces):
        print(f"encode: worker {worker} of {workers} is done; {missing} of {len(pieces)} shards are left to others")
        return
    shards = [{"name": p.name, "records": len(p.rows), "sha256": sha256_of(output / p.name)} for p in pieces]
    rows = [_manifest_row(clips.rows[n], piece, index) for piece in pieces for index, n in enumerate(piece.rows)]
    write_index(output, kind="Latent", rows=rows, shards=shards, made_from=made_from)
    for stale in set(output.glob("*.array_record*")) - {output / p.name for p in pieces}:
        stale.unlink(missing_ok=True)


def make_codec(
    clips: Dataset,
    vae: tuple[VAEConfig, Any],
    prompts: dict[int, list[str]],
    *,
    config: EncodeConfig,
    buckets: Sequence[Bucket],
    encode_frames: Any,
) -> Codec:
    """The VAE, whitened where the config says so, and the text side, with its statistics where the config says so."""
    text = text_config(config.text).resolved()
    codec = Codec(vae[0], jax.tree.map(jnp.asarray, vae[1]), text)
    if config.whitening_ridge > 0:
        encoder = functools.partial(encode_frames, codec.vae_params)
        moments = measure_latents(clips, encoder, buckets, limit=config.measure_clips)
        white = jax.tree.map(jnp.asarray, whitened(vae[1], moments, ridge=config.whitening_ridge))
        codec = dataclasses.replace(codec, vae=dataclasses.replace(codec.vae, scaling_factor=1.0), vae_params=white)
    if config.measure_text:
        distinct = sorted({prompt for variants in prompts.values() for prompt in variants})
        codec = codec.with_text(text.with_statistics(distinct))
    return codec


def _codec_for(base: dict[str, Any], output: Path, make: Callable[[], Codec], *, wait: bool) -> Codec:
    """The codec in `output` that was made from `base`: the one that is there, the one another worker makes, or a new one."""
    ready, deadline = output / "codec.json", time.monotonic() + CODEC_WAIT_SECONDS
    while (json.loads(ready.read_text()) if ready.exists() else None) != base:
        if not wait:
            ready.unlink(missing_ok=True)
            make().save(output / "codec")
            write_json(ready, base)
        elif time.monotonic() > deadline:
            raise UserError(
                f"Worker 0 has not made the codec in {output} from the same clips, VAE and config within "
                f"{CODEC_WAIT_SECONDS // 60} minutes; start it with the same arguments, then this worker again."
            )
        else:
            time.sleep(1)
    return load_codec(output / "codec")  # its text encoders may lie elsewhere by now


class PromptStates:
    """The states of prompts, some thousands of which are remembered; without a codec they stay prompts."""

    def __init__(self, codec: Codec | None) -> None:
        self._codec = codec
        self._known: dict[str, records.TextStates] = {}

    def of(self, prompts: Sequence[str]) -> dict[str, records.TextStates]:
        if self._codec is None:
            return {prompt: records.TextStates.unencoded(prompt) for prompt in prompts}
        missing = sorted(set(prompts) - self._known.keys())
        if len(self._known) + len(missing) > REMEMBERED_PROMPTS:
            self._known, missing = {}, sorted(set(prompts))
        self._known |= zip(missing, self._codec.encode_prompts(missing), strict=True)
        return {prompt: self._known[prompt] for prompt in prompts}


def bytes_of_a_clip(vae: VAEConfig, config: EncodeConfig) -> tuple[int, int]:
    """What a clip that fits all buckets takes: its posteriors, and at most its text states, which each bucket has of its own."""
    buckets = [build(Bucket, section, where="buckets") for section in config.buckets]
    text = text_config(config.text).resolved()
    item = np.dtype(ml_dtypes.bfloat16).itemsize
    variants = len(config.prompts) if config.assemble is None else config.variants
    latents = sum(2 * item * math.prod(vae.latent_shape(*bucket.shape)) for bucket in buckets)
    return latents, config.store_text * len(buckets) * variants * item * (text.kept_tokens * text.width + text.pooled_width)


def prompts_of(rows: Sequence[dict[str, Any]], config: EncodeConfig) -> dict[int, list[str]]:
    """The prompts of each clip of a manifest, by row number. Raises `UserError` for a caption that is none."""
    if config.assemble is None:
        return {n: [make_prompt(row_caption(row), fields) for fields in config.prompts] for n, row in enumerate(rows)}
    assemble = build(PromptConfig, config.assemble, where="assemble")
    draw = functools.partial(prompt_variants, config=assemble, seed=config.seed, count=config.variants)
    return {n: list(draw(Caption.from_json(row_caption(row)), sample_id=row["id"])) for n, row in enumerate(rows)}


def row_caption(row: dict[str, Any]) -> dict[str, Any]:
    """The structured caption in a row of the clips' manifest."""
    caption = row["caption"]
    return json.loads(caption) if isinstance(caption, str) else caption


def plan_pieces(clips: Dataset, buckets: Sequence[Bucket], made_from: dict[str, Any], *, clips_per_shard: int) -> list[Piece]:
    """The shards to write, in order; their names carry a hash of what they are made from."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    pieces = []
    for bucket in buckets:
        fitting = [n for n, row in enumerate(clips.rows) if bucket.fits(row["num_frames"])]
        if not fitting:
            raise UserError(
                f"No clip in {clips.folder} has the {bucket.span(min(bucket.intervals))} frames that bucket {bucket.name} needs."
            )
        groups = [fitting[i : i + clips_per_shard] for i in range(0, len(fitting), clips_per_shard)]
        for i, group in enumerate(groups):
            pieces.append(Piece(f"latents-{key}-{bucket.name}-{i:05d}-of-{len(groups):05d}.array_record", bucket, tuple(group)))
    return pieces


def _manifest_row(clip: dict[str, Any], piece: Piece, index: int) -> dict[str, Any]:
    frames, height, width = piece.bucket.shape
    place = {"shard": piece.name, "index": index, "source": clip["source"]}
    return {"id": f"{clip['id']}/{piece.bucket.name}", **place, "frames": frames, "height": height, "width": width}


def _fit(clip: records.Clip | records.Latent, bucket: Bucket) -> np.ndarray:
    assert isinstance(clip, records.Clip)
    needed = max(bucket.span(interval) for interval in bucket.intervals)
    return fit_to_bucket(read_video(clip.video, max_frames=needed).frames, bucket)


def measure_latents(clips: Dataset, encoder: Encoder, buckets: Sequence[Bucket], *, limit: int) -> LatentMoments:
    """The moments of unscaled latents over the first clips, at most `limit`, that fit the longest bucket."""
    bucket = max(buckets, key=lambda b: b.frames)
    rows = [n for n, row in enumerate(clips.rows) if bucket.fits(row["num_frames"])][:limit]
    posteriors = [encoder(np.stack(batch)) for batch in _batches([_fit(c, bucket) for c in clips.read(rows)], bucket.batch)]
    mean, logvar = (
        np.concatenate([np.asarray(getattr(p, name), np.float64).reshape(-1, p.mean.shape[-1]) for p in posteriors])
        for name in ("mean", "logvar")
    )
    return LatentMoments(mean.mean(axis=0), np.cov(mean, rowvar=False), np.exp(logvar).mean(axis=0))


def _batches(frames: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    """Batches of one size, the last one filled up with its last clip."""
    groups = [frames[i : i + size] for i in range(0, len(frames), size)]
    return [group + [group[-1]] * (size - len(group)) for group in groups]


def _encode_piece(
    piece: Piece, clips: Dataset, prompts: dict[int, list[str]], prompt_states: PromptStates, encoder: Encoder
) -> list[bytes]:
    items = []
    states = prompt_states.of([prompt for number in piece.rows for prompt in prompts[number]])
    size = piece.bucket.batch
    for start in range(0, len(piece.rows), size):
        numbers = piece.rows[start : start + size]
        found = clips.read(numbers)
        posterior = encoder(np.stack(_batches([_fit(clip, piece.bucket) for clip in found], size)[0]))
        mean, logvar = (np.asarray(x).astype(ml_dtypes.bfloat16) for x in (posterior.mean, posterior.logvar))
        for row, (number, clip) in enumerate(zip(numbers, found, strict=True)):
            assert isinstance(clip, records.Clip)
            latent = records.Latent(
                id=f"{clip.id}/{piece.bucket.name}",
                bucket=piece.bucket.shape,
                fps=clip.fps / min(piece.bucket.intervals),
                source=clip.source,
                mean=mean[row],
                logvar=logvar[row],
                texts=tuple(states[prompt] for prompt in prompts[number]),
            )
            items.append(records.to_bytes(latent))
    return items


def load_vae(path: Path) -> tuple[VAEConfig, Any]:
    """A VAE from a training run's folder (its averaged weights) or from a folder in the released layout."""
    if not (path / "model.json").exists():
        return convert.load(path, component="vae")
    model = read_model(path)
    if model.get("task") != "vae":
        raise UserError(f"{path} is a run of task {model.get('task')!r}; --vae needs a run of task 'vae' or a folder with VAE weights.")
    config = build(VAEConfig, model["model"], where="model")
    return config, load_params(path, abstract_params(config))[0]


def fingerprint_vae(config: VAEConfig, params: Any) -> str:
    """A hash of the VAE as it was given, before its latents are whitened."""
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def identity(config: EncodeConfig) -> dict[str, Any]:
    """The config as JSON has it, its text side with what the encoders hold and not where they lie."""
    said = dataclasses.asdict(config) | {"text": text_config(config.text).resolved().identity()}
    return json.loads(json.dumps(said))  # type: ignore[no-any-return]


def is_done(output: Path, clips: Path, vae: tuple[VAEConfig, Any], config: EncodeConfig) -> bool:
    """Whether `output` already holds the whole dataset made from these clips, this VAE and this config."""
    try:
        made_from = json.loads((output / "dataset.json").read_text())["made_from"]
    except (OSError, ValueError, KeyError):
        return False
    return (
        made_from.get("format") == FORMAT
        and made_from.get("vae") == fingerprint_vae(*vae)
        and made_from.get("clips") == sha256_of(clips / "dataset.json")
        and made_from.get("config") == identity(config)
    )


def main(argv: list[str]) -> None:
    config_file = config_flags.DEFINE_config_file("config", None, "Such as configs/quickstart.py:encode.", lock_config=True)
    flags.DEFINE_string("clips", None, "Folder of the curated clips.")
    flags.DEFINE_string("vae", None, "A training run of the VAE, or a folder with its weights in the released layout.")
    flags.DEFINE_string("output", None, "Folder for the latents.")
    flags.DEFINE_integer("worker", 0, "Which of the workers this is, from 0.", lower_bound=0)
    flags.DEFINE_integer("workers", 1, "How many workers there are.", lower_bound=1)
    parse_flags(argv, required=("config", "clips", "vae", "output"))
    if flags.FLAGS.worker >= flags.FLAGS.workers:
        raise UserError(f"--worker={flags.FLAGS.worker} is none of {flags.FLAGS.workers} workers, which count from 0.")
    section: ConfigDict = config_file.value
    config = build(EncodeConfig, section, where="encode")
    clips, output = open_dataset(flags.FLAGS.clips, kind="Clip"), Path(flags.FLAGS.output)
    vae = load_vae(Path(flags.FLAGS.vae))
    if is_done(output, clips.folder, vae, config):
        print(f"encode: {output} is done; nothing to do")
        return
    output.mkdir(parents=True, exist_ok=True)
    print(f"encode: {len(clips.rows)} clips from {clips.folder} into {output}, {len(config.buckets)} buckets")
    latents, texts = bytes_of_a_clip(vae[0], config)
    print(f"encode: a clip in all buckets takes {latents:,} bytes of latents and at most {texts:,} of text states")
    encode(clips, vae, output, config=config, worker=flags.FLAGS.worker, workers=flags.FLAGS.workers)


if __name__ == "__main__":
    run_command(main)
