"""What holds for every test: JAX runs on the CPU, and a reference model never asks the network for anything."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
