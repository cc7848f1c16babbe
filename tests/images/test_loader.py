"""Decoders in processes of their own: the same pixels, and a crash costs one image."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import warm
from conftest import command_line, environment, icebox, mark, wait_until, write_picture
from made import load
from own_networks import tiny_options

from pipeline.core.hashing import image_key
from pipeline.dataset import of_files, open_dataset
from pipeline.images import decoding
from pipeline.images.loader import Loader, _Decoder


def test_pixels_and_key_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 1)
    (loaded,) = load([path])
    assert loaded.key == image_key(path.read_bytes())
    assert loaded.pixels is not None
    assert loaded.pixels.dtype == np.uint8
    assert np.array_equal(loaded.pixels, decoding.decode(path.read_bytes()))


def test_a_variable_of_the_programs_decides_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_WIDTH", "10")  # a program of one's own keeps it, its decoders do not
    (loaded,) = load([path := write_picture(tmp_path / "a.png", 1)])
    assert np.array_equal(loaded.pixels, decoding.decode(path.read_bytes()))  # type: ignore[arg-type]


def test_images_that_are_pixels_need_no_process(tmp_path: Path) -> None:
    digits = open_dataset("digits", downloads=tmp_path)
    before = psutil.Process().children()
    with Loader(digits, 299, "squash", 10**6) as loader:
        loaded = loader(5)
        assert psutil.Process().children() == before
    assert loaded.pixels is not None
    assert np.array_equal(loaded.pixels, decoding.decode(digits.read(5)))


def test_what_cannot_be_decoded_has_key_and_reason(tmp_path: Path) -> None:
    text, large, empty = tmp_path / "text.jpg", write_picture(tmp_path / "large.png", 2), tmp_path / "empty.png"
    text.write_text("no image")
    empty.touch()
    found = load([text, large, empty], max_pixels=100)
    assert [each.pixels for each in found] == [None] * 3
    assert [each.key for each in found] == [image_key(path.read_bytes()) for path in (text, large, empty)]
    assert "50 x 40 pixels, over the limit of 100" in found[1].reason
    assert all(found[i].reason for i in (0, 2))


def test_what_cannot_be_read_has_no_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    missing, pipe = load([tmp_path / "missing.png", tmp_path / "pipe.png"])
    assert (missing.key, missing.reason) == (None, "cannot be read: No such file or directory")
    assert (pipe.key, pipe.reason) == (None, "cannot be read: not a regular file")


@pytest.mark.parametrize(("ending", "name"), [(b"SEGV", "SIGSEGV"), (b"ABRT", "SIGABRT")])
def test_an_image_that_crashes_the_decoder_is_named_and_the_next_is_decoded(
    ending: bytes, name: str, tmp_path: Path, dangerous: Path
) -> None:
    paths = [write_picture(tmp_path / f"{i}.png", i) for i in range(3)]
    mark(paths[1], ending)
    first, bad, last = load(paths)
    assert bad.key == image_key(paths[1].read_bytes())
    assert bad.reason == f"crashes the decoder ({name})"
    for each, path in ((first, paths[0]), (last, paths[2])):
        assert each.pixels is not None
        assert np.array_equal(each.pixels, decoding.decode(path.read_bytes()))


def test_an_image_is_given_a_second_process_before_it_is_blamed(
    tmp_path: Path, dangerous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASH_ONCE", str(tmp_path / "crashed"))
    (loaded,) = load([write_picture(tmp_path / "a.png", 1)])
    assert (tmp_path / "crashed").exists()
    assert loaded.pixels is not None


def test_an_image_that_never_ends_is_named_and_the_next_is_decoded(
    tmp_path: Path, dangerous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding has six seconds here, and a process as long as it takes to start."""
    start = _Decoder._start

    def start_and_wait(decoder: _Decoder) -> Any:
        started = start(decoder)
        stderr = Path(f"/proc/{started[0].pid}/fd/2")
        wait_until(lambda: "memfd:warnings" in str(stderr.readlink()), 300)  # it listens, and decodes next
        return started

    monkeypatch.setattr(_Decoder, "_start", start_and_wait)
    monkeypatch.setattr("pipeline.images.loader.SECONDS", 6.0)
    paths = [write_picture(tmp_path / f"{i}.png", i) for i in range(3)]
    mark(paths[1], b"HANG")
    with Loader(of_files("some", paths), 299, "squash", 10**6) as loader:
        first = loader(0)
        (hanging,) = _decoding(psutil.Process())
        bad, last = loader(1), loader(2)
        assert not hanging.is_running()
        assert len(_decoding(psutil.Process())) == 1
    assert bad.key == image_key(paths[1].read_bytes())
    assert bad.reason == "keeps the decoder busy for more than 6 s"
    for each, path in ((first, paths[0]), (last, paths[2])):
        assert np.array_equal(each.pixels, decoding.decode(path.read_bytes()))  # type: ignore[arg-type]


def test_the_time_an_image_may_take_grows_with_what_may_be_large(
    tmp_path: Path, dangerous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.images.loader.SECONDS", 1.0)
    path = mark(write_picture(tmp_path / "a.png", 1), b"HANG")
    (bad,) = load([path], max_pixels=2 * decoding.DEFAULT_MAX_PIXELS)
    assert bad.reason == "keeps the decoder busy for more than 2 s"


def test_a_decoder_that_does_not_even_listen_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deaf").mkdir()
    (tmp_path / "deaf" / "sitecustomize.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "deaf"))
    monkeypatch.setattr("pipeline.images.loader.SECONDS", 1.0)
    large = tmp_path / "large.bmp"  # more than goes into the socket unread
    write_picture(large, 1, height=1000, width=1000)
    (bad,) = load([large], max_pixels=10**7)
    assert "keeps the decoder busy" in bad.reason


@pytest.mark.parametrize("ending", [b"KILL", b"XCPU"])
def test_a_decoder_that_was_killed_from_outside_blames_no_image(ending: bytes, tmp_path: Path, dangerous: Path) -> None:
    (loaded,) = load([mark(write_picture(tmp_path / "a.png", 1), ending)])
    assert loaded.key is None
    assert "the decoder was stopped by SIG" in loaded.reason


def test_many_threads_load_at_once(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{i}.png", i) for i in range(40)]
    before = psutil.Process().children()  # what other tests started, and Python keeps
    with Loader(of_files("some", paths), 299, "pad", 10**6) as loader, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(loader, range(40)))
    for i, path in enumerate(paths):
        assert found[i].i == i
        assert np.array_equal(found[i].pixels, decoding.decode(path.read_bytes(), fit="pad"))  # type: ignore[arg-type]
    assert psutil.Process().children() == before


def test_until_stops_at_the_first_that_is_enough(tmp_path: Path) -> None:
    paths = [tmp_path / "missing.png", *(write_picture(tmp_path / f"{i}.png", i) for i in range(2))]
    seen: list[int] = []
    with Loader(of_files("some", paths), 299, "squash", 10**6) as loader:
        loader.until([0, 1, 2], lambda image: seen.append(image.i) or image.pixels is not None)
    assert seen == [0, 1]


def test_an_image_that_crashes_the_decoder_is_quarantined_and_the_run_goes_on(
    photos: Path, tmp_path: Path, dangerous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(photos / "cats" / "3.png", b"SEGV")
    options = ("features", "--dataset", photos, *tiny_options(), "--json")
    done = icebox(tmp_path / "data", *options)
    assert (done.code, done.json["computed"]) == (3, 11)
    (bad,) = done.json["quarantined_images"]
    assert (bad["path"], bad["reason"]) == ("cats/3.png", "crashes the decoder (SIGSEGV)")
    again = icebox(tmp_path / "data", *options)
    assert (again.json["computed"], again.json["quarantined"]) == (0, 1)
    monkeypatch.delenv("PYTHONPATH")  # a sound decoder reads it, once it is asked to
    retried = icebox(tmp_path / "data", *options, "--retry-failed")
    assert (retried.code, retried.json["computed"], retried.json["quarantined"]) == (0, 1, 0)


def test_a_killed_run_leaves_no_decoder_behind(tmp_path: Path, dangerous: Path) -> None:
    folder = tmp_path / "many"
    for i in range(400):
        write_picture(folder / "class" / f"{i:03}.png", i)
    mark(folder / "class" / "399.png", b"HANG")  # the program cannot end before it is killed
    command = command_line(tmp_path / "data", "features", "--dataset", folder, *tiny_options())
    with warm.Process(command[2:], env=environment()) as program:
        decoders = _decoders_of(program)
        program.kill()
    assert program.returncode == -signal.SIGKILL
    _, alive = psutil.wait_procs(decoders, timeout=300)
    assert alive == []


def _decoding(parent: psutil.Process) -> list[psutil.Process]:
    return [each for each in parent.children(recursive=True) if "decode_process" in " ".join(each.cmdline())]


def _decoders_of(program: warm.Process) -> list[psutil.Process]:
    """Wait until the program has decoders, and return them."""

    def decoders() -> list[psutil.Process]:
        with suppress(psutil.Error):  # one that ended meanwhile
            return _decoding(psutil.Process(program.pid))
        return []

    return wait_until(decoders, process=program)


def test_a_decoding_process_that_cannot_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os, sys\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(RuntimeError, match="ended with exit code 7"):
        load([write_picture(tmp_path / "a.png", 1)])
