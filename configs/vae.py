"""The causal 3D VAE by the report's recipe (section 4.1): L1 + 0.1 LPIPS + 0.05 adversarial + 1e-6 KL, on images and video 1:4.

    python -m hunyuan_jax.train --config=configs/vae.py:PART --workdir DIR --config.data.path=CLIPS \
        --config.loss.lpips_files=vgg16.safetensors,lpips_vgg.safetensors

PART climbs short_128, short_256, long_256, long_512, tiling, each from the one before (--config.start=its export); the last keeps
the shapes of long_512 and is the phase in which tiling is switched on and off. The model is the released one of 246,478,803
parameters, trained from nothing and from no image VAE. Frames are taken at a random interval of 1 to 8.

shapes walks the whole recipe at small widths on the shapes world, the adversary included: minutes on 2 CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

INTERVALS = tuple(range(1, 9))

# Buckets are (frames, height, width, batch, share of the steps). The report publishes neither resolutions nor batches, rates or the
# discriminator, so those are ours. A critic is fresh in every stage and begins when reconstructions are sound.
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
    },
    "tiling": {
        "steps": 20_000,
        "learning_rate": 1e-5,
        "critic_start": 2_000,
        "buckets": ((1, 512, 512, 128, 1.0), (65, 512, 512, 32, 4.0)),
    },
}

SHAPES: dict[str, Any] = {
    "steps": 400,
    "learning_rate": 6e-4,
    "critic_start": 200,
    "buckets": ((1, 32, 32, 8, 1.0), (9, 32, 32, 4, 4.0)),
}


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
                "convolution": "volume",
                "dtype": "bfloat16",
            },
            "loss": {"kl_weight": 1e-6, "lpips_weight": 0.1, "lpips_files": "", "lpips_frames": 8},
            "critic": {
                "model": {"widths": (64, 128, 256, 512), "time_halvings": 2, "convolution": "volume", "dtype": "bfloat16"},
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
                "buckets": tuple(
                    {"frames": t, "height": h, "width": w, "intervals": INTERVALS, "batch": batch, "share": share}
                    for t, h, w, batch, share in stage["buckets"]
                ),
            },
            "optimizer": {"learning_rate": stage["learning_rate"], "warmup_steps": 1000, "b2": 0.99},
            "ema": {"decay": 0.9999},
            "mesh": {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
            "train": {
                "steps": stage["steps"],
                "log_every": 20,
                "checkpoint_every": 1000,
                "measure_every": 1000,
                "measure_samples": 256,
                "preview_every": 2000,
            },
        }
    )


def _shapes() -> ConfigDict:
    """The same sections with the widths, the crops and the rates of the small VAE in configs/shapes_vae."""
    config = _config(SHAPES)
    config.model.update({"block_out_channels": (8, 16, 48, 48), "layers_per_block": 1, "norm_num_groups": 4})
    config.model.update({"convolution": "planes", "dtype": "float32"})
    config.critic.model.update({"widths": (8, 16, 32), "convolution": "planes", "dtype": "float32"})
    config.critic.update({"lead_steps": 50})
    config.critic.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20})
    config.data.update({"held_out": 0.05, "threads": 2})
    for bucket in config.data.buckets:
        bucket["resize"] = (64, 64)
    config.optimizer.update({"warmup_steps": 50})
    config.ema.decay = 0.99
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1})
    config.train.update({"log_every": 10, "checkpoint_every": 200, "measure_every": 200, "measure_samples": 16, "preview_every": 200})
    return config


def get_config(part: str = "short_128") -> ConfigDict:
    """The config of one part."""
    if part not in (*STAGES, "shapes"):
        raise ValueError(f"configs/vae.py has the parts {', '.join(STAGES)} and shapes, not {part!r}.")
    return _shapes() if part == "shapes" else _config(STAGES[part])
