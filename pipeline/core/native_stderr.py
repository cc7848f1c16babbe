"""What native libraries print while they are loaded: kept off the terminal, unless they fail or end the process."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator

# A process of its own, as a library that aborts leaves this one no time to say anything. It reads until it is told that
# loading failed, by a null character, or until nobody is left to write; if all went well, it is ended before. Of a
# signal that ends the process it hears at once: the first process of a container takes all others with it.
_HOLDER = """
import os, select, sys
held, failed, faults = b"", False, int(sys.argv[2])
while not failed:
    ended = faults in select.select([0, faults], [], [])[0]
    os.set_blocking(0, not ended)
    try:
        more = os.read(0, 2**20)
    except BlockingIOError:
        break
    if not more:
        break
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
def hold_back(loaded: str) -> Iterator[None]:
    """Keep what is printed on descriptor 2 while `loaded` is being loaded off the terminal, unless that fails.

    In other threads too; the program's own messages go there by a descriptor of their own, as `cli.py` has it.
    """
    sys.stderr.flush()
    heard, faults = os.pipe()
    command = [sys.executable, "-IS", "-c", _HOLDER, loaded, str(heard)]
    try:  # a session of its own, as Ctrl-C in the terminal is for us
        holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[heard], start_new_session=True
        )
    except OSError:  # no further process may be started: what is printed is seen, then, rather than lost
        os.close(faults)
        yield
        return
    finally:
        os.close(heard)
    _holders.append(holder)
    terminal, pipe = os.dup(2), holder.stdin
    assert pipe is not None
    os.dup2(pipe.fileno(), 2)
    pipe.close()
    try:
        with _faults_to(faults):
            yield
    except Exception:
        with contextlib.suppress(BrokenPipeError):  # it is gone, and what failed is what is to be heard of
            os.write(2, b"\0")
        holder.wait()
        raise
    finally:
        drop()  # before the descriptor is led back, which it would take for the end of this process
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(faults)


@contextlib.contextmanager
def _faults_to(descriptor: int) -> Iterator[None]:
    """Have a signal that ends this process written to a descriptor, unless somebody else has asked for that."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(descriptor, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()


def drop() -> None:
    """Forget what is held back, as where the program ends while something is being loaded for nothing."""
    while _holders:
        holder = _holders.pop()
        holder.kill()
        holder.wait()
