"""Run the command line in a process forked from one that has imported TensorFlow, which saves most of its start.

Each process of pytest has one server, which has imported what commands import and has computed nothing. A warm process
is a fork of it, with streams, environment and folder of its own; it ends by itself and can be killed. Variables that
Python or a library reads when it starts have no effect there, but for the streams' encoding (PYTHONIOENCODING): to test
those, start `cli.py` itself. Plots are rendered where `plots` is True. All warm processes of a server share the seed
of Python's hashes.

As a program, this module is the server: python tests/warm.py SOCKET
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NoReturn, Self

ROOT = Path(__file__).parent.parent
_IMPORTED = (
    "jinja2", "matplotlib.pyplot", "sklearn.linear_model", "sklearn.preprocessing", "skops.io",
    "pipeline.extraction.compute", "pipeline.training.finetune", "pipeline.report", "pipeline.training.sweep.sweep",
    "pipeline.training.train_head",
)  # fmt: skip
_LENGTH = 8  # bytes of the number that precedes each message
_ENVIRONMENT = dict(os.environ)  # copied before any test has changed it
_STARTING = threading.Lock()
plots = True  # whether processes that are started render plots; see `conftest.no_plots`
_servers: dict[str, subprocess.Popen[bytes]] = {}  # address → process; empty until the server is needed


class Process:
    """A warm process, with the interface of `subprocess.Popen`. At the end of a `with` block it is killed."""

    def __init__(
        self,
        arguments: list[str],
        *,
        cwd: Path = ROOT,
        env: dict[str, str],
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] | Path = subprocess.DEVNULL,
        stderr: int | IO[Any] | Path = subprocess.DEVNULL,
        program: str = "cli",
        start_new_session: bool = False,
        listening: str | None = None,
    ) -> None:
        """Start `cli.py`, or another module as `python -m` does; a path of a stream names the file to write.

        The parent is the server of this process, or the one at the socket `listening`.
        """
        self.args = arguments
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(listening or server())
        message = json.dumps([program, arguments, str(cwd), env, start_new_session, plots]).encode()
        with ExitStack() as opened:
            numbers = list[int]()
            for stream, mode in ((stdin, "rb"), (stdout, "wb"), (stderr, "wb")):
                path = Path(os.devnull) if stream == subprocess.DEVNULL else stream
                file = opened.enter_context(path.open(mode)) if isinstance(path, Path) else path
                numbers.append(file if isinstance(file, int) else file.fileno())
            socket.send_fds(self._connection, [len(message).to_bytes(_LENGTH)], numbers)
        self._connection.sendall(message)
        self.pid = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None as long as the process runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = self._answer()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)  # no other process gets this number before the exit code is read here

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _answer(self) -> int:
        return int.from_bytes(_exactly(self._connection, _LENGTH), signed=True)


class ColdProcess(subprocess.Popen[str]):
    """`subprocess.Popen`, which starts a program from nothing. At the end of a `with` block it is killed."""

    def __exit__(self, *exception: Any) -> None:
        self.kill()
        super().__exit__(*exception)


AnyProcess = Process | ColdProcess


def server() -> str:
    """Return the socket of the server of this process, starting it once; it ends when this process does."""
    with _STARTING:
        if not _servers:
            path = f"{tempfile.mkdtemp(prefix='warm-')}/socket"
            line, pipe = [sys.executable, __file__, path], subprocess.PIPE
            started = subprocess.Popen(line, cwd=ROOT, env=_ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=sys.__stderr__)
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
            _servers[path] = started
    return next(iter(_servers))


def render_nothing(figure: Any, as_png: bool) -> bytes:
    """Return the least that passes for a plot."""
    return b"\x89PNG" if as_png else b"<svg/>"


def _exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = connection.recv(count - len(got))
        if not more:
            raise EOFError("the server of warm processes has ended")
        got += more
    return got


def _serve(path: str) -> None:
    _import_all()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system removes ended children, whose exit codes are not needed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and then standard input ends
    print("ready", flush=True)
    while 0 not in select.select([listener, 0], [], [])[0]:
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _start_and_wait(connection)
        connection.close()
    shutil.rmtree(Path(path).parent)


def _start_and_wait(connection: socket.socket) -> NoReturn:
    """Start the requested process, and send its number and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, _LENGTH, 3)
    message = _exactly(connection, int.from_bytes(length))
    process = os.fork()
    if process == 0:
        connection.close()
        _run(streams, *json.loads(message))
    for stream in (*streams, 0, 1):
        os.close(stream)
    try:
        connection.sendall(process.to_bytes(_LENGTH, signed=True))
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        connection.sendall(code.to_bytes(_LENGTH, signed=True))
        connection.recv(1)  # the process keeps its number until the exit code has been read
    except OSError:
        pass  # the test that started the process has ended
    os._exit(0)


def _run(
    streams: list[int],
    program: str,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    in_new_session: bool,
    draws: bool,
) -> NoReturn:
    import cli
    from pipeline.runs import plots as drawing

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if in_new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if not draws:
        drawing._rendered = render_nothing
    sys.argv = [str(ROOT / "cli.py") if program == "cli" else program, *arguments]
    if "PYTHONIOENCODING" in environment:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=environment["PYTHONIOENCODING"])  # type: ignore[union-attr]
    code = 1
    try:
        if program == "cli":
            cli.run_and_exit()
        else:
            runpy.run_module(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_all() -> None:
    """Import what commands import, and compute nothing: a fork does not have the threads of TensorFlow."""
    sys.path.insert(0, str(ROOT))
    from pipeline.backbone.keras_start import import_keras

    import_keras()  # first: what has been imported cannot be hidden from Keras
    for name in _IMPORTED:
        importlib.import_module(name)
    importlib.import_module("cli")._command()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _serve(sys.argv[1])
