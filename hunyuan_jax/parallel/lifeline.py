"""How the processes of a run notice, within seconds, that one of them is gone.

    process 1 --hello, a byte now and then, bye--> process 0 <--hello, a byte now and then, bye-- process 2
              <--a byte now and then, who is lost--          --a byte now and then, who is lost-->

A connection that ends without a bye is a process that was killed or has failed; one on which nothing comes is a host that stands still
or that the network has lost. Either way those that are left say so in one line and end with the exit code LOST: they would else wait for
it in the middle of a sum, for ever. JAX's own service notices the same, later, and ends them with a trace of C++.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LOST = 4  # exit code of a process that has lost another
BEAT_SECONDS = 2.0  # between two signs of life
SILENT_SECONDS = 40.0  # without one, after which a process counts as lost; Python's lock may be held long, but not so long
HELLO_SECONDS = 60.0  # that process 0 has to answer at the start
BEAT, BYE, GONE = b".", b"-", b"!"  # a GONE is followed by a line that says who is


class Lifeline:
    """The connections of process `number` among `count`, watched by a thread; `end` is called with what to say when one is lost."""

    def __init__(self, number: int, count: int, *, end: Callable[[str], None] | None = None) -> None:
        self._number, self._count, self._end = number, count, end or _say_and_end
        self._selector = selectors.DefaultSelector()
        self._names: dict[socket.socket, str] = {}
        self._heard: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._listener: Any = None  # a socket, of process 0 alone
        self._token = ""
        self._parted = False

    def listen(self) -> str:
        """Process 0's part: waits for the others, in the background. Gives what they have to know."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=self._count, dualstack_ipv6=dual)
        self._token = secrets.token_hex(16)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._watch()
        return f"{self._listener.getsockname()[1]} {self._token}"

    def connect(self, host: str, told: str) -> None:
        """The others' part. Raises `OSError` where process 0 cannot be reached."""
        port, token = told.split()
        there = socket.create_connection((host, int(port)), timeout=HELLO_SECONDS)
        there.sendall(f"{token} {self._number} {socket.gethostname()}\n".encode())
        self._add(there, f"process 0 of {self._count} ({host})")
        self._watch()

    def part(self) -> None:
        """Says that this process has done what it had to do: its end is no loss to the others, and theirs none to it."""
        with self._lock:
            self._parted = True
            for there in list(self._names):
                _send(there, BYE)

    def _watch(self) -> None:
        threading.Thread(target=self._listen_and_beat, name="lifeline", daemon=True).start()

    def _add(self, there: socket.socket, name: str) -> None:
        there.setblocking(False)
        self._names[there], self._heard[there] = name, time.monotonic()
        with contextlib.suppress(KeyError):
            self._selector.unregister(there)
        self._selector.register(there, selectors.EVENT_READ)

    def _listen_and_beat(self) -> None:
        beat = time.monotonic()
        while not self._parted:
            before = time.monotonic()
            for key, _ in self._selector.select(BEAT_SECONDS):
                self._hear(key.fileobj)
            now = time.monotonic()
            if now - before > 3 * BEAT_SECONDS:  # this process itself stood still: what the others have said meanwhile is yet to be read
                self._heard = dict.fromkeys(self._heard, now)
            if now - beat >= BEAT_SECONDS:
                beat = now
                for there in self._names:
                    _send(there, BEAT)
            silent = [there for there, heard in self._heard.items() if now - heard > SILENT_SECONDS]
            if silent:
                self._lose(silent[0], f"has given no sign of life for {SILENT_SECONDS:.0f} s")

    def _hear(self, there: Any) -> None:
        """Takes in what comes over one connection."""
        if there is self._listener:
            self._greet(there.accept()[0])
            return
        try:
            said = there.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        self._heard[there] = time.monotonic()
        words = said.lstrip(BEAT)
        if words.startswith(BYE):  # whatever comes after it is no longer our concern
            self._forget(there)
        elif words.startswith(GONE):
            self._tell(words.removeprefix(GONE).decode(errors="replace").strip())
        elif not said:
            self._lose(there, "has ended or can no longer be reached; its log says why if it could say so")

    def _greet(self, newcomer: socket.socket) -> None:
        """Takes one of the processes in; whoever else knocks is turned away."""
        said = b""
        newcomer.settimeout(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            while b"\n" not in said and len(said) < 1024 and (more := newcomer.recv(1)):
                said += more
        words = said.decode(errors="replace").split()
        if len(words) == 3 and secrets.compare_digest(words[0].encode(), self._token.encode()):
            self._add(newcomer, f"process {words[1]} of {self._count} ({words[2]})")
        else:
            newcomer.close()

    def _forget(self, there: socket.socket) -> None:
        self._selector.unregister(there)
        del self._names[there], self._heard[there]
        there.close()

    def _lose(self, there: socket.socket, how: str) -> None:
        said = f"{self._names[there]} {how}"
        self._forget(there)
        self._tell(said)

    def _tell(self, said: str) -> None:
        """Tells the others who is lost, and ends; not where this process has parted, since all who were told of that may go."""
        with self._lock:
            if not self._parted:
                self._parted = True
                for other in self._names:
                    _send(other, GONE + f"{said}\n".encode())
                self._end(said)


def _send(there: socket.socket, said: bytes) -> None:
    with contextlib.suppress(OSError):  # who can no longer be told is heard of when its connection is read
        there.send(said)


def _say_and_end(said: str) -> None:
    text = f"error: {said}. This process ends too; the same command continues from the newest checkpoint."
    try:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # JAX's threads, which meet the same loss, write no more after this
        os.write(stderr, f"\n{text}\n".encode())
    finally:  # whether or not anyone can be told
        os._exit(LOST)
