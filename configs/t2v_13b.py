"""The 13B text-to-video ladder: the full HunyuanVideo DiT, trained from small images to 720p video.

    python -m hunyuan_jax.train --config=configs/t2v_13b.py:STAGE --workdir DIR

STAGE climbs image_256, image_512, video_256, video_360, video_540, video_720; each stage starts from the one before it. The
model is the same on every rung: 12,810,782,784 parameters without the guidance embedding, which only distillation adds.
"""

from ml_collections import ConfigDict

STAGES = ("image_256", "image_512", "video_256", "video_360", "video_540", "video_720")


def get_config(stage: str = "image_256") -> ConfigDict:
    """The config of one stage of the ladder."""
    if stage not in STAGES:
        raise ValueError(f"configs/t2v_13b.py has the stages {', '.join(STAGES)}, not {stage!r}; write --config=configs/t2v_13b.py:STAGE.")
    config = ConfigDict()
    config.stage = stage
    config.model = ConfigDict(
        {
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
            "remat": "full",
            "dtype": "bfloat16",
        }
    )
    return config
