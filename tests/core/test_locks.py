"""Who works on a run's folder holds it, and nobody who looks, resumes or tidies up at the same instant changes that."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.core.errors import CacheError, RunError
from pipeline.core.locks import find_abandoned, held_if_abandoned
from pipeline.runs import store


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was killed and can be resumed."""
    folder = tmp_path / ".partial-stopped"
    folder.mkdir()
    store.write_request(folder, {}, "", None)
    (folder / "checkpoint.npz").touch()
    return folder


def when_locked(monkeypatch: pytest.MonkeyPatch, act: Callable[[Callable[..., None], int, int], None]) -> None:
    """Have `act(flock, handle, how)` called in place of each flock."""
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: act(real, handle, how))


def leads_to(handle: int, folder: Path) -> bool:
    return folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())


def test_who_looks_whether_a_run_is_abandoned_keeps_nobody_from_it(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, knocks = threading.Event(), threading.Event()
    looker = threading.Thread(target=store.unfinished, args=(stopped.parent,))

    def flock(real: Callable[..., None], handle: int, how: int) -> None:
        if threading.current_thread() is not looker:
            knocks.set()
        real(handle, how)
        if threading.current_thread() is looker and leads_to(handle, stopped):
            looks.set()
            knocks.wait(60)

    when_locked(monkeypatch, flock)
    looker.start()
    assert looks.wait(60)
    with store.reopened(stopped.parent, "stopped"):
        assert not find_abandoned(stopped)
    looker.join()


def test_of_many_who_resume_a_run_at_once_one_does(stopped: Path) -> None:
    for _ in range(20):
        together, said = threading.Barrier(4), list[str]()

        def resume(together: threading.Barrier, said: list[str]) -> None:
            together.wait(60)
            try:
                with store.reopened(stopped.parent, "stopped"):
                    said.append("mine")
                    together.wait(60)
                    raise KeyboardInterrupt
            except RunError as error:
                said.append(str(error))
                together.wait(60)
            except KeyboardInterrupt:
                pass

        threads = [threading.Thread(target=resume, args=(together, said)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(said) == ["mine", *["the run stopped is being worked on by another process"] * 3]


def test_a_run_that_begins_is_not_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is made and held in one, so that `gc` does not remove it in between."""
    met = threading.Event()

    def tidy() -> None:
        store.remove_leftovers(tmp_path, resumable=True)
        met.set()

    tidier = threading.Thread(target=tidy)

    def flock(real: Callable[..., None], handle: int, how: int) -> None:
        if threading.current_thread() is tidier:
            if leads_to(handle, tmp_path):
                met.set()  # it waits from here on
        elif not leads_to(handle, tmp_path) and not tidier.ident:
            tidier.start()
            assert met.wait(60)
        real(handle, how)

    when_locked(monkeypatch, flock)
    with store.new_run(tmp_path, "digits-gap") as (name, folder):
        tidier.join()
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_that_was_taken_up_again_meanwhile_is_not_removed(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:

        def taken_up(folder: Path) -> bool:
            stack.enter_context(held_if_abandoned(folder))
            return False

        monkeypatch.setattr(store, "_can_resume", taken_up)
        assert store.remove_leftovers(stopped.parent, resumable=False) == ([], 0)
        assert stopped.is_dir()
    monkeypatch.undo()
    assert store.remove_leftovers(stopped.parent, resumable=True)[0] == [stopped]


def test_what_is_gone_by_now_is_nobodys(tmp_path: Path) -> None:
    """As when it is published between the listing of its folder and the look at it."""
    assert not find_abandoned(tmp_path / "gone")
    with held_if_abandoned(tmp_path / "gone") as held:
        assert not held


def without_folder_locks(real: Callable[..., None], handle: int, how: int) -> None:
    """Lock as NFS does: files only."""
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EBADF, "Bad file descriptor")
    real(handle, how)


def test_where_folders_have_no_locks_resuming_names_the_way_out(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when_locked(monkeypatch, without_folder_locks)
    assert store.unfinished(stopped.parent) == []
    assert store.remove_leftovers(stopped.parent, resumable=True) == ([], 0)
    with (
        pytest.raises(CacheError, match=r"cannot be locked .*ICEBOX_LOCKS=off"),
        store.reopened(stopped.parent, "stopped"),
    ):
        pass


def test_without_locks_a_run_is_resumed_and_nothing_is_removed(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    when_locked(monkeypatch, without_folder_locks)
    monkeypatch.setenv("ICEBOX_LOCKS", "off")
    assert store.remove_leftovers(stopped.parent, resumable=True, dry_run=True) == ([], 0)
    assert store.remove_leftovers(stopped.parent, resumable=True) == ([], 0)
    assert store.unfinished(stopped.parent) == ["stopped"]
    with store.reopened(stopped.parent, "stopped"):
        pass
    assert (stopped.parent / "stopped").is_dir()
    assert "nothing keeps another process from going on with stopped too" in caplog.text
