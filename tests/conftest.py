"""What holds for every test: JAX runs on the CPU, programs are compiled once and in haste, and no model asks the network."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs of tests are larger to compile than to run
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Every process of one run of the tests, the commands that they start among them, shares what is compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}

LONGEST = (
    "test_path.py",
    "test_tpu.py",
    "test_vae_training.py",
    "test_export.py",
    "test_dit_parity.py",
    "test_vae_parity.py",
    "test_distributed.py",
)


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take longest begin first, so that processes which share the files end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
