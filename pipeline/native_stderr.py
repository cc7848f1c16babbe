"""What native libraries print while they are loaded: kept off the terminal, unless they fail or end the process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# A process of its own, as a library that aborts leaves this one no time to say anything. It reads until it is told that
# loading failed, by a null character, or until nobody is left to write; if all went well, it is ended before.
_HOLDER = """
import os, sys
held, failed = b"", False
while not failed and (more := os.read(0, 2**16)):
    failed = more.endswith(b"\\0")
    held += more.rstrip(b"\\0")
if not failed:
    said = "what it printed stands above" if held.strip() else "it printed nothing, as where the processor lacks " \\
        "instructions that it was built for"
    held += f"error: the process was ended while {sys.argv[1]} was being loaded; {said}\\n".encode()
os.write(2, held)
"""
_holders: list[subprocess.Popen[bytes]] = []


@contextlib.contextmanager
def held_back(loaded: str) -> Iterator[None]:
    """Keep what is printed on descriptor 2 while `loaded` is being loaded off the terminal, unless that fails.

    In other threads too; the program's own messages go there by a descriptor of their own, as `cli.py` has it.
    """
    sys.stderr.flush()
    command = [sys.executable, "-IS", "-c", _HOLDER, loaded]
    try:  # a session of its own, as Ctrl-C in the terminal is for us
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:  # no further process may be started: what is printed is seen, then, rather than lost
        yield
        return
    _holders.append(holder)
    terminal, pipe = os.dup(2), holder.stdin
    assert pipe is not None
    os.dup2(pipe.fileno(), 2)
    pipe.close()
    try:
        yield
    except Exception:
        os.write(2, b"\0")
        holder.wait()
        raise
    finally:
        drop()  # before the descriptor is led back, which it would take for the end of this process
        os.dup2(terminal, 2)
        os.close(terminal)


def drop() -> None:
    """Forget what is held back, as where the program ends while something is being loaded for nothing."""
    while _holders:
        holder = _holders.pop()
        holder.kill()
        holder.wait()
