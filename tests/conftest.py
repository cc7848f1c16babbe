"""What several test modules share: the command line as a subprocess, and folders of small images."""

from __future__ import annotations

import fcntl
import functools
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import cv2
import numpy as np
import pytest
import warm
from hypothesis import HealthCheck, settings

from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core.spec import FeatureSpec
from pipeline.images import decoding

if TYPE_CHECKING:
    from deployed import Deployed

ROOT = Path(__file__).parent.parent
T = TypeVar("T")
TIMEOUT_S = 300.0  # of one answer of a server or a browser, as the machine may be busy

# What Hypothesis tries is the same every time, unless it is told to look further: --hypothesis-profile=explore
_ALWAYS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("kept", derandomize=True, database=None, max_examples=100, **_ALWAYS)
settings.register_profile("explore", max_examples=3000, **_ALWAYS)
settings.load_profile("kept")

# The space of untrained weights in float32, as `features --weights untrained --precision float32` makes it.
SPEC = FeatureSpec(
    backbone="inception_v3",
    weights="untrained:glorot_centred_1:0",
    layer="mixed10",
    input_size=299,
    decode=decoding.DECODE_POLICY,
    resize=decoding.RESIZE_POLICY,
    fit="squash",
    scaling="x/127.5-1",
    precision="float32",
    engine="folded",
    storage="float16",
)


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; fails the test if there is anything else."""
        return json.loads(self.out)


def command_line(data: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """The environment without what would change answers, and with every download sent to a closed port."""
    closed = "http://127.0.0.1:9"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ICEBOX_")}
    return {**kept, "http_proxy": closed, "https_proxy": closed, "no_proxy": "", "COLUMNS": "200", **more}


def icebox(data: Path, *arguments: str | Path, cwd: Path = ROOT, **env: str) -> Finished:
    """Run `cli.py` with its data in `data`, in a warm process; given variables of the environment, from the start."""
    line = command_line(data, *arguments)
    if env:
        done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment(**env), timeout=900)
        return Finished(done.returncode, done.stdout, done.stderr)
    return finished(line[2:], cwd)


def finished(
    arguments: list[str],
    cwd: Path = ROOT,
    program: str = "cli",
    env: dict[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> Finished:
    """Run `cli.py`, or another program, in a warm process to its end, with `env` instead of `environment()`."""
    streams: dict[str, Any] = {"stdin": stdin, "program": program}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with warm.Process(arguments, cwd=cwd, env=env or environment(), stdout=out, stderr=err, **streams) as process:
            code = process.wait(900)
        return Finished(code, *(_written(file) for file in (out, err)))


def _written(file: IO[bytes]) -> str:
    file.seek(0)
    return io.TextIOWrapper(file, "utf-8", "surrogateescape").read()


def python(script: str) -> str:
    """Run a script in a process that has imported Keras; return what it prints, and fail if it complains."""
    command = [
        sys.executable,
        "-c",
        f"import gc, sys\nfrom pipeline.backbone.keras_start import import_keras\n{script}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def wait_until(condition: Callable[[], T | None], seconds: float = 120, process: warm.AnyProcess | None = None) -> T:
    """Return what `condition` does once that is true; the test fails if it never is, or if `process` ends before."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, f"ended with exit code {process.poll()}"
        time.sleep(0.02)
    return found


def picture(seed: int, height: int = 40, width: int = 50, channels: int = 3) -> np.ndarray:
    """A smooth coloured image, different for every seed: uint8 (height, width, channels), BGR as OpenCV writes it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, channels), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def write_picture(path: Path, seed: int, **shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture(seed, **shape))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two classes of six images each."""
    root = tmp_path / "photos"
    for i in range(12):
        write_picture(root / ("cats" if i % 2 else "dogs") / f"{i}.png", seed=i)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """An empty cache, opened."""
    monkeypatch.delenv("ICEBOX_INDEX", raising=False)
    with closing(Cache(tmp_path / "cache")) as cache:
        yield cache


def build_backbones_once(patch: pytest.MonkeyPatch) -> None:
    """Have each backbone built once for all tests of this process that ask for it."""
    import pipeline.extraction.shard_task

    patch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", build_backbone)


@functools.cache
def build_backbone(*arguments: Any) -> Any:
    from pipeline.backbone.frozen import FrozenBackbone

    return FrozenBackbone(*arguments)


@pytest.fixture
def one_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    build_backbones_once(monkeypatch)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """An empty data directory, opened."""
    monkeypatch.delenv("ICEBOX_INDEX", raising=False)
    with closing(Cache(tmp_path / "data" / "cache")) as cache:
        yield Workspace(tmp_path / "data", cache)


def render_nothing(patch: pytest.MonkeyPatch) -> None:
    """Have no plot rendered, here and in warm processes, which takes longer than fitting a regression."""
    patch.setattr("pipeline.runs.plots._rendered", warm.render_nothing)
    patch.setattr(warm, "plots", False)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no plot rendered, here and in warm processes: for tests that look at none."""
    render_nothing(monkeypatch)


def small_model(size: int) -> Any:
    """A network of three classes, of the layers that InceptionV3 and the heads consist of, as `export` makes it."""
    from pipeline.backbone.keras_start import import_keras
    from pipeline.backbone.scaling import scale

    keras = import_keras()
    layers = keras.layers
    keras.utils.set_random_seed(3)
    inputs = keras.Input((size, size, 3), dtype="uint8", name="pixels")
    output = scale(keras.ops.cast(inputs, "float32"), SPEC.scaling)
    output = layers.Conv2D(8, 3, 2, use_bias=False)(output)
    output = layers.Activation("relu")(layers.BatchNormalization(scale=False)(output))
    pools = layers.AveragePooling2D(3, 1, "same"), layers.MaxPooling2D(3, 1, "same")
    output = layers.Concatenate()([pool(output) for pool in pools])
    output = layers.Flatten()(layers.BatchNormalization(center=False, scale=False, epsilon=0.0)(output))
    output = layers.Dense(3, "softmax")(layers.Dropout(0.5)(layers.Dense(8, "relu")(output)))
    return keras.Model(inputs, {"probabilities": output}, name="icebox")


def unseal(run: Path) -> None:
    """Make a run one of the first version, which had no checksums, so that it may be changed."""
    about = json.loads((run / "run.json").read_text())
    about.pop("checksums", None)
    (run / "run.json").write_text(json.dumps(about))
    (run / "SHA256SUMS").unlink(missing_ok=True)


# Laid on the way of every Python process: OpenCV's decoder, but for marked files. Some really end the process.
DANGEROUS_DECODER = """
import os, signal, sys
if any("decode_process" in argument for argument in sys.orig_argv):
    import cv2
    imdecode = cv2.imdecode
    def dangerous(data, flags):
        marks = {b"SEGV": signal.SIGSEGV, b"ABRT": signal.SIGABRT, b"KILL": signal.SIGKILL, b"XCPU": signal.SIGXCPU}
        mark = data.tobytes()[-4:]
        if mark in marks:
            os.kill(os.getpid(), marks[mark])
        if mark == b"HANG":
            signal.pause()
        if mark == b"LUCK":
            return None
        if mark == b"ROOM":
            raise MemoryError("no memory for 40 x 50 pixels")
        once = os.environ.get("CRASH_ONCE")
        if once and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGSEGV)
        return imdecode(data, flags)
    cv2.imdecode = dangerous
"""


@pytest.fixture
def dangerous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the dangerous decoder on the way of child processes; return the folder it lies in, for PYTHONPATH."""
    folder = tmp_path / "dangerous"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(DANGEROUS_DECODER)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def mark(path: Path, ending: bytes) -> Path:
    """Append to a PNG what the dangerous decoder looks for, and a sound one does not mind."""
    path.write_bytes(path.read_bytes() + ending)
    return path


def own_share(things: Sequence[T]) -> Sequence[T]:
    """Return those of the things that this test process has for itself, all of them if it is the only one."""
    worker, workers = (os.environ.get(f"PYTEST_XDIST_WORKER{end}", "") for end in ("", "_COUNT"))
    if not worker:
        return things
    return things[int(worker.removeprefix("gw")) % len(things) :: int(workers)]


def pytest_configure() -> None:
    """Have children obey Ctrl-C, and give each test process its share of the cores for what it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it has in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own_share(sorted(os.sched_getaffinity(0))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="leave nothing out for taking long: `make test-all`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `long`, but for `--all`."""
    if config.getoption("all"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def deployed(common: Path) -> Deployed:
    """Trained runs of every kind, shared by all test processes; nobody may change them."""
    from deployed import deploy  # not above: it imports this module

    with pytest.MonkeyPatch.context() as patch:
        render_nothing(patch)
        return deploy(common / "deployed")


@pytest.fixture(scope="session")
def deployed_inception(common: Path) -> Deployed:
    """A trained run on InceptionV3, shared like `deployed`, for tests of the network that is taken unless named."""
    from deployed import deploy_inception  # not above: it imports this module

    with pytest.MonkeyPatch.context() as patch:
        render_nothing(patch)
        return deploy_inception(common / "inception")


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of this run of the tests that all of its processes have in common."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def make_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Have the first test process that needs it make a file or folder at `path`; the others wait. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not (path.exists() and lock.read()):  # what a killed process began is there, but is not whole
            make(path)
            lock.write("made")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for `looked.Looked`, closed after each module: while it runs, this thread cannot run asyncio."""
    from looked import CHROMIUM

    if not CHROMIUM.exists():
        pytest.skip("NOT TESTED: there is no Chromium here; install Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags, timeout=1000 * TIMEOUT_S)
        yield browser
        browser.close()
