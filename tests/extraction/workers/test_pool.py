"""Extraction on Dask workers: the same rows as here, whatever happens to workers, scheduler and program."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import pytest
import warm
from cached import stored
from clusters import Cluster, by_hand
from conftest import ROOT, SPEC, command_line, environment, icebox, wait_until, write_picture
from hindered import Blind, Held, Poison, hindered
from own_networks import own_choice, tiny_choice, tiny_options, write_network
from served import Page, served

import pipeline.extraction.workers.health
import pipeline.extraction.workers.pool
import pipeline.extraction.workers.scheduler_client
from pipeline.backbone import own
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import IceboxError, UnfitWorkerError, UsageError
from pipeline.dataset import Dataset, open_dataset
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import Extraction, extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.extraction.shard_task import TaskSetup
from pipeline.extraction.workers import connect as clusters
from pipeline.extraction.workers import worker
from pipeline.extraction.workers.connect import ClusterChoice, connected
from pipeline.extraction.workers.worker import Requirements

Stored = dict[bytes, tuple[np.ndarray, np.ndarray]]

SMALL = ComputeOptions(shard_rows=4, batch_size=4)


@pytest.fixture(autouse=True)
def _attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice losses sooner."""
    monkeypatch.setattr(pipeline.extraction.workers.scheduler_client, "LOOK_EVERY_S", 0.1)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait but a moment for other workers where all who are there are unfit."""
    monkeypatch.setattr(pipeline.extraction.workers.pool, "_GRACE_S", 0.5)


@pytest.fixture
def _quick_nanny() -> Iterator[None]:
    """Have workers that are started here import nothing again when they are started anew."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of two classes."""
    root = tmp_path_factory.mktemp("fleet") / "images"
    for i in range(40):
        write_picture(root / ("cats" if i % 2 else "dogs") / f"{i:02}.png", seed=i)
    return root


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The rows as one process computes them."""
    data = tmp_path_factory.mktemp("alone")
    run(data, images)
    return stored(data)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with by_hand(tmp_path_factory.mktemp("cluster"), workers=2) as started:
        yield started


def run(
    data: Path,
    images: Path | Dataset,
    cluster: ClusterChoice | None = None,
    choice: FeatureChoice | None = None,
    **more: Any,
) -> Extraction:
    """Compute the features of the tiny network, or of another."""
    dataset = images if isinstance(images, Dataset) else open_dataset(str(images), downloads=data)
    with closing(Cache(data / "cache")) as cache:
        return extract(dataset, Workspace(data, cache), choice or tiny_choice(), SMALL, cluster=cluster, **more)


def same_rows(data: Path, rows: Stored) -> bool:
    found = stored(data)
    return found.keys() == rows.keys() and all(
        np.array_equal(one, other) for key in rows for one, other in zip(found[key], rows[key], strict=True)
    )


def test_workers_started_for_it_give_the_same_rows(images: Path, alone: Stored, tmp_path: Path) -> None:
    request = ("--dataset", images, *tiny_options())
    sizes = ("--shard-rows", "4", "--batch-size", "4")
    done = icebox(tmp_path, "features", *request, *sizes, "--workers", "2", "--json")
    assert done.code == 0, done.err
    assert (done.json["computed"], done.json["rows"], done.json["recomputed"]) == (40, 40, 0)
    assert sum(worker["rows"] for worker in done.json["workers"]) == 40
    assert all(0 < worker["model_share"] <= 1 for worker in done.json["workers"])
    assert "dashboard of the scheduler: http://127.0.0.1:" in done.err
    assert "distributed" not in done.err, "what Dask logs is not for people"
    assert same_rows(tmp_path, alone)
    again = icebox(tmp_path, "features", *request, "--workers", "2", "--json")
    assert (again.json["computed"], again.json["reused"], again.json["workers"]) == (0, 40, [])
    assert "dashboard" not in again.err, "no worker is started for nothing"


def test_workers_of_a_scheduler_give_the_same_rows(
    images: Path, alone: Stored, cluster: Cluster, tmp_path: Path
) -> None:
    done = run(tmp_path, images, ClusterChoice(scheduler=cluster.address))
    assert (done.computed, done.quarantined) == (40, [])
    assert len(done.stats.workers) == 2
    assert same_rows(tmp_path, alone)


@pytest.mark.parametrize("kind", ["own", "named"])
def test_workers_compute_with_other_networks(images: Path, cluster: Cluster, tmp_path: Path, kind: str) -> None:
    choice = FeatureChoice(backbone="mobilenet", input_size=32, weights="untrained", precision="float32")
    if kind == "own":
        choice = own_choice(write_network(tmp_path / "own.keras", "depthwise"))
    run(tmp_path / "alone", images, choice=choice)
    done = run(tmp_path / "shared", images, ClusterChoice(scheduler=cluster.address), choice)
    assert (done.computed, done.quarantined) == (40, [])
    assert sum(worker["rows"] for worker in done.stats.workers) == 40
    assert same_rows(tmp_path / "shared", stored(tmp_path / "alone"))


def test_images_in_memory_travel_with_their_tasks_and_the_default_network_computes_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    digits = open_dataset("digits", downloads=tmp_path).take(np.arange(10))
    default = FeatureChoice(weights="untrained", precision="float32")
    run(tmp_path / "here", digits, choice=default)
    done = run(tmp_path / "there", digits, ClusterChoice(scheduler=cluster.address), default)
    assert done.computed == 10
    assert same_rows(tmp_path / "there", stored(tmp_path / "here"))


@pytest.mark.usefixtures("_impatient")
def test_a_worker_whose_memory_limit_is_too_small_is_given_up_and_the_limit_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nanny would end it and start it anew for ever, or Dask give it nothing to do."""
    monkeypatch.setattr(pipeline.extraction.workers.health, "PAUSED_S", 2.0)
    monkeypatch.setattr(
        pipeline.extraction.workers.scheduler_client, "LOOK_EVERY_S", 1.0
    )  # nannies tell why they end one before it is gone
    with by_hand(tmp_path / "cluster", workers=0) as cluster:
        opened = pipeline.extraction.workers.scheduler_client.SchedulerClient.open

        def open_and_start(self: pipeline.extraction.workers.scheduler_client.SchedulerClient) -> None:
            opened(self)
            cluster.start_worker(memory_limit="100MB")

        monkeypatch.setattr(pipeline.extraction.workers.scheduler_client.SchedulerClient, "open", open_and_start)
        with pytest.raises(IceboxError, match=r"as it came near its memory limit of 100 MB; start it with more"):
            run(tmp_path / "data", images, ClusterChoice(scheduler=cluster.address))


# Without names, they are sent as they are: a worker need not import this module.
end_worker: Callable[..., Any] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
shape_of_a_row: Callable[..., Any] = lambda requirements: (4, 4, 64)  # noqa: E731


@pytest.mark.usefixtures("_quick_nanny", "_impatient")
@pytest.mark.parametrize(
    ("vet", "run_task", "when"),
    [
        (end_worker, worker.run_task, "before it had done anything"),
        (shape_of_a_row, end_worker, "at work with nothing done in between"),
    ],
    ids=["when they are vetted", "at work"],
)
def test_workers_started_here_that_are_killed_again_and_again_are_given_up(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vet: Any, run_task: Any, when: str
) -> None:
    """As where the system has no memory left for them."""
    monkeypatch.setattr(pipeline.extraction.workers.pool, "check_worker", vet)
    monkeypatch.setattr(pipeline.extraction.workers.pool, "run_task", run_task)
    monkeypatch.setattr(pipeline.extraction.workers.health, "MOST_AT_WORK", 3)
    reason = rf"0 on 127\.0\.0\.1 was lost \d times {when} \(\S+ [GM]B of memory are left"
    with pytest.raises(IceboxError, match=f"no worker of this machine can do the work: {reason}"):
        run(tmp_path, images, ClusterChoice(workers=1))


def test_a_bad_image_is_quarantined_as_it_is_here(images: Path, cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(6):
        write_picture(root / "cats" / f"{i}.png", seed=i)
    (root / "cats" / "3.png").write_bytes(b"no image")
    (root / "cats" / "4.png").unlink()
    (root / "cats" / "4.png").symlink_to(tmp_path / "nowhere")
    done = run(tmp_path / "data", root, ClusterChoice(scheduler=cluster.address))
    assert (done.computed, len(done.quarantined)) == (4, 2)
    assert {bad.path for bad in done.quarantined} == {"cats/3.png", "cats/4.png"}


def test_workers_fetch_what_is_behind_addresses_and_each_once(
    images: Path, alone: Stored, cluster: Cluster, tmp_path: Path
) -> None:
    with served() as site:
        lines = ["path,label"]
        for path in sorted(images.glob("*/*.png")):
            site.pages[f"/{path.name}"] = Page(path.read_bytes())
            lines.append(f"{site.address}/{path.name},{path.parent.name}")
        lines.append(f"{site.address}/missing.png,cats")
        (tmp_path / "list.csv").write_text("\n".join(lines))
        done = run(tmp_path / "data", tmp_path / "list.csv", ClusterChoice(scheduler=cluster.address))
        assert (done.computed, [bad.reason for bad in done.quarantined]) == (
            40,
            ["cannot be read: HTTP 404 Not Found"],
        )
        assert set(site.gets().values()) == {1}
        again = run(tmp_path / "data", tmp_path / "list.csv", ClusterChoice(scheduler=cluster.address))
        assert (again.computed, again.reused, site.count("GET")) == (0, 40, 42)
    assert same_rows(tmp_path / "data", alone)


def test_copies_behind_addresses_are_computed_once_by_a_worker_whatever_task_they_are_in(
    images: Path, tmp_path: Path
) -> None:
    contents = [path.read_bytes() for path in sorted(images.glob("*/*.png"))[:3]]
    with served() as site, by_hand(tmp_path / "cluster", workers=1) as cluster:
        site.pages |= {f"/{i}.png": Page(contents[i % 3]) for i in range(30)}
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{site.address}/{i}.png,a\n" for i in range(30)))
        done = run(tmp_path / "data", tmp_path / "list.csv", ClusterChoice(scheduler=cluster.address))
        assert (done.computed, done.duplicates) == (3, 27)
        assert sum(each["rows"] for each in done.stats.workers) == 3
        again = run(tmp_path / "data", tmp_path / "list.csv", ClusterChoice(scheduler=cluster.address))
        assert (again.computed, again.reused, again.duplicates) == (0, 3, 27)


# Losses


def held(images: Path, folder: Path) -> Dataset:
    """Return the images, of which only those of the first tasks can be read before `folder / "open"` is there."""
    folder.mkdir()
    dataset = open_dataset(str(images), downloads=images)
    return hindered(Held, dataset, folder, frozenset(dataset.names[16:]))


def while_held(folder: Path, act: Callable[[], Any], waiting: int | None = None) -> threading.Thread:
    """Call `act` once rows have come and a worker, or that with the number `waiting`, waits for images; then open."""
    seen, heard = threading.Event(), pipeline.extraction.workers.scheduler_client.SchedulerClient._heard

    def listen(self: pipeline.extraction.workers.scheduler_client.SchedulerClient, event: tuple[float, Any]) -> None:
        heard(self, event)
        seen.set()

    def wait() -> None:
        try:
            assert seen.wait(300)
            wait_until(lambda: list(folder.iterdir()) if waiting is None else (folder / str(waiting)).exists(), 300)
            act()
        finally:
            (folder / "open").touch()

    pipeline.extraction.workers.scheduler_client.SchedulerClient._heard = listen  # undone by the fixture below
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(autouse=True)
def _unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pipeline.extraction.workers.scheduler_client.SchedulerClient,
        "_heard",
        pipeline.extraction.workers.scheduler_client.SchedulerClient._heard,
    )


def test_a_worker_killed_in_mid_shard_costs_what_it_had_in_hand(
    images: Path, alone: Stored, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim, gate = min(cluster.worker_pids(2).values()), tmp_path / "gate"
    dataset = held(images, gate)
    thread = while_held(gate, lambda: os.kill(victim, signal.SIGKILL), victim)
    done = run(tmp_path, dataset, ClusterChoice(scheduler=cluster.address))
    thread.join()
    assert done.computed == 40
    assert same_rows(tmp_path, alone)
    assert "is gone; what it had in hand is computed again" in caplog.text


def test_a_worker_that_falls_silent_is_given_up(
    images: Path,
    alone: Stored,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (address, victim), gate = min(cluster.worker_pids(2).items()), tmp_path / "gate"
    dataset = held(images, gate)
    beats = pipeline.extraction.workers.scheduler_client.SchedulerClient._beats

    def beats_or_is_late(
        link: pipeline.extraction.workers.scheduler_client.SchedulerClient, of: str, last_seen: float, now: float
    ) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(
                pipeline.extraction.workers.scheduler_client, "SILENT_S", 3.0 if of == address else 600.0
            )  # the other may be busy
            return beats(link, of, last_seen, now)

    def silence() -> None:
        os.kill(victim, signal.SIGSTOP)
        monkeypatch.setattr(pipeline.extraction.workers.scheduler_client.SchedulerClient, "_beats", beats_or_is_late)

    thread = while_held(gate, silence, victim)
    try:
        done = run(tmp_path, dataset, ClusterChoice(scheduler=cluster.address))
        thread.join()
    finally:
        os.kill(victim, signal.SIGCONT)
    assert done.computed == 40
    assert same_rows(tmp_path, alone)
    assert "does not answer any more" in caplog.text


def test_an_image_that_ends_its_worker_is_found_and_set_aside(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.workers.pool, "_MOST_LOSSES", 1)  # three takes two more deaths
    for name in ("a", "b", "poison", "c", "d", "e"):
        write_picture(tmp_path / "images" / "cats" / f"{name}.png", seed=ord(name[0]))
    dataset = hindered(Poison, open_dataset(str(tmp_path / "images"), downloads=tmp_path), os.getpid())
    done = run(tmp_path / "data", dataset, ClusterChoice(scheduler=cluster.address))
    assert done.computed == 5
    assert [(bad.path, bad.reason, bad.since) for bad in done.quarantined] == [
        ("cats/poison.png", pipeline.extraction.workers.pool._FATAL, None)
    ]


def test_a_scheduler_that_starts_anew_is_found_again(
    images: Path, alone: Stored, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with by_hand(tmp_path / "cluster", workers=1) as cluster:
        dataset = held(images, tmp_path / "gate")
        thread = while_held(tmp_path / "gate", cluster.start_anew)
        done = run(tmp_path / "data", dataset, ClusterChoice(scheduler=cluster.address))
        thread.join()
    assert done.computed == 40
    assert same_rows(tmp_path / "data", alone)
    assert "is gone; waiting for it to come back" in caplog.text


def test_a_scheduler_lost_before_its_workers_are_known_is_found_again(
    images: Path, alone: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with by_hand(tmp_path / "cluster", workers=1) as cluster:
        submit, threads = pipeline.extraction.workers.scheduler_client.SchedulerClient.submit, list[threading.Thread]()

        def submit_and_die(
            self: pipeline.extraction.workers.scheduler_client.SchedulerClient, *arguments: Any, **more: Any
        ) -> Any:
            future = submit(self, *arguments, **more)
            if not threads:
                threads.append(threading.Thread(target=cluster.start_anew, daemon=True))
                threads[0].start()
            return future

        monkeypatch.setattr(pipeline.extraction.workers.scheduler_client.SchedulerClient, "submit", submit_and_die)
        done = run(tmp_path / "data", images, ClusterChoice(scheduler=cluster.address))
        threads[0].join()
    assert (done.computed, done.quarantined) == (40, [])
    assert same_rows(tmp_path / "data", alone)


def test_a_scheduler_that_stays_away_ends_the_run_in_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.workers.scheduler_client, "PATIENCE_S", 3.0)
    with by_hand(tmp_path / "cluster", workers=1) as cluster:
        dataset = held(images, tmp_path / "gate")

        def stop() -> None:
            cluster.stop()
            monkeypatch.setattr(clusters, "_TIMEOUT_S", 1)

        thread = while_held(tmp_path / "gate", stop)
        with pytest.raises(IceboxError, match=r"has been gone for 3 s; start it .* what was computed is kept"):
            run(tmp_path / "data", dataset, ClusterChoice(scheduler=cluster.address))
        thread.join()


def test_a_scheduler_without_workers_is_waited_for_and_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.workers.scheduler_client, "PATIENCE_S", 2.0)
    with (
        by_hand(tmp_path / "cluster", workers=0) as cluster,
        pytest.raises(IceboxError, match=r"has had no worker for 2 s; start some by `dask worker ADDRESS`"),
    ):
        run(tmp_path / "data", images, ClusterChoice(scheduler=cluster.address))
    assert not list((tmp_path / "data").glob("cache/*/space.json")), "no space is made that nobody fills"


@pytest.fixture
def endless(images: Path, tmp_path: Path) -> Iterator[Path]:
    """A list of ten images, and two that never arrive."""
    with served() as site:
        site.pages = {f"/{i}.png": Page(delay=900) for i in range(2)}
        names = [
            *sorted(str(path.relative_to(images)) for path in images.glob("*/*.png"))[:10],
            *(f"{site.address}{path}" for path in site.pages),
        ]
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{name},a\n" for name in names))
        yield tmp_path / "list.csv"


def wait_for_rows(data: Path, program: warm.AnyProcess) -> None:
    wait_until(lambda: list(data.glob("cache/*/shards/[0-9a-f]*.h5")), 300, program)


def features_by_workers(data: Path, endless: Path, images: Path, workers: int) -> list[str]:
    listed = ("--dataset", endless, "--image-root", images)
    small = ("--shard-rows", "2", "--batch-size", "2", "--workers", str(workers))
    return command_line(data, "features", *listed, *tiny_options(), *small)


def test_workers_end_with_the_program_and_what_they_published_stays(
    images: Path, endless: Path, tmp_path: Path
) -> None:
    arguments = features_by_workers(tmp_path, endless, images, 2)[2:]
    with warm.Process(arguments, env=environment(no_proxy="127.0.0.1")) as program:
        wait_for_rows(tmp_path, program)
        started = psutil.Process(program.pid).children(recursive=True)
        program.kill()
    gone, alive = psutil.wait_procs(started, timeout=300)
    assert len(gone) >= 2
    assert not alive
    kept = len(stored(tmp_path))
    done = run(tmp_path, images)
    assert (done.rows, done.reused) == (40, kept)
    assert 0 < kept <= 10


def test_ctrl_c_in_the_terminal_reaches_all_and_one_line_comes_of_it(
    images: Path, endless: Path, tmp_path: Path
) -> None:
    command, env = features_by_workers(tmp_path, endless, images, 1), environment(no_proxy="127.0.0.1")
    with warm.ColdProcess(
        command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        try:
            wait_for_rows(tmp_path, program)
            os.killpg(program.pid, signal.SIGINT)
            _, said = program.communicate(timeout=300)
        finally:
            program.kill()
    assert program.returncode == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: stopped; features computed so far are kept")


# Who is fit


def requirements(cluster: Path, **more: Any) -> Requirements:
    setup = TaskSetup(SPEC, None, 4, cluster / "cache" / "space" / "shards")
    made = Requirements(setup, machine.versions(machine.FEATURE_PACKAGES), (), (), None, "topic")
    return replace(made, **more)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"tensorflow": "1.15"}}, r"has tensorflow \S+ \(here 1\.15\)"),
        ({"versions": {"no-such-package": "1"}}, r"has no-such-package none \(here 1\)"),
        (
            {"setup": TaskSetup(SPEC, None, 4, Path("/nowhere/cache/space/shards"))},
            "does not see the cache /nowhere/cache",
        ),
        ({"urls": ("sftp://host/a.png",)}, "cannot fetch images: sftp:// needs paramiko"),
        ({"samples": (Path("/nowhere/a.png"),)}, r"cannot read the image /nowhere/a\.png \(No such file"),
        (
            {"setup": TaskSetup(SPEC, Path("/nowhere/w.h5"), 4, Path("/tmp/space/shards"))},
            r"does not see the weights /nowhere/w\.h5",
        ),
    ],
)
def test_a_worker_that_lacks_something_is_told_apart(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(UnfitWorkerError, match=reason):
        worker.check_worker(requirements(tmp_path, **change))


def test_other_weights_under_the_same_path_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "w.h5").write_bytes(b"other")
    spec = replace(SPEC, weights="sha256:" + "0" * 64)
    setup = TaskSetup(spec, tmp_path / "w.h5", 4, tmp_path / "cache" / "space" / "shards")
    with pytest.raises(UnfitWorkerError, match=r"has other weights at .*w\.h5"):
        worker.check_worker(requirements(tmp_path, setup=setup))


def test_weights_of_an_own_network_are_known_by_their_content(tmp_path: Path) -> None:
    path = write_network(tmp_path / "own.keras", "plain")
    setup = TaskSetup(replace(SPEC, weights=own.read_network(path).weights), path, 4, tmp_path, network=path)
    worker._check_weights(setup)
    with pytest.raises(UnfitWorkerError, match=r"has other weights at .*own\.keras"):
        worker._check_weights(replace(setup, spec=SPEC))
    path.write_bytes(b"torn")
    with pytest.raises(UnfitWorkerError, match=r"cannot read .*own\.keras"):
        worker._check_weights(setup)


@pytest.mark.usefixtures("_impatient")
def test_if_no_worker_is_fit_the_run_ends_with_one_line_that_names_them(
    images: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "versions", lambda packages: {"tensorflow": "1.15"})
    with pytest.raises(IceboxError, match=r"no worker of tcp://\S+ can do the work: tcp://127\S+ has tensorflow"):
        run(tmp_path, images, ClusterChoice(scheduler=cluster.address))
    assert "is not used: it has tensorflow" in caplog.text


def test_a_worker_that_alone_cannot_read_the_images_is_not_used(
    images: Path, alone: Stored, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reads fail where ours do not: on a machine that lacks a part of the files."""
    with by_hand(tmp_path / "cluster", workers=1) as cluster:
        cluster.start_worker(BLIND="yes")
        cluster.wait_for_workers(2)
        dataset = hindered(Blind, open_dataset(str(images), downloads=tmp_path), tmp_path / "blind", os.getpid())
        done = run(tmp_path / "data", dataset, ClusterChoice(scheduler=cluster.address))
    assert (done.computed, done.quarantined) == (40, [])
    assert same_rows(tmp_path / "data", alone)
    assert "is not used: it cannot read" in caplog.text


# How they are reached


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "give either --workers N or --scheduler ADDRESS"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "give either --workers N or --scheduler ADDRESS"),
        ({"workers": 2, "tls_ca": Path("ca.pem")}, "--tls-ca goes with --scheduler"),
        ({"scheduler": "tls://127.0.0.1:1", "tls_ca": Path("/nowhere.pem")}, "--tls-ca: there is no file /nowhere.pem"),
        ({"scheduler": "tls://127.0.0.1:1", "tls_cert": Path(__file__)}, "--tls-cert and --tls-key go together"),
        ({"scheduler": "tcp://127.0.0.1:1", "dashboard": "0.0.0.0:1"}, "it goes with --workers only"),
        ({"scheduler": "somewhere"}, "--scheduler takes an address such as"),
        ({"scheduler": "http://127.0.0.1:1"}, "--scheduler takes an address such as"),
        ({"scheduler": "tcp://127.0.0.1:99999"}, "--scheduler takes an address such as"),
        ({"scheduler": "tcp://127.0.0.1:1", "tls_ca": Path(__file__)}, "--tls-ca goes with --scheduler tls://"),
        ({"workers": 1, "dashboard": "garbage"}, "--dashboard takes HOST:PORT"),
        ({"workers": 1, "dashboard": "127.0.0.1:99999"}, "--dashboard takes HOST:PORT"),
    ],
)
def test_what_cannot_be_meant_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ClusterChoice(**choice)


def test_nobody_at_the_address_is_wrong_usage(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_TIMEOUT_S", 1)
    with pytest.raises(UsageError, match=r"^no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        run(tmp_path, images, ClusterChoice(scheduler="tcp://127.0.0.1:9"))


def test_a_scheduler_that_speaks_tls_is_spoken_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=icebox")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run([*openssl, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    options = ("--tls-ca-file", str(cert), "--tls-cert", str(cert), "--tls-key", str(key))
    with by_hand(tmp_path / "cluster", workers=0, protocol="tls", options=options) as cluster:
        choice = ClusterChoice(scheduler=cluster.address, tls_ca=cert, tls_cert=cert, tls_key=key)
        with connected(choice) as client:
            assert client.scheduler_info()["address"].startswith("tls://")
        monkeypatch.setattr(clusters, "_TIMEOUT_S", 1)
        other = tmp_path / "other.pem"
        subprocess.run([*openssl, "-keyout", str(other), "-out", str(other)], check=True, capture_output=True)
        with (
            pytest.raises(UsageError, match="no Dask scheduler answers"),
            connected(replace(choice, tls_ca=other)),
        ):
            pass


def test_tls_without_files_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="needs --tls-ca"), connected(ClusterChoice(scheduler="tls://127.0.0.1:9")):
        pass


def test_a_dashboard_where_none_can_be_is_wrong_usage() -> None:
    choice = ClusterChoice(workers=1, dashboard="192.0.2.1:8787")
    with (
        pytest.raises(UsageError, match=r"workers cannot be started with the dashboard at 192\.0\.2\.1"),
        connected(choice),
    ):
        pass


def test_workers_take_no_modules_from_the_current_folder(tmp_path: Path) -> None:
    """It may be somebody else's folder of images; Python started with -c looks there first."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    (theirs / "pickle.py").write_text("open('ran', 'w').close()\n")
    (ours / "main.py").write_text(
        "from pipeline.extraction.workers.connect import ClusterChoice, connected\n"
        "if __name__ == '__main__':\n"
        "    with connected(ClusterChoice(workers=1)) as client:\n"
        "        print(client.submit(abs, -3).result())\n"
    )
    command, env = [sys.executable, str(ours / "main.py")], environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=theirs, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
    assert not (theirs / "ran").exists()


def test_no_more_workers_are_started_than_have_something_to_do() -> None:
    assert ClusterChoice(workers=8).at_most(3).workers == 3
    assert ClusterChoice(workers=2).at_most(3).workers == 2
    assert ClusterChoice(scheduler="tcp://127.0.0.1:9").at_most(3).workers is None


def test_each_worker_here_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    options = [clusters._worker_options(i) for i in range(2)]
    assert [each["env"] for each in options] == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert [each["resources"] for each in options] == [{"GPU": 1}] * 2
    with pytest.raises(UsageError, match="--workers 3, but each takes a GPU and there are 2"):
        ClusterChoice(workers=3)


def test_the_dashboard_listens_where_it_is_told() -> None:
    for choice, host, elsewhere in ((None, "127.0.0.1", "127.0.0.2"), ("127.0.0.2:0", "127.0.0.2", "127.0.0.1")):
        with connected(ClusterChoice(workers=1, dashboard=choice)) as client:
            port = client.scheduler_info()["services"]["dashboard"]
            socket.create_connection((host, port)).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((elsewhere, port))
