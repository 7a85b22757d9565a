"""Curation: raw video files -> single-shot clips that are sharp, move, and differ, with captions.

    python -m data_prep.curate --input DIR --output DIR --config configs/curation.py --workers 2
    python -m data_prep.curate ... --config.filter.max_blur=0.6 --config.split.max_seconds=5

The limits serve the shapes world (96 pixels, 12 frames a second) and real films alike, since lengths are relative to the
picture. Tighten them for a set of high quality: see the scores of what was kept in manifest.parquet and of what was dropped in
rejected.parquet. Running again with another config asks for a new output folder, or --restart.

Expected on 2 CPU cores: 2000 shots of the shapes world in about a minute, every planted defect found, and 0.5 % of the sound
shots dropped, which pan or zoom so gently that no motion is seen.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; there are no variants, so `arg` stays empty."""
    if arg:
        raise ValueError(f"configs/curation.py has no variants, but {arg!r} came.")
    config = ConfigDict()
    config.find = ConfigDict(
        {"extensions": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv")}
    )
    config.split = ConfigDict(
        {
            "adaptive_threshold": 3.5,  # a cut changes the picture 3.5 times as much as the 3 frames before and after it
            "min_content": 15.0,
            "window_frames": 3,
            "min_shot_seconds": 0.6,
            "min_seconds": 1.0,
            "max_seconds": 10.0,
        }
    )
    config.score = ConfigDict(
        {
            "flow_short_side": 256,
            "flow_fps": 8.0,
            "slowest_seconds": 1.0,
            "blur_short_side": 480,
            "sample_fps": 4.0,
            "samples": 8,
            "start_seconds": 0.5,
        }
    )
    config.filter = ConfigDict(
        {
            "min_seconds": 1.0,
            "min_short_side": 64,
            "min_luma": 12.0,
            "max_luma": 243.0,
            "min_contrast": 5.0,
            "max_blur": 0.7,  # a Gaussian blur of 1 % of the short side gives 0.8 or more, sharp film 0.15 to 0.5
            "min_motion": 0.0001,  # an empty road under a fixed camera has 0.00002, a slow sign language clip 0.002
            "max_motion": 1.0,
            "max_border": 0.03,
            "max_text": 0.15,
        }
    )
    # Copies in another codec and size have 0.996 or more, one person in one room up to 0.98.
    config.dedup = ConfigDict({"similarity": 0.99, "bands": 10, "band_bits": 10})
    config.caption = ConfigDict({"min_overlap": 0.7})
    config.write = ConfigDict({"clips_per_shard": 512, "crf": 18, "max_short_side": 720})
    # How the job runs; changes nothing in what it writes.
    config.run = ConfigDict(
        {
            "isolate": False,  # decode in a child process, so that a file that crashes the decoder costs only itself
            "timeout_seconds": 600,  # of one file, where it is isolated
        }
    )
    return config
