"""Trainings that compile in seconds, of each task, the data they read, and what a run left, to compare it with another's."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs import quickstart
from configs import vae as vae_recipe
from data_prep.encode import EncodeConfig, encode
from hunyuan_jax.data import records
from hunyuan_jax.data.dataset import open_dataset, write_index, write_shard
from hunyuan_jax.metrics import read_metrics, repeatable
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.t2v import T2VTask
from hunyuan_jax.tasks.task import normal_like, sample_keys
from hunyuan_jax.tasks.vae import VAETask
from hunyuan_jax.video_io import encode_mp4

TINY_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
BUCKET = {"frames": 5, "height": 16, "width": 16, "batch": 2}
EVERY = {"log_every": 3, "checkpoint_every": 4, "measure_every": 8, "measure_samples": 2, "preview_every": 0, "watchdog_seconds": 300}
STEPS = {"t2v": 24, "vae": 24, "linear": 24}


class Linear(VAETask):
    """The task of the VAE with a linear model in its place, which compiles in a moment. A batch with a sample of `poison` has no loss."""

    poison: tuple[int, ...] = ()

    def init(self, key):
        encoder, decoder = 0.5 * jax.random.normal(key, (2, 3, 3))
        return {"fc1": {"kernel": encoder}, "fc2": {"kernel": decoder}}

    def draw(self, params, batch, key):
        latents = batch.frames @ params["fc1"]["kernel"] + 0.1 * normal_like(sample_keys(key, batch), batch.frames)
        return latents @ params["fc2"]["kernel"], jnp.mean(jnp.square(latents))

    def reconstruct(self, params, frames, *, tiled=False):
        return frames @ params["fc1"]["kernel"] @ params["fc2"]["kernel"]

    def loss(self, params, batch, *, key):
        loss, values = super().loss(params, batch, key=key)
        bad = jnp.isin(batch.sample_id, jnp.array(self.poison, jnp.uint32)).any() if self.poison else False
        return jnp.where(bad, jnp.nan, loss), values


TASKS = {"linear": Linear.from_config, "vae": VAETask.from_config, "t2v": T2VTask.from_config}


# --- Tiny trainings ------------------------------------------------------------------------------------------------------------


def write_clips(folder: Path) -> None:
    """Twelve clips of noise."""
    items = []
    for n in range(12):
        frames = np.random.default_rng(n).integers(0, 255, (5, 16, 16, 3), np.uint8)
        items.append(
            records.Clip(
                id=f"clip-{n}", video=encode_mp4(frames, fps=8), fps=8.0, num_frames=5, height=16, width=16, camera="",
                caption={"short": f"noise {n}"}, source=f"{n}.mp4", start_seconds=0.0, end_seconds=1.0, scores={},
            )
        )  # fmt: skip
    folder.mkdir(parents=True)
    shard = write_shard(folder / "clips-0.array_record", [records.to_bytes(item) for item in items])
    rows = [
        {"id": x.id, "shard": shard["name"], "index": i, "source": x.source, "num_frames": 5, "caption": json.dumps(x.caption)}
        for i, x in enumerate(items)
    ]
    write_index(folder, kind="Clip", rows=rows, shards=[shard], made_from={})


def flip_in_records(shard: Path, *numbers: int) -> None:
    """Flips a bit in the middle of these records of a shard whose records take less than 64 KiB in all."""
    data, start = bytearray(shard.read_bytes()), 64
    for number in range(max(numbers) + 1):
        size = int.from_bytes(data[start + 8 : start + 16], "little")  # after a chunk's hash, before 24 more bytes of its header
        if number in numbers:
            data[start + 40 + size // 2] ^= 1
        start += 40 + size
    shard.write_bytes(data)


def write_latents(folder: Path) -> None:
    """The latents of the clips beside them, by a random VAE."""
    section = quickstart.get_config("encode")
    section.buckets, section.whitening_ridge = (BUCKET,), 0.0
    params = jax.jit(lambda key: VAE(TINY_VAE).init(key, np.zeros((1, 5, 16, 16, 3), np.float32)))(jax.random.key(0))["params"]
    clips = open_dataset(folder.parent / "clips", kind="Clip")
    encode(clips, (TINY_VAE, params), folder, config=build(EncodeConfig, section, where="encode"))


def write_data(folder: Path, tasks: Sequence[str]) -> None:
    """What trainings of `tasks` read."""
    write_clips(folder / "clips")
    if "t2v" in tasks:
        write_latents(folder / "latents")


def tiny_config(task: str, data: Path, *, batch: int = 2, **loop: Any) -> ConfigDict:
    """A training of `task` that compiles in seconds; `loop` changes its section `train`."""
    bucket = {**BUCKET, "batch": batch}
    if task == "t2v":
        config = quickstart.get_config("t2v")
        config.model.update({"width": 32, "num_heads": 2, "num_double_blocks": 1, "num_single_blocks": 1, "rope_axes": (4, 6, 6)})
        config.model.patch_size = (1, 1, 1)
        config.video.update({"frames": 5, "height": 16, "width": 16})
        config.data.update({"path": str(data / "latents"), "buckets": (bucket,)})
    else:
        config = vae_recipe.get_config("shapes")
        config.start = ""
        config.model = ConfigDict(
            {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2, "spatial_compression": 1,
             "temporal_compression": 1}
        )  # fmt: skip
        config.critic.model = ConfigDict({"widths": (2, 4), "time_halvings": 1, "power_steps": 1})
        config.critic.update({"start_step": 6, "lead_steps": 6})
        config.critic = config.critic if task == "vae" else None
        config.data.update({"path": str(data / "clips"), "buckets": ({**bucket, "frames": 3, "intervals": (1, 2)},)})
    config.data.held_out = 0.3
    config.train.update({"steps": STEPS[task], **EVERY, **loop})
    return config


@dataclasses.dataclass(frozen=True)
class Left:
    """What a run left: arrays by their paths, its position, and its logged values, without what the machine says."""

    arrays: dict[str, np.ndarray]
    position: dict[str, Any]
    logged: list[dict[str, Any]]

    @classmethod
    def by(cls, workdir: Path, step: int) -> "Left":
        folder = workdir.absolute() / "checkpoints" / str(step)
        position = json.loads((folder / "data" / "metadata").read_text())
        position.pop("ledger", None)  # of times, too
        return cls(arrays_of(folder), position, [repeatable(line) for line in read_metrics(workdir / "metrics.jsonl")])

    def differing_bits(self, other: "Left") -> int:
        return differing_bits(self.arrays, other.arrays)

    def differing_values(self, other: "Left") -> int:
        """Logged lines that differ, and 1 more if the positions do."""
        longest = max(len(self.logged), len(other.logged))
        rows = [(x.logged + [None] * longest)[:longest] for x in (self, other)]
        return sum(one != two for one, two in zip(*rows, strict=True)) + (self.settled_position != other.settled_position)

    @property
    def settled_position(self) -> dict[str, Any]:
        """The position with the line of measures that a stop after the last step left owing, which the next start writes."""
        return self.position | {"owed": False, "lines": self.position["lines"] + self.position["owed"]}


def differing_bits(these: dict[str, np.ndarray], those: dict[str, np.ndarray]) -> int:
    """Bits of all arrays that differ; an array that one side lacks differs in all its bits."""
    count = 0
    for name in these.keys() | those.keys():
        one, two = these.get(name), those.get(name)
        if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
            count += 8 * max(0 if x is None else x.nbytes for x in (one, two))
        else:
            different = np.bitwise_xor(*(np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8) for x in (one, two)))
            count += int(np.unpackbits(different).sum())
    return count


def arrays_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by whatever processes it was written."""
    arrays = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for part in ("params", "ema", "rest", "spikes"):
            if not (checkpoint / part).exists():
                continue
            tree = checkpointer.metadata(checkpoint.absolute() / part).item_metadata.tree
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            found = checkpointer.restore(checkpoint.absolute() / part, args=ocp.args.PyTreeRestore(restore_args=how))
            leaves = jax.tree_util.tree_leaves_with_path(found)
            arrays |= {f"{part}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    return arrays
