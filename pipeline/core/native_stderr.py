"""Hide what native libraries print while they are loaded, unless loading fails or ends the process."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator

# Code of the helper process that holds the output back. A separate process is needed, as a library that aborts ends
# this one at once. The helper reads until a null character (loading failed) or the end of its input (the main process
# is gone), and then prints the output. If loading succeeds, the helper is killed first. A fatal signal is reported
# through a second pipe, at once: when the first process of a container ends, all its other processes are killed.
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
    """Hide what is written to descriptor 2 while the library `loaded` is loaded; print it if loading fails.

    The output of other threads is hidden too. The program's own messages are not, as `cli.py` gives them another
    descriptor.
    """
    sys.stderr.flush()
    heard, faults = os.pipe()
    command = [sys.executable, "-IS", "-c", _HOLDER, loaded, str(heard)]
    try:  # a session of its own, as Ctrl-C in the terminal must not end the helper
        holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[heard], start_new_session=True
        )
    except OSError:  # the helper cannot be started, so the output is not hidden
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
        with contextlib.suppress(BrokenPipeError):  # without the helper, the error of the loading is still raised
            os.write(2, b"\0")
        holder.wait()
        raise
    finally:
        drop()  # before descriptor 2 is restored, which the helper would take for the end of this process
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(faults)


@contextlib.contextmanager
def _faults_to(descriptor: int) -> Iterator[None]:
    """Have `faulthandler` report fatal signals to `descriptor`, unless it is enabled already."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(descriptor, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()


def drop() -> None:
    """Kill the helper processes and so discard the hidden output, also when the program ends during loading."""
    while _holders:
        holder = _holders.pop()
        holder.kill()
        holder.wait()
