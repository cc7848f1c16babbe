"""JPEGs damaged inside are refused, and no sound one is, whatever its decoder warns of."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, icebox, picture
from made import load
from own_networks import tiny_options
from PIL import Image

from pipeline.core.errors import DecodeError
from pipeline.images import decoding, jpeg
from pipeline.images.decode_process import decode_whole
from pipeline.images.decoding import DEFAULT_MAX_PIXELS

sys.path.insert(0, str(ROOT / "benchmarks"))
from damaged_jpegs import DAMAGES, ENCODERS, WARNED, damaged_files  # type: ignore[import-not-found]


def detailed(seed: int = 0, height: int = 240, width: int = 320) -> np.ndarray:
    """A picture with enough in it for a scan of some length."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.addWeighted(picture(seed, height, width), 0.8, cv2.GaussianBlur(noise, (0, 0), 1.5), 0.6, 0)


def encoded(**options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(detailed()).save(out, "JPEG", **{"quality": 85, **options})  # pyright: ignore[reportArgumentType]
    return out.getvalue()


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[bytes], str]:
    """Decode in this process as the decoding process does, and return why a file is refused, or ""."""
    monkeypatch.setattr("pipeline.images.decode_process.heard", lambda: capfd.readouterr().err)

    def decode(data: bytes) -> str:
        try:
            pixels, _ = decode_whole(data, 64, "squash", DEFAULT_MAX_PIXELS, 16)
        except DecodeError as error:
            return str(error)
        assert np.array_equal(pixels, decoding.decode(data, size=64))
        return ""

    return decode


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "tensorflow"])
def test_what_encoders_write_is_sound(name: str, verdict: Callable[[bytes], str]) -> None:
    rng = np.random.default_rng(1)
    for pixels in (detailed(1), detailed(2, 37, 51), np.full((60, 90, 3), 200, np.uint8)):
        data = ENCODERS[name](pixels, rng)
        assert verdict(data) == ""
        assert jpeg.damage(data, "", lambda data: "") == ""  # not even if it is followed


@pytest.mark.parametrize("name", WARNED)
def test_a_harmless_warning_refuses_no_file(name: str, verdict: Callable[[bytes], str]) -> None:
    assert verdict(WARNED[name](detailed(), np.random.default_rng(1))) == ""


MIDDLE = {"zeros": lambda data, at: data[:at] + bytes(2000) + data[at + 2000 :],
          "cut and closed": lambda data, at: data[:at] + b"\xff\xd9"}  # fmt: skip


@pytest.mark.parametrize("spoil", MIDDLE)
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0, "optimize": True}],
    ids=str,
)
def test_a_jpeg_whose_middle_is_damaged_is_refused(
    spoil: str, options: dict[str, object], verdict: Callable[[bytes], str]
) -> None:
    data = encoded(**options)
    assert verdict(data) == ""
    assert verdict(MIDDLE[spoil](data, len(data) // 2)).startswith("JPEG damaged inside: ")


def test_the_end_of_a_line_behind_a_progressive_scan_is_harmless() -> None:
    data = encoded(progressive=True)
    for behind, found in ((b"\r\n", ""), (b"left behind", "11 extraneous bytes before marker")):
        warning = f"Corrupt JPEG data: {len(behind)} extraneous bytes before marker 0xd9"
        assert jpeg.damage(data[:-2] + behind + data[-2:], warning, lambda data, warning=warning: warning) == found


def test_a_harmless_warning_hides_no_damage(verdict: Callable[[bytes], str]) -> None:
    """Of what it warns of libjpeg prints the first alone."""
    for options in ({}, {"progressive": True}):
        data = encoded(**options)
        junk = data[:20] + b"left behind" + data[20:]
        assert verdict(junk) == ""
        assert "damaged inside" in verdict(junk[: len(junk) // 2] + b"\xff\xd9")


def test_a_harmless_warning_does_not_have_a_large_file_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Following 12 megapixels takes ten seconds and more, decoding them again half a second."""
    monkeypatch.setattr(jpeg, "_follow", lambda segments: pytest.fail("followed"))
    data = encoded()
    junk = data[:20] + b"left behind" + data[20:]
    assert jpeg.damage(junk, "Corrupt JPEG data: 11 extraneous bytes before marker 0xdb", lambda bare: "") == ""
    monkeypatch.setattr(jpeg, "_MOST_FOLLOWED", 100)
    assert jpeg.damage(data, "", lambda bare: "") == ""


def test_a_file_too_large_to_be_followed_is_decoded_again(
    verdict: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan of a hundred megabytes would keep the decoding process busy for longer than any image may."""
    monkeypatch.setattr(jpeg, "_MOST_FOLLOWED", 1000)
    monkeypatch.setattr(jpeg, "_follow", lambda segments: pytest.fail("followed"))
    data = encoded()
    junk = data[:20] + b"left behind" + data[20:]
    assert verdict(junk) == ""
    assert verdict(data[:-2] + bytes(500) + data[-2:]) == ""
    for spoil in MIDDLE.values():
        assert "damaged inside" in verdict(spoil(junk, len(junk) // 2))


def test_what_is_left_over_tells_padding_from_a_scan_out_of_step(verdict: Callable[[bytes], str]) -> None:
    data = encoded()
    assert verdict(data[:-2] + bytes(500) + data[-2:]) == ""
    at, run = len(data) // 2, 1500
    swapped = data[:at] + data[at + run : at + 2 * run] + data[at : at + run] + data[at + 2 * run :]
    assert "damaged inside" in verdict(swapped)


def test_most_damage_is_caught(verdict: Callable[[bytes], str]) -> None:
    """Two blocks of a scan that changed places may leave nothing to see; the other kinds always do."""
    sound = [encoded(), encoded(progressive=True), encoded(restart_marker_rows=1)]
    found = [(name, verdict(data)) for name, data in damaged_files(sound, 25 * len(DAMAGES), np.random.default_rng(5))]
    missed = [name for name, reason in found if not reason]
    assert all(name.startswith("blocks swapped") for name in missed)
    assert len(missed) <= 10


@pytest.mark.parametrize("cut", [2, 3, 20, 160, 400, 600])
def test_headers_that_lack_something_raise_nothing_else(cut: int) -> None:
    data = encoded()
    for at in (data.index(b"\xff\xdb"), data.index(b"\xff\xc4"), data.index(b"\xff\xc0")):
        assert isinstance(jpeg.damage(data[:at] + data[at + cut :], "", lambda data: ""), str)


def test_a_table_of_more_codes_than_there_are_takes_no_more_room() -> None:
    """Libjpeg looks at no table that no scan refers to, so that a file of a few KB may hold anything there."""
    assert len(jpeg._huffman(bytes([255, *15 * [0]]), bytes(255))) == 65536


def test_a_decoding_process_hears_of_one_image_what_is_about_it(tmp_path: Path) -> None:
    data = encoded()
    files = [data, data[: len(data) // 2] + b"\xff\xd9", data, data[:20] + b"left behind" + data[20:]]
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(content)
    found = load(paths)
    assert [each.reason for each in found] == ["", "JPEG damaged inside: premature end of data segment", "", ""]
    assert np.array_equal(found[0].pixels, found[2].pixels)  # type: ignore[arg-type]


def test_rows_of_damaged_images_stay_until_they_are_looked_for(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, place = encoded(), photos / "cats" / "broken.jpg"
    place.write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    (tmp_path / "deaf").mkdir()  # as an earlier version was
    (tmp_path / "deaf" / "sitecustomize.py").write_text(DEAF)
    deaf = f"{tmp_path / 'deaf'}:{ROOT}"
    features = ("features", *tiny_options(), "--json", "--dataset", photos)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", deaf)
        made = icebox(tmp_path / "data", *features)
    assert (made.code, made.json["rows"]) == (0, 13)
    verify = ("cache", "verify", "--images", photos, "--json")
    for _ in range(2):
        found = icebox(tmp_path / "data", *verify)
        assert (found.code, found.json["images"]["images"]) == (1, 13)
        (bad,) = found.json["images"]["quarantined"]
        assert (bad["path"], bad["reason"][:20]) == ("cats/broken.jpg", "JPEG damaged inside:")
    after = icebox(tmp_path / "data", *features, "--retry-failed", "--max-pixels", "1000000")
    assert (after.code, after.json["rows"], after.json["quarantined"]) == (3, 12, 1)
    with monkeypatch.context() as patch:  # a decoder that finds nothing wrong with it releases it
        patch.setenv("PYTHONPATH", deaf)
        released = icebox(tmp_path / "data", *verify)
    assert (released.code, released.json["images"]["released"]) == (0, 1)
    assert icebox(tmp_path / "data", *features).json["rows"] == 13


DEAF = """
import sys
if any("decode_process" in argument for argument in sys.orig_argv):
    import pipeline.images.jpeg
    pipeline.images.jpeg.damage = lambda *all: ""
"""
