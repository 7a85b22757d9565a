"""The 13B text-to-video ladder: the full HunyuanVideo DiT, trained from small images to 720p video.

    python -m data_prep.encode --config=configs/t2v_13b.py:encode_STAGE --clips CLIPS --vae VAE --output LATENTS \
        --config.text.language=llava-llama-3-8b-v1_1-transformers --config.text.clip=clip-vit-large-patch14
    python -m hunyuan_jax.train --config=configs/t2v_13b.py:STAGE --workdir DIR --config.data.path=LATENTS

STAGE climbs image_256, image_512, video_256, video_360, video_540, video_720; images stay in every stage. The
model is the same on every rung: 12,810,782,784 parameters without the guidance embedding, which only distillation adds.

The language model and CLIP are folders of Hugging Face; any language model of the Llama layout will do, with model.text_dim as wide.
Going on from released weights needs the released template: --config.text.template=t2v_video --config.text.max_tokens=0.
"""

from typing import Any

from ml_collections import ConfigDict

# Buckets are (frames, height, width, batch, share of the steps).
# Devices share the tokens of a sample (`sequence`) where a batch has fewer samples than a pod of 256 chips has chips.
# Resolutions and frame counts are those of the report (section 4.4); it publishes neither batches nor rates, so those are ours.
STAGES: dict[str, Any] = {
    "image_256": {"steps": 200_000, "learning_rate": 1e-4, "shift": 1.0, "buckets": ((1, 256, 256, 2048, 1.0),)},
    "image_512": {"steps": 100_000, "learning_rate": 1e-4, "shift": 1.5, "buckets": ((1, 256, 256, 2048, 1.0), (1, 512, 512, 512, 1.0))},
    "video_256": {"steps": 100_000, "learning_rate": 5e-5, "shift": 2.0, "buckets": ((1, 256, 256, 2048, 1.0), (65, 256, 256, 256, 4.0))},
    "video_360": {
        "steps": 50_000,
        "learning_rate": 5e-5,
        "shift": 3.0,
        "buckets": ((1, 512, 512, 512, 1.0), (129, 352, 640, 128, 4.0)),
        "sequence": 2,
    },
    "video_540": {
        "steps": 30_000,
        "learning_rate": 2e-5,
        "shift": 5.0,
        "buckets": ((1, 960, 960, 256, 1.0), (129, 544, 960, 64, 4.0)),
        "sequence": 4,
    },
    "video_720": {
        "steps": 20_000,
        "learning_rate": 2e-5,
        "shift": 7.0,
        "buckets": ((1, 960, 960, 256, 1.0), (129, 720, 1280, 32, 4.0)),
        "sequence": 8,
    },
}

TEMPLATE = (
    "Read the description of a film clip. Keep in mind who and what is in it, how everything looks and where it stands, what moves and "
    "how, the light, the style and the mood, and what the camera does.\nDescription: {}"
)
DETAILS = ("background", "style", "shot_type", "lighting", "atmosphere", "camera_motion")


def get_config(stage: str = "image_256") -> ConfigDict:
    """The config of one stage of the ladder, or of the encoding for one."""
    name = stage.removeprefix("encode_")
    if name not in STAGES:
        raise ValueError(
            f"configs/t2v_13b.py has the stages {', '.join(STAGES)}, each of them with encode_ before it too, not {stage!r}; "
            "write --config=configs/t2v_13b.py:STAGE."
        )
    return _train(name) if name == stage else _encode(name)


def _encode(stage: str) -> ConfigDict:
    """Clips to latents in the released tiles, and to the states of several prompts each."""
    return ConfigDict(
        {
            "buckets": tuple(
                {"frames": t, "height": h, "width": w, "batch": 1 if t > 1 else 8} for t, h, w, *_ in STAGES[stage]["buckets"]
            ),
            "text": {
                "language": "",
                "language_tokenizer": "",
                "clip": "",
                "clip_tokenizer": "",
                "template": TEMPLATE,
                "template_file": "",
                "max_tokens": 256,
                "skip_layers": 2,
                "dtype": "bfloat16",
            },
            "assemble": {
                "lengths": {
                    "short": {"weight": 1.0, "fields": ("short",)},
                    "medium": {"weight": 1.0, "fields": ("short",), "extras": DETAILS, "extra_count": (1, 3)},
                    "long": {"weight": 2.0, "fields": ("dense", *DETAILS)},
                },
                "keep": dict.fromkeys(DETAILS, 0.8),
            },
            "variants": 4,
            "store_text": True,  # False leaves the states to training
            "clips_per_shard": 256,
            "tiling": {"tile": (64, 256, 256), "overlap": (16, 64, 64)},
        }
    )


def _train(stage: str) -> ConfigDict:
    of_stage = STAGES[stage]
    frames, height, width = of_stage["buckets"][-1][:3]
    return ConfigDict(
        {
            "stage": stage,
            "task": "t2v",
            "seed": 0,
            "text": {"language": "", "clip": ""},  # where the encoders lie, if training needs them and they are not where they were
            "start": "",  # weights to go on from, in any layout: the stage before, exported, or released ones
            "model": {
                "width": 3072,
                "num_heads": 24,
                "num_double_blocks": 20,
                "num_single_blocks": 40,
                "num_refiner_blocks": 2,
                "mlp_ratio": 4.0,
                "patch_size": (1, 2, 2),
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,  # the language tower's hidden states
                "pooled_dim": 768,  # CLIP's pooled text
                "guidance_embed": False,
                "rope_axes": (16, 56, 56),
                "rope_theta": 256.0,
                "remat": "attention",
                "attention": "auto",
                "context": "ring",
                "context_degree": 0,
                "dtype": "bfloat16",
            },
            "video": {"frames": frames, "height": height, "width": width, "interval": 1, "fps": 24.0},
            "loss": {"time_shift": of_stage["shift"], "text_dropout": 0.1},
            "sampling": {"steps": 50, "shift": 7.0, "cfg_scale": 6.0},
            "data": {
                "path": "",
                "kind": "Latent",
                "text_length": 256,
                "threads": 16,
                "quarantine_limit": 0.001,
                "buckets": tuple(
                    {"frames": t, "height": h, "width": w, "batch": batch, "share": share} for t, h, w, batch, share in of_stage["buckets"]
                ),
            },
            "optimizer": {
                "learning_rate": of_stage["learning_rate"],
                "warmup_steps": 1000,
                "b2": 0.99,
                "weight_decay": 0.01,
                "offload": False,  # True: what it keeps of the parameters lies in the hosts' memory
            },
            "ema": {"decay": 0.9999},
            "mesh": {"data": 1, "fsdp": -1, "sequence": of_stage.get("sequence", 1), "tensor": 1},
            "train": {
                "steps": of_stage["steps"],
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
