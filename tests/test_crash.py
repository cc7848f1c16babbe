"""Killed anywhere, failed anywhere, full at any moment: the rows are those of a run that was never disturbed.

By default each kind of call fails, or is the last, at least once; by `make test-all` every call.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the filter
import made
import pytest
import warm
from cached import fill, listed, write_images
from conftest import build_backbones_once, command_line, environment, icebox, render_nothing, wait_until
from faults import WRITES, Watcher, disk_full, io_error, signalled, watched
from own_networks import tiny_options

import cli
import pipeline.extraction.shard_task
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.runs.store import published_names, read_run, unfinished

SIX = ("features", "--dataset", "digits", "--limit", "6")
VERIFY = ("cache", "verify", "--read-data")
pytestmark = pytest.mark.usefixtures("one_backbone")


@functools.cache
def features() -> tuple[str, ...]:
    """Return the command that makes six rows, in three shards."""
    return (*SIX, "--batch-size", "2", "--shard-rows", "2", *tiny_options())


@pytest.fixture(autouse=True)
def _signals_as_before() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def shards_of(data: Path) -> list[Path]:
    return sorted(data.glob("cache/*/shards/[!.]*.h5"))


def rows_of(data: Path) -> dict[bytes, tuple[bytes, bytes]]:
    """Return key → bytes of features and pooled, unpacked, of every shard; each is what its name says."""
    found: dict[bytes, tuple[bytes, bytes]] = {}
    for path in shards_of(data):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        with h5py.File(path) as file:
            columns: list[Any] = [file[name] for name in ("key", "features", "pooled")]
            for key, features, pooled in zip(*(column[:] for column in columns), strict=True):
                row = (features.tobytes(), pooled.tobytes())
                assert found.setdefault(key.tobytes(), row) == row
    return found


rows_once = functools.cache(rows_of)  # of what stays as it is


def stored_rows(data: Path) -> int:
    """Return the number of rows on disk, a row in two shards counting twice."""
    count = 0
    for path in shards_of(data):
        with h5py.File(path) as file:
            keys: Any = file["key"]
            count += len(keys)
    return count


def leftovers(data: Path) -> list[Path]:
    return [path for path in data.rglob(".partial-*") if path.name != ".partial-"]


class Scenario:
    """A command, and the state it starts from."""

    def __init__(self, name: str, template: Path, *command: str) -> None:
        self.name = name
        self.template = template
        self.command = command

    def fresh(self, data: Path) -> Path:
        shutil.rmtree(data, ignore_errors=True)
        if self.template.exists():
            shutil.copytree(self.template, data)
        return data


def call(data: Path, *arguments: str) -> int:
    return cli.main(["--data-dir", str(data), *arguments])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a run that nothing happened to."""
    data = tmp_path_factory.mktemp("undisturbed") / "data"
    with pytest.MonkeyPatch.context() as patch:
        build_backbones_once(patch)
        assert call(data, *features()) == 0
    assert len(rows_of(data)) == 6
    return data


@pytest.fixture(scope="module")
def without_index(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("without_index") / "data"
    shutil.copytree(undisturbed, data)
    (data / "cache" / "cache.db").unlink()
    return data


@pytest.fixture(scope="module")
def damaged(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(undisturbed, data)
    made.spoil(shards_of(data)[0])
    return data


@pytest.fixture
def scenario(request: pytest.FixtureRequest, tmp_path: Path) -> Scenario:
    """`features` on nothing, `gc` that repacks, `features` without an index, `verify --repair` of a bad shard."""
    name: str = request.param
    templates = {"features": lambda: tmp_path / "nothing", "gc": lambda: request.getfixturevalue("undisturbed")}
    templates |= {
        "no index": lambda: request.getfixturevalue("without_index"),
        "repair": lambda: request.getfixturevalue("damaged"),
    }
    commands = {"gc": ("cache", "gc"), "repair": (*VERIFY, "--repair")}
    return Scenario(name, templates[name](), *commands.get(name, features()))


SCENARIOS = ("features", "gc", "no index", "repair")


def check_after(scenario: Scenario, data: Path, undisturbed: Path, where: str) -> None:
    """Nothing torn, nothing lost but what is in hand; the same command again ends as if nothing had happened."""
    if scenario.name != "repair":
        assert call(data, *VERIFY) == 0, where
    assert rows_of_sound(data).items() <= rows_once(undisturbed).items(), where
    if scenario.name in ("gc", "no index"):
        assert rows_of(data) == rows_once(undisturbed), where
    for command in dict.fromkeys((scenario.command, features())):
        assert call(data, *command) == 0, where
    assert rows_of_sound(data) == rows_once(undisturbed), where
    assert call(data, *VERIFY) == 0, where
    assert leftovers(data / "cache") == [], where


def rows_of_sound(data: Path) -> dict[bytes, tuple[bytes, bytes]]:
    """Return the rows, once shards known to be damaged are out of the way."""
    for path in shards_of(data):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
            return {}
    return rows_of(data)


@pytest.mark.parametrize(("act", "for_good"), [(io_error, False), (io_error, True), (disk_full, True)])
@pytest.mark.parametrize("scenario", SCENARIOS, indirect=True)
def test_every_call_may_fail(
    scenario: Scenario,
    act: Callable[[str, Path], None],
    for_good: bool,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    among = frozenset(WRITES if act is disk_full else ())
    with watched(Watcher(among=among)) as watcher:
        assert call(scenario.fresh(tmp_path / "data"), *scenario.command) == 0
    total, codes = len(watcher.calls), Counter[int]()
    assert total >= 4
    for number in representative(watcher.calls, request.config):
        data = scenario.fresh(tmp_path / "data")
        capsys.readouterr()
        with watched(Watcher(number, act, for_good, among)) as watcher:
            code = call(data, *scenario.command)
        said = capsys.readouterr().err
        where = f"{act.__name__} at call {number} of {total}, {watcher.calls[number - 1]}: {said}"
        assert code in (0, 1), where
        assert len(re.findall("^error: ", said, re.MULTILINE)) == code, where
        codes[code] += 1
        check_after(scenario, data, undisturbed, where)
    assert codes[1] > 0
    with capsys.disabled():
        print(f"\n{scenario.name}, {act.__name__}{' for good' if for_good else ''}: {total} calls, exit codes {codes}")


def representative(calls: list[tuple[str, Path]], config: pytest.Config, *, firsts: bool = True) -> list[int]:
    """Return the numbers of the first and the last call of each kind; with `--all`, the numbers of all calls.

    The calls on shards are of kinds of their own; all files of an unpublished run count as having one name. Without
    `firsts`, the first call of each kind is left out.
    """
    if config.getoption("all"):
        return list(range(1, len(calls) + 1))
    first, last = dict[str, int](), dict[tuple[str, str], int]()
    for number, (kind, path) in enumerate(calls, 1):
        first.setdefault(kind, number)
        name = "of a run" if path.match("runs/.partial-*/*") else re.sub("[0-9a-f]{8,}|[0-9]+", "", path.name)
        named = kind in ("rename", "remove") and name
        last[kind, named or ".h5" * (path.suffix == ".h5")] = number
    return sorted({*(first.values() if firsts else ()), *last.values()})


@pytest.mark.parametrize("scenario", SCENARIOS, indirect=True)
def test_every_call_may_be_the_last(
    scenario: Scenario, undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with watched(Watcher()) as watcher:
        assert call(scenario.fresh(tmp_path / "data"), *scenario.command) == 0
    for number in representative(watcher.calls, request.config):
        data = scenario.fresh(tmp_path / "data")
        where = f"killed at call {number}: {watcher.calls[number - 1]}"
        assert signalled(number, data, *scenario.command).code == -signal.SIGKILL, where
        check_after(scenario, data, undisturbed, where)


# A sweep, from its beginning to its end

SWEEP = ("sweep", "--head", "logreg", "--set", "C=0.01,1", "--quiet")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    """A small sweep over rows that are there."""
    folder = tmp_path_factory.mktemp("swept")
    write_images(folder / "photos", 20)
    with closing(Cache(folder / "data" / "cache")) as cache:
        fill(Workspace(folder / "data", cache), listed(folder / "photos"))
    with pytest.MonkeyPatch.context() as patch:
        render_nothing(patch)  # drawing would be most of the time
        yield Scenario("sweep", folder / "data", *SWEEP, "--dataset", str(folder / "photos"))


def check_sweep(scenario: Scenario, data: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    """Gone on with, if anything of it is left, it is one sweep and one run, and nothing else is left of it."""
    stopped = unfinished(data / "sweeps")
    tried = len(list(data.glob("sweeps/.partial-*/trials/*/trial.json")))
    assert stopped or not tried, where
    if not published_names(data / "sweeps", "sweep.json"):
        capsys.readouterr()
        again = ("sweep", "--resume", *stopped) if stopped else scenario.command
        assert call(data, *again, "--json") == 0, where
        assert json.loads(capsys.readouterr().out)["reused"] == tried, where
    (sweep,), (run,) = published_names(data / "sweeps", "sweep.json"), published_names(data / "runs")
    about = json.loads((data / "sweeps" / sweep / "sweep.json").read_text())
    assert about["best"] == read_run(data / "runs" / run)["summary"], where
    assert [row["val_accuracy"] for row in about["runs"]] == [1.0, 1.0], where
    assert call(data, "cache", "gc") == 0, where
    assert leftovers(data) == [], where
    kept = {"sweep.json", "leaderboard.csv", "leaderboard.png", "trial.json", ".lock"}
    assert {path.name for path in (data / "sweeps" / sweep).rglob("*") if path.is_file()} == kept, where


def test_every_call_of_a_sweep_may_be_the_last(
    swept: Scenario, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Killed between any two of its calls, while it publishes its winner and itself too; the first calls only fail."""
    data = swept.fresh(tmp_path / "data")
    with watched(Watcher(within=(data / "runs", data / "sweeps"))) as watcher:
        assert call(data, *swept.command) == 0
    check_sweep(swept, data, capsys, "undisturbed")
    for number in representative(watcher.calls, request.config, firsts=False):
        swept.fresh(data)
        where = f"killed at call {number}: {watcher.calls[number - 1]}"
        assert signalled(number, data, *swept.command, within=watcher.within).code == -signal.SIGKILL, where
        check_sweep(swept, data, capsys, where)


def share(act: Callable[[str, Path], None], calls: list[tuple[str, Path]], config: pytest.Config) -> list[int]:
    """Return the numbers of the calls that fail by `act`: every second write by each of both; by `--all` of all."""
    numbers = representative(calls, config)
    if config.getoption("all"):
        return numbers
    on_full_disk = [number for number in numbers if calls[number - 1][0] in WRITES][1::2]
    return on_full_disk if act is disk_full else [number for number in numbers if number not in on_full_disk]


@pytest.mark.parametrize(("act", "for_good"), [(io_error, False), (disk_full, True)])
def test_every_call_of_a_sweep_may_fail(
    swept: Scenario,
    act: Callable[[str, Path], None],
    for_good: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    data, among = tmp_path / "data", frozenset(WRITES if act is disk_full else ())
    within = (data / "runs", data / "sweeps")
    with watched(Watcher(among=among, within=within)) as watcher:
        assert call(swept.fresh(data), *swept.command) == 0
    for number in share(act, watcher.calls, request.config):
        swept.fresh(data)
        capsys.readouterr()
        with watched(Watcher(number, act, for_good, among, within)) as failing:
            code = call(data, *swept.command)
        said = capsys.readouterr().err
        where = f"{act.__name__} at call {number}, {failing.calls[number - 1]}: {said}"
        assert len(re.findall("^error: ", said, re.MULTILINE)) == code, where
        check_sweep(swept, data, capsys, where)


def test_two_at_once_killed_at_random_moments(
    undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`benchmarks/kills.py` does this some hundred times with one, from the start of the real program to its end."""
    with watched(Watcher()) as watcher:
        assert call(tmp_path / "alone", *features()) == 0
    rng, data = random.Random(7), tmp_path / "data"
    codes, rows = Counter[int](), Counter[int]()

    def killed(at: int) -> int:
        return signalled(at, data, *features()).code

    warm.server()  # both processes are to start at the same time
    with ThreadPoolExecutor(2) as both:
        for _ in range(100 if request.config.getoption("all") else 10):
            codes.update(both.map(killed, [rng.randint(1, len(watcher.calls)) for _ in range(2)]))
            assert call(data, *VERIFY) == 0
            found = rows_of(data)
            assert found.items() <= rows_once(undisturbed).items()
            rows[len(found)] += 1
            if len(found) == 6:  # nothing is left to be interrupted
                check_whole(data, undisturbed)
                shutil.rmtree(data)
    assert set(codes) <= {0, -signal.SIGKILL}
    assert codes[-signal.SIGKILL] > 0
    assert any(0 < count < 6 for count in rows), rows
    check_whole(data, undisturbed)


def check_whole(data: Path, undisturbed: Path) -> None:
    """The command ends as if nothing had happened, each row there once."""
    assert call(data, *features()) == 0
    assert rows_of(data) == rows_once(undisturbed)
    assert stored_rows(data) == 6
    assert leftovers(data) == []


def test_a_full_disk_is_told_before_anything_is_computed(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(undisturbed, tmp_path / "data")
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", None)  # not even loaded
    before = rows_of(data)
    assert call(data, *(argument if argument != "6" else "8" for argument in features())) == 1
    assert re.search(r"2 rows need about [\d.]+ kB in \S+, 1\.00 kB are free", capsys.readouterr().err)
    assert rows_of(data) == before


def mounted(folder: Path, size: str) -> None:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system here")


def test_a_disk_too_small_is_told_and_the_run_goes_on_when_it_grows(tmp_path: Path) -> None:
    """A real full file system: large enough for the first shards and the estimate's own error, not for the rest."""
    disk = tmp_path / "disk"
    mounted(disk, "300k")
    try:
        data = disk / "data"
        network = ("--backbone", "mobilenet", "--weights", "untrained", "--precision", "float32")  # of larger rows
        command = (*SIX, "--batch-size", "2", *network)
        done = icebox(data, *command, "--shard-rows", "1")  # the estimate is of the first batch, and is refused
        assert done.code == 1
        assert re.search(r"6 rows need about [\d.]+ [kM]B in \S+, [\d.]+ kB are free; make room", done.err)
        assert icebox(data, *VERIFY).code == 0
        subprocess.run(["mount", "-o", "remount,size=2M", str(disk)], check=True)
        assert icebox(data, *command).code == 0
        assert icebox(tmp_path / "data", *command).code == 0
        assert rows_of(data) == rows_of(tmp_path / "data")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_meanwhile_is_told_and_the_run_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """Somebody else fills it after the estimate: HDF5 itself never writes to it, so nothing crashes at the end."""
    disk = tmp_path / "disk"
    mounted(disk, "3M")
    try:
        data, ballast = disk / "data", disk / "ballast"

        def fill(call_: str, path: Path) -> None:
            if ballast.exists():
                return
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 4096):
                        pass
                except OSError:
                    pass

        creates = [0]

        def at_third_shard(call_: str, path: Path) -> None:
            creates[0] += call_ == "create" and path.suffix == ".h5"
            if creates[0] == 3:
                fill(call_, path)

        files.watcher = at_third_shard
        try:
            code = call(data, *features())
        finally:
            files.watcher = None
        assert code == 1
        assert len(rows_of(data)) == 4
        ballast.unlink()
        assert call(data, *VERIFY) == 0
        assert call(data, *features()) == 0
        assert rows_of(data) == rows_once(undisturbed)
        assert leftovers(data) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_runs_at_once_compute_every_row_once(undisturbed: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda _: icebox(tmp_path / "data", *features(), "--json"), range(2)))
    assert [each.code for each in done] == [0, 0], done
    assert sum(each.json["computed"] for each in done) == 6
    check_whole(tmp_path / "data", undisturbed)


def test_the_lock_of_a_dead_holder_is_taken_over(undisturbed: Path, tmp_path: Path) -> None:
    """Killed while it held the lock and was writing; the next one neither waits nor asks."""
    data = tmp_path / "data"
    with watched(Watcher()) as watcher:
        assert call(data, *features()) == 0
    writes = [number for number, (kind, path) in enumerate(watcher.calls, 1) if kind == "write" and path.suffix]
    shutil.rmtree(data)
    # One call later, while the file is made durable: threads may have got their numbers in another order.
    assert signalled(writes[0] + 1, data, *features()).code == -signal.SIGKILL
    (lock,) = data.glob("cache/*/.lock")
    assert lock.read_text().startswith("process ")
    assert leftovers(data) != []
    done = icebox(data, *features())
    assert done.code == 0
    assert "waiting" not in done.err
    check_whole(data, undisturbed)


def test_who_waits_is_told_for_whom(undisturbed: Path, tmp_path: Path) -> None:
    data = shutil.copytree(undisturbed, tmp_path / "data")
    said = tmp_path / "said"
    with closing(Cache(data / "cache")) as cache, ExitStack() as lock:
        (space,) = cache.spaces()
        lock.enter_context(space.lock(lambda holder: None))
        with warm.Process(command_line(data, "cache", "gc")[2:], env=environment(), stderr=said) as process:
            wait_until(lambda: "\n" in said.read_text(), process=process)
            assert re.match(rf"notice: waiting: process {os.getpid()} on \S+ is using own_", said.read_text())
            assert process.poll() is None
            lock.close()
            assert process.wait(300) == 0
