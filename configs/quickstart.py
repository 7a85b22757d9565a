"""The shapes world: everything tiny, the same code as the 13B run. The argument picks the part.

vae                a few more steps for the small VAE that lies in configs/shapes_vae (minutes on 2 CPU cores)
vae_first          the training of that VAE from nothing, mostly on small crops (half an hour on 2 CPU cores)
vae_finish         its second half, on whole frames; starts from the first, exported (half an hour on 2 CPU cores)
encode             how clips become latents and text states
t2v                a small DiT: 13 frames of 64 x 64 pixels, minutes on 2 CPU cores
t2v_long           a wider DiT: 17 frames, three quarters of an hour on 2 CPU cores

python -m hunyuan_jax.train --config=configs/quickstart.py:t2v --workdir DIR --config.data.path=LATENTS
"""

from ml_collections import ConfigDict

WHOLE = {"frames": 9, "height": 64, "width": 64, "batch": 1}


def _vae(steps: int) -> ConfigDict:
    return ConfigDict(
        {
            "task": "vae",
            "seed": 0,
            "start": "",
            "model": {
                "block_out_channels": (8, 16, 48, 48),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "convolution": "planes",
            },
            "loss": {"kl_weight": 1e-6},
            "data": {"path": "", "kind": "Clip", "held_out": 0.05, "buckets": ()},
            "optimizer": {"learning_rate": 6e-4, "warmup_steps": 100, "decay_steps": steps, "final_fraction": 0.02, "b2": 0.99},
            "ema": {"decay": 0.998},
            "mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
            "train": {
                "steps": steps,
                "log_every": 20,
                "checkpoint_every": 500,
                "measure_every": 500,
                "measure_samples": 32,
                "preview_every": 500,
            },
        }
    )


def _vae_first() -> ConfigDict:
    """Crops of a quarter of the frame, four at once, see more clips in the same time than whole frames do."""
    config = _vae(8000)
    config.data.buckets = (
        {"frames": 9, "height": 32, "width": 32, "intervals": (1, 2), "resize": (64, 64), "batch": 4, "share": 5.0},
        {**WHOLE, "intervals": (1, 2), "share": 2.0},
        {"frames": 17, "height": 64, "width": 64, "batch": 1, "share": 0.5},
        {"frames": 1, "height": 64, "width": 64, "batch": 8, "share": 1.0},
    )
    return config


def _vae_finish() -> ConfigDict:
    """Whole frames, mostly every second one, whose faster motion is the harder part; at a lower rate than the first half."""
    config = _vae(6000)
    config.data.buckets = (
        {**WHOLE, "intervals": (2,), "share": 4.0},
        {**WHOLE, "intervals": (1, 2), "share": 1.0},
        {"frames": 17, "height": 64, "width": 64, "batch": 1, "share": 1.0},
        {"frames": 1, "height": 64, "width": 64, "batch": 8, "share": 0.5},
    )
    config.optimizer.learning_rate = 4e-4
    return config


def _vae_further() -> ConfigDict:
    """A short continuation of the carried weights, at a low learning rate."""
    config = _vae(10)
    config.start = "configs/shapes_vae"
    config.data.buckets = ({**WHOLE, "frames": 13},)
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 5
    config.train.update({"log_every": 1, "checkpoint_every": 10, "measure_every": 0, "preview_every": 10})
    return config


def _encode(frames: int) -> ConfigDict:
    return ConfigDict(
        {
            "buckets": (
                {"frames": frames, "height": 64, "width": 64, "batch": 8},
                {"frames": 1, "height": 64, "width": 64, "batch": 32},
            ),
            "text": {
                "tower": {
                    "vocab_size": 259,
                    "width": 64,
                    "num_layers": 4,
                    "skip_layers": 2,
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "mlp_width": 128,
                    "rope_theta": 100.0,
                },
                "template": "Video: {}",
                "max_bytes": 48,
                "max_tokens": 8,
                "tokens": "words",
                "pooled": "mean",
                "seed": 0,
            },
            "prompts": (("short",),),
            "clips_per_shard": 512,
            "whitening_ridge": 0.1,
            "measure_text": True,
        }
    )


def _t2v(frames: int, steps: int, *, num_heads: int) -> ConfigDict:
    """Large patches make a clip few tokens, so that a small computer sees many clips; the model then has to predict the data."""
    return ConfigDict(
        {
            "task": "t2v",
            "seed": 0,
            "start": "",
            "model": {
                "width": 32 * num_heads,
                "num_heads": num_heads,
                "num_double_blocks": 2,
                "num_single_blocks": 4,
                "text_dim": 64,
                "pooled_dim": 64,
                "num_refiner_blocks": 1,
                "patch_size": (1, 4, 4),
                "rope_axes": (8, 12, 12),
            },
            "prediction": "data",
            "video": {"frames": frames, "height": 64, "width": 64, "interval": 1, "fps": 12.0},
            # Direction is decided close to noise: large even shapes show through it down to a tenth of their strength.
            "loss": {"text_dropout": 0.1, "time_shift": 4.0, "time_least": 0.05},
            "sampling": {"steps": 30, "shift": 4.0, "cfg_scale": 3.0},
            "data": {
                "path": "",
                "kind": "Latent",
                "held_out": 0.05,
                "text_length": 8,
                "buckets": (
                    {"frames": frames, "height": 64, "width": 64, "batch": 32, "share": 7.0},
                    {"frames": 1, "height": 64, "width": 64, "batch": 64, "share": 1.0},
                ),
            },
            # Muon for the matrices inside blocks; what only turns conditions or patches into vectors is cheaper by AdamW.
            "optimizer": {
                "kind": "muon",
                "learning_rate": 7e-3,
                "warmup_steps": 50,
                "decay_steps": steps,
                "final_fraction": 0.02,
                "b2": 0.98,
                "newton_schulz_steps": 3,
                "not_muon": ("mod", "adaLN", "_in/", "embedder", "final_layer"),
                "adam_rate": 0.3,
                "weight_decay": 0.1,
            },
            "ema": {"decay": 0.99},
            "mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
            "train": {
                "steps": steps,
                "log_every": 10,
                "checkpoint_every": 500,
                "measure_every": 500,
                "measure_samples": 64,
                "preview_every": 1000,
            },
        }
    )


PARTS = {
    "vae": _vae_further,
    "vae_first": _vae_first,
    "vae_finish": _vae_finish,
    "encode": lambda: _encode(13),
    "encode_long": lambda: _encode(17),
    "t2v": lambda: _t2v(13, 1300, num_heads=4),
    "t2v_long": lambda: _t2v(17, 8000, num_heads=6),
}


def get_config(part: str = "t2v") -> ConfigDict:
    """The config of one part."""
    if part not in PARTS:
        raise ValueError(f"configs/quickstart.py has the parts {', '.join(PARTS)}, not {part!r}.")
    return PARTS[part]()
