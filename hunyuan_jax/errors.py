"""The one kind of error a user can cause, and how every command ends on it.

Whatever a user can mend (a missing folder, a misspelt key, a full disk) is raised as a `UserError` whose text says what was
expected, what came and what to do. `run_command` turns it into one line on stderr and exit code 2, without a traceback; a
bug of ours still ends in a traceback.
"""

import difflib
import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """What was expected, what came, and what to do about it, in one or two sentences."""


def nearest(name: str, known: list[str]) -> str:
    """The hint that ends an error about an unknown name: the nearest known one, or the list of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(known))}."


_DISK_ERRORS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EROFS: "The file system is read-only",
    errno.EACCES: "Permission was denied",
}


def explain_disk_error(error: BaseException) -> str | None:
    """The sentence for an error of the disk that a user can mend, or None for one that points to a bug.

    The libraries that write shards and checkpoints are in C++ and hand such an error on as text, within errors of their own.
    """
    chain: BaseException | None = error
    while chain is not None:
        for number, said in _DISK_ERRORS.items():
            if (isinstance(chain, OSError) and chain.errno == number) or os.strerror(number) in str(chain):
                name = getattr(chain, "filename", None)
                where = f" at {name}" if name else ""
                return f"{said}{where}. Free some space or choose another folder, then run the same command again; it continues."
        chain = chain.__cause__ or chain.__context__
    return None


leave: Callable[[int], None] = sys.exit  # how a command that failed ends its process; a run of several processes has another way


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)` as a command: a `UserError` becomes `error: ...` on stderr and exit code 2."""
    try:
        main(sys.argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except Exception as error:
        said = explain_disk_error(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # at once: threads that still write checkpoints would say the same again, with tracebacks
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        leave(130)
