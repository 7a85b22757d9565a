"""Starts a command as several processes of one run on this machine, as a pod's hosts would start it:

    python -m launch.local --processes 2 -- python -m hunyuan_jax.train --config=configs/quickstart.py:t2v --workdir DIR ...

Each process finds itself in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. SIGINT and SIGTERM are passed on. When one
process fails the others are ended, and its exit code is this program's; 128 and the signal's number for one that a signal ended. Of those
that fail together, the code is of one that did not merely lose another.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from hunyuan_jax.parallel.lifeline import LOST
from launch.children import ends_with_parent, passing_signals_to

GRACE_SECONDS = 90.0  # that processes have to end after a signal; a training saves meanwhile
POLL_SECONDS = 0.02
TOGETHER_SECONDS = 1.0  # others may end sooner for the loss of a process than it does itself


def free_port() -> int:
    """A port that nothing on this machine listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def variables(number: int, *, processes: int, port: int) -> dict[str, str]:
    """What tells process `number` who it is."""
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(number)}


def run(command: Sequence[str], *, processes: int, port: int) -> int:
    """Runs the processes to their end and gives the exit code of the first that failed, 0 where none did."""
    started: list[subprocess.Popen[bytes]] = []
    with passing_signals_to(started) as received:
        try:
            for number in range(processes):
                environment = os.environ | variables(number, processes=processes, port=port)
                # In a group of its own, so that a terminal does not send it the signals that are passed on to it.
                how = {"env": environment, "stdin": subprocess.DEVNULL, "process_group": 0, "preexec_fn": ends_with_parent()}
                started.append(subprocess.Popen(command, **how))  # type: ignore[call-overload]
            code = _wait(started, received)
        finally:
            _end(started)
    return 128 + received[0] if received else code


def _wait(started: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> int:
    """Waits until all have ended well, one has failed, or those that got a signal have had their time."""
    deadline = None
    while True:
        codes = [process.poll() for process in started]
        if any(codes) and not received:
            time.sleep(TOGETHER_SECONDS)
            failed = sorted((code for process in started if (code := process.poll())), key=lambda code: code == LOST)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        if received:
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline or len(received) > 1:
                return 0
        time.sleep(POLL_SECONDS)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs, kindly at first, with all that it has started."""
    running = [process for process in started if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(POLL_SECONDS)
    for process in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.local", description="Starts a command as several processes of one run on this machine.")
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--port", type=int, default=0, help="where the first process listens for the others (default: a free one)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --: what each process runs")
    options = parser.parse_args(argv)
    if options.processes < 1 or not 0 <= options.port < 65536:
        parser.error(f"--processes must be at least 1 and --port below 65536, not {options.processes} and {options.port}")
    if options.dry_run:
        for number in range(options.processes):
            told = variables(number, processes=options.processes, port=options.port)
            print(*(f"{name}={value}" for name, value in told.items()), shlex.join(options.command))
        return 0
    try:
        return run(options.command, processes=options.processes, port=options.port or free_port())
    except OSError as error:
        print(f"error: {options.command[0]} cannot be started: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
