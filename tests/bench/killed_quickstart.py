"""Kills the quickstart at random moments, lets it end, and compares what it leaves with a run that nobody disturbed.

    bash launch/quickstart.sh REFERENCE
    python -m tests.bench.killed_quickstart --reference REFERENCE --run DIR

Odd kills end the quickstart alone, even ones every process of it at once, as a power cut does. Exit code 1 where anything differs
but times and memory.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SECONDS = (5.0, 110.0)  # between a start and its kill
MEASURED = ("seconds", "peak_gib")  # what no two runs have alike


def run_once(folder: Path, log: Path, *, seconds: float | None, everything: bool) -> int | None:
    """The quickstart in `folder`, killed after so many seconds if it has not ended by then; its exit code, None where it was killed."""
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "quickstart.py"), str(folder)], stdout=output, stderr=output)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True) if everything else []
            process.kill()
            for child in children:
                child.kill()
            process.wait()
            return None


def left_by(folder: Path) -> dict[str, object]:
    """The figures and the bytes of the videos that a finished quickstart left."""
    summary = json.loads((folder / "summary.json").read_text())
    videos = sorted((folder / "videos").glob("*.mp4"))
    return {
        "summary": {name: value for name, value in summary.items() if name not in MEASURED},
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "videos": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in videos},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.killed_quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="folder of a finished quickstart")
    parser.add_argument("--run", type=Path, required=True, help="folder for the one that is killed")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    log, draw, start = args.run / "killed.log", random.Random(args.seed), time.monotonic()
    for kill in range(1, args.kills + 1):
        seconds = draw.uniform(*SECONDS)
        code = run_once(args.run, log, seconds=seconds, everything=kill % 2 == 0)
        done = ", ".join(json.loads((args.run / ".steps.json").read_text())["done"]) or "none"
        print(f"kill {kill} after {seconds:.0f} s: {'it had ended' if code is not None else f'done were {done}'}", flush=True)
    code = run_once(args.run, log, seconds=None, everything=False)
    if code:
        print(f"The quickstart ended with code {code}; see {log}.")
        return 1
    reference, killed = left_by(args.reference), left_by(args.run)
    for name, value in reference.items():
        print(f"{name:12} {'equal' if value == killed[name] else 'DIFFERENT'}")
    print(f"{time.monotonic() - start:.0f} s with {args.kills} kills")
    return 0 if reference == killed else 1


if __name__ == "__main__":
    sys.exit(main())
