"""The causal 3D VAE by the report's recipe (section 4.1): L1 + 0.1 LPIPS + 0.05 adversarial + 1e-6 KL, on images and video 1:4.

    python -m hunyuan_jax.train --config=configs/vae.py:PART --workdir DIR --config.data.path=CLIPS \
        --config.loss.lpips_files=vgg16.safetensors,lpips_vgg.safetensors

PART climbs short_128, short_256, long_256, long_512, tiling, each from the one before (--config.start=its export). The last keeps
the shapes of long_512, and half of its steps, drawn at random, encode and decode in the released tiles. The model is the released one
of 246,478,803 parameters, trained from nothing and from no image VAE. Frames are taken at a random interval of 1 to 8.

Three parts are for two CPU cores; all go on from the small VAE in configs/shapes_vae, which was trained with L1 + KL on the shapes
world. shapes brings in the adversary, shapes_tiling the tiles and a weight of seams, both on that world; films learns real videos. The
same steps without the adversary, to compare with, are those of a critic that never starts: --config.critic.start_step=1000000000.
"""

from typing import Any

from ml_collections import ConfigDict

INTERVALS = tuple(range(1, 9))

# Buckets are (frames, height, width, batch, share of the steps). The report publishes neither resolutions nor batches, rates or the
# discriminator, so those are ours. A critic is fresh in every stage and begins when reconstructions are sound. `sequence` is the number
# of devices that share a clip's rows: what one clip of the last stages needs is more than a device has.
STAGES: dict[str, Any] = {
    "short_128": {
        "steps": 200_000,
        "learning_rate": 1e-4,
        "critic_start": 50_000,
        "buckets": ((1, 128, 128, 1024, 1.0), (17, 128, 128, 128, 4.0)),
    },
    "short_256": {
        "steps": 150_000,
        "learning_rate": 1e-4,
        "critic_start": 5_000,
        "buckets": ((1, 256, 256, 256, 1.0), (17, 256, 256, 64, 4.0)),
    },
    "long_256": {
        "steps": 100_000,
        "learning_rate": 5e-5,
        "critic_start": 5_000,
        "buckets": ((1, 256, 256, 256, 1.0), (65, 256, 256, 64, 4.0)),
    },
    "long_512": {
        "steps": 50_000,
        "learning_rate": 2e-5,
        "critic_start": 5_000,
        "buckets": ((1, 512, 512, 128, 1.0), (65, 512, 512, 32, 4.0)),
        "sequence": 4,
    },
    "tiling": {
        "steps": 20_000,
        "learning_rate": 1e-5,
        "critic_start": 2_000,
        "buckets": ((1, 512, 512, 128, 1.0), (65, 512, 512, 32, 4.0)),
        "sequence": 4,
        "tiled": True,
    },
}

_SMALL = {"learning_rate": 3e-4, "critic_start": 100, "buckets": ((1, 64, 64, 8, 1.0), (9, 64, 64, 1, 4.0))}
# Films are cropped: at 64 pixels in whole they would be finer than any video is.
FILMS = {"steps": 3000, "learning_rate": 6e-4, "critic_start": 1500, "resize": (128, 128), "held_out": 0.2}
SMALL: dict[str, Any] = {
    "shapes": {"steps": 2000, **_SMALL},
    "shapes_tiling": {**_SMALL, "steps": 1500, "tiled": True, "learning_rate": 6e-4, "seam_weight": 2.5},
    "films": {**_SMALL, **FILMS},
}
SMALL_TILING = {"tile": (8, 40, 40), "overlap": (4, 16, 16), "at_once": True}  # two latents of overlap, as one leaves seams


def _buckets(stage: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The buckets of a stage; where it is tiled, each of them twice at half its share, in whole and in tiles."""
    plain = tuple(
        {"frames": t, "height": h, "width": w, "intervals": INTERVALS, "batch": batch, "share": share, "resize": stage.get("resize", ())}
        for t, h, w, batch, share in stage["buckets"]
    )
    if not stage.get("tiled"):
        return plain
    return tuple({**bucket, "share": bucket["share"] / 2, "tiled": tiled} for bucket in plain for tiled in (False, True))


def _config(stage: dict[str, Any]) -> ConfigDict:
    return ConfigDict(
        {
            "task": "vae",
            "seed": 0,
            "start": "",  # weights to go on from: the stage before, exported, or released ones
            "model": {
                "latent_channels": 16,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "norm_num_groups": 32,
                "convolution": "planes",
                "remat": "full",
                "dtype": "bfloat16",
            },
            "loss": {
                "kl_weight": 1e-6,
                "seam_weight": stage.get("seam_weight", 0.0),
                "lpips_weight": 0.1,
                "lpips_files": "",
                "lpips_frames": 8,
            },
            "critic": {
                "model": {"widths": (64, 128, 256, 512), "time_halvings": 2, "convolution": "planes", "dtype": "bfloat16"},
                "optimizer": {"learning_rate": stage["learning_rate"], "warmup_steps": 500, "b1": 0.5, "b2": 0.99},
                "weight": 0.05,
                "start_step": stage["critic_start"],
                "lead_steps": 1000,
            },
            "data": {
                "path": "",
                "kind": "Clip",
                "held_out": 0.01,
                "threads": 16,
                "quarantine_limit": 0.001,
                "buckets": _buckets(stage),
            },
            "tiling": {"tile": (64, 256, 256), "overlap": (16, 64, 64)},  # of tiled buckets: the released tiles
            "optimizer": {"learning_rate": stage["learning_rate"], "warmup_steps": 1000, "b2": 0.99},
            "ema": {"decay": 0.9999},
            "mesh": {"data": 1, "fsdp": -1, "sequence": stage.get("sequence", 1), "tensor": 1},
            "train": {
                "steps": stage["steps"],
                "log_every": 20,
                "checkpoint_every": 1000,
                "measure_every": 1000,
                "measure_samples": 256,
                "preview_every": 2000,
                "stall_seconds": 50.0,
                "watchdog_seconds": 1800.0,
                "tuned_compiler": False,
            },
        }
    )


def _small(stage: dict[str, Any]) -> ConfigDict:
    """The same sections with the widths and the rates of the small VAE in configs/shapes_vae."""
    config = _config(stage)
    config.start = "configs/shapes_vae"
    config.model.update({"block_out_channels": (8, 16, 48, 48), "layers_per_block": 1, "norm_num_groups": 4})
    config.model.update({"remat": "none", "dtype": "float32"})
    config.critic.model.update({"widths": (8, 16, 32), "dtype": "float32"})
    config.critic.update({"lead_steps": 100})
    config.critic.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20})
    config.data.update({"held_out": stage.get("held_out", 0.05), "threads": 2})
    for bucket in config.data.buckets:
        bucket["intervals"] = (1, 2)
    config.tiling = ConfigDict(SMALL_TILING)
    config.optimizer.update({"warmup_steps": 50, "decay_steps": stage["steps"], "final_fraction": 0.02})
    config.ema.decay = 0.998
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1})
    config.train.update({"checkpoint_every": 250, "measure_every": 250, "measure_samples": 32, "preview_every": 500})
    return config


def get_config(part: str = "short_128") -> ConfigDict:
    """The config of one part."""
    if part not in (*STAGES, *SMALL):
        raise ValueError(f"configs/vae.py has the parts {', '.join((*STAGES, *SMALL))}, not {part!r}.")
    return _small(SMALL[part]) if part in SMALL else _config(STAGES[part])
