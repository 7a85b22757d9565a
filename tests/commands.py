"""What tests start as processes of their own: the commands a user types, and programs on eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_module(*arguments: str, expect: int = 0, minutes: float = 10) -> str:
    """What `python -m MODULE ...` prints, to both outputs. It must end with the code `expect`, and no user sees a traceback."""
    return _run("-m", *arguments, expect=expect, environment=dict(os.environ), minutes=minutes)


def run_program(program: str) -> str:
    """What a Python program prints. It sees of the environment only where compiled programs are kept."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    return _run("-c", program, expect=0, environment={**kept, "PATH": "", "PYTHONPATH": str(ROOT)}).strip()


def _run(*arguments: str, expect: int, environment: dict[str, str], minutes: float = 10) -> str:
    command, timeout = [sys.executable, *arguments], 60 * minutes
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr
