"""Decoding: a right picture or a DecodeError, never a wrong picture, never another exception."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from PIL import Image

from pipeline.core.errors import DecodeError, SpecError, UsageError
from pipeline.images import decoding
from pipeline.images.containers import read_header
from pipeline.images.decoding import DEFAULT_MAX_PIXELS, FITS, decode, decoder_version, resize

# pytest undoes the filter that the program installs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

H, W = 18, 24  # not square, no multiple of a JPEG block, no row that needs no padding


def picture(height: int = H, width: int = W) -> np.ndarray:
    """Smooth colours without any symmetry, so that no turned or swapped version passes for another."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 / (width - 1), y * 255 / (height - 1), 128 + 100 * np.sin(x / 7) * np.cos(y / 5))
    return np.dstack(planes).round().astype(np.uint8)


RGB = picture()
GREY = np.ascontiguousarray(RGB[..., 0])
ALPHA = np.tile(np.linspace(0, 255, H).astype(np.uint8)[:, None], (1, W))
RGBA = np.dstack([RGB, ALPHA])
LA = np.dstack([GREY, ALPHA])


def save(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **options)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def palette(colours: int = 32, pixels: np.ndarray = RGB) -> Image.Image:
    return Image.fromarray(pixels).quantize(colours)


def full(data: bytes) -> np.ndarray:
    """Decode without resizing: what the program sees before it fits the picture to the network."""
    return decoding._decode_file(data, DEFAULT_MAX_PIXELS)[0]


def seen(data: bytes) -> np.ndarray:
    """Pillow's rendering over white, the reference."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def assert_close(found: np.ndarray, expected: np.ndarray, mean: float = 0.5) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).mean() <= mean


def reason(data: bytes | np.ndarray, max_pixels: int = DEFAULT_MAX_PIXELS) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, max_pixels=max_pixels)
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 160
    return text


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def png_of_rows(pixels: np.ndarray, depth: int, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of a depth and colour type that neither Pillow nor OpenCV writes."""
    if depth < 8:
        bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row).tobytes() for row in bits.reshape(len(pixels), -1)]
    else:
        rows = [row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in pixels]
    return png(pixels.shape[1], len(pixels), depth, colour, b"".join(b"\0" + row for row in rows), extra)


def tiff(pixels: np.ndarray, photometric: int, *, tile: int = 0, planar: int = 1, **more: int) -> bytes:
    """A little TIFF writer, for kinds that Pillow does not write. `more`: bits, extra, orientation."""
    height, width = pixels.shape[:2]
    cube = pixels.reshape(height, width, -1)
    planes = [cube] if planar == 1 else list(np.split(cube, cube.shape[2], axis=2))
    blocks = [plane.tobytes() for plane in planes]
    if tile:
        padded = [np.pad(p, ((0, -height % tile), (0, -width % tile), (0, 0))) for p in planes]
        spots = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
        blocks = [p[y : y + tile, x : x + tile].tobytes() for p in padded for y, x in spots]
    starts = np.cumsum([8, *map(len, blocks)])[:-1].tolist()
    depth = more.get("bits", pixels.itemsize * 8)
    tags: list[tuple[int, str, list[int]]] = [(256, "I", [width]), (257, "I", [height])]
    tags += [(258, "H", [depth] * cube.shape[2]), (259, "H", [1]), (262, "H", [photometric])]
    tags += [] if tile else [(273, "I", starts)]
    tags += [(274, "H", [more.get("orientation", 1)]), (277, "H", [cube.shape[2]])]
    tags += [] if tile else [(278, "I", [height]), (279, "I", [*map(len, blocks)])]
    tags += [(284, "H", [planar])]
    sizes = [*map(len, blocks)]
    tags += [(322, "I", [tile]), (323, "I", [tile]), (324, "I", starts), (325, "I", sizes)] if tile else []
    tags += [(338, "H", [more["extra"]])] if "extra" in more else []
    return tiff_bytes(tags, b"".join(blocks))


def tiff_bytes(tags: list[tuple[int, str, list[int]]], pixels: bytes) -> bytes:
    start = 8 + len(pixels)
    entries, tail = b"", b""
    for tag, code, values in tags:
        value = struct.pack(f"<{len(values)}{code}", *values)
        if len(value) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(tail)
            value, tail = struct.pack("<I", place), tail + value
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[code], len(values)) + value.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<I", start) + pixels + directory + tail


def bmp(pixels: np.ndarray, bits: int, masks: bytes = b"") -> bytes:
    rows = b"".join(row.tobytes() + b"\0" * (-row.nbytes % 4) for row in pixels[::-1])
    size, kind = 54 + len(masks), 3 if masks else 0
    info = struct.pack("<IiiHHIIiiII", 40, pixels.shape[1], len(pixels), 1, bits, kind, len(rows), *[0] * 4)
    return b"BM" + struct.pack("<IHHI", size + len(rows), 0, 0, size) + info + masks + rows


def rle_bmp() -> bytes:
    grey = b"".join(bytes([level, level, level, 0]) for level in range(256))
    runs = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in GREY[::-1].tolist()) + b"\0\1"
    info = struct.pack("<IiiHHIIiiII", 40, W, H, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + info + grey + runs


def ycck() -> bytes:
    """An Adobe CMYK JPEG whose APP14 segment says YCCK: Pillow writes no YCCK itself."""
    data = bytearray(save(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def mpo() -> bytes:
    return save(RGB, "MPO", save_all=True, append_images=[Image.fromarray(255 - RGB)])


ANIMATION = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}
ANIMATION_ALPHA = {"save_all": True, "append_images": [Image.fromarray(255 - RGBA)]}
ANIMATION_GIF = {"save_all": True, "append_images": [palette(32, 255 - RGB)]}

# Everything that Pillow renders rightly.
RENDERED: dict[str, bytes] = {
    "jpeg": save(RGB, "JPEG", quality=95),
    "jpeg-grey": save(GREY, "JPEG", quality=95),
    "jpeg-progressive": save(RGB, "JPEG", progressive=True),
    "jpeg-restart": save(RGB, "JPEG", restart_marker_blocks=1),
    "jpeg-cmyk": save(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95),
    "jpeg-ycck": ycck(),
    "jpeg-rgb": save(RGB, "JPEG", quality=95, keep_rgb=True),
    "mpo": mpo(),
    "png": save(RGB, "PNG"),
    "png-grey": save(GREY, "PNG"),
    "png-1": save(Image.fromarray(GREY).convert("1"), "PNG"),
    "png-palette": save(palette(), "PNG"),
    "png-palette-4": save(palette(8), "PNG", bits=4),
    "png-palette-clear": save(palette(), "PNG", transparency=3),
    "png-palette-alpha": save(palette(), "PNG", transparency=bytes(range(0, 256, 8))),
    "png-rgb-clear": save(RGB, "PNG", transparency=tuple(RGB[4, 4].tolist())),
    "png-grey-clear": save(GREY, "PNG", transparency=int(GREY[4, 4])),
    "png-la": save(LA, "PNG"),
    "png-rgba": save(RGBA, "PNG"),
    "apng": save(RGB, "PNG", **ANIMATION),
    "webp": save(RGB, "WEBP", quality=95),
    "webp-lossless": save(RGB, "WEBP", lossless=True),
    "webp-alpha": save(RGBA, "WEBP", lossless=True, exact=True),
    "webp-alpha-lossy": save(RGBA, "WEBP", quality=95),
    "webp-animated": save(RGB, "WEBP", lossless=True, **ANIMATION),
    "webp-animated-alpha": save(RGBA, "WEBP", lossless=True, **ANIMATION_ALPHA),
    "gif": save(palette(), "GIF"),
    "gif-clear": save(palette(), "GIF", transparency=5),
    "gif-interlaced": save(palette(), "GIF", interlace=1),
    "gif-animated": save(palette(), "GIF", **ANIMATION_GIF),
    "gif-animated-clear": save(palette(), "GIF", transparency=4, **ANIMATION_GIF),
    "bmp": save(RGB, "BMP"),
    "bmp-grey": save(GREY, "BMP"),
    "bmp-1": save(Image.fromarray(GREY).convert("1"), "BMP"),
    "bmp-palette": save(palette(16), "BMP"),
    "bmp-32": save(RGBA, "BMP"),
    "bmp-rle": rle_bmp(),
    "tiff": save(RGB, "TIFF"),
    "tiff-grey": save(GREY, "TIFF"),
    "tiff-1": save(Image.fromarray(GREY).convert("1"), "TIFF"),
    "tiff-g4": save(Image.fromarray(GREY).convert("1"), "TIFF", compression="group4"),
    "tiff-palette": save(palette(), "TIFF"),
    "tiff-rgba": save(RGBA, "TIFF"),
    "tiff-cmyk": save(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "tiff-lzw": save(RGB, "TIFF", compression="tiff_lzw"),
    "tiff-deflate": save(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff-packbits": save(RGB, "TIFF", compression="packbits"),
    "tiff-jpeg": save(RGB, "TIFF", compression="jpeg"),
    "tiff-pages": save(RGB, "TIFF", **ANIMATION),
    "tiff-white-is-0": tiff(255 - GREY, 0),
    "tiff-tiles": tiff(picture(40, 70), 2, tile=32),
    "tiff-planes": tiff(RGB, 2, planar=2),
}

RGB16, GREY16, RGBA16 = (array.astype(np.uint16) * 257 for array in (RGB, GREY, RGBA))
BGRA16 = np.ascontiguousarray(RGBA16[..., [2, 1, 0, 3]])
PREMULTIPLIED = np.dstack([(RGB * (ALPHA[..., None] / 255)).round().astype(np.uint8), ALPHA])
GREY3 = np.dstack([GREY] * 3)
SHOWN = over_white(RGB, ALPHA)

# What Pillow renders wrongly or not at all, with what a person should see.
COMPUTED: dict[str, tuple[bytes, np.ndarray]] = {
    "png-grey-16": (png_of_rows(GREY16, 16, 0), GREY3),
    "png-rgb-16": (png_of_rows(RGB16, 16, 2), RGB),
    "png-la-16": (png_of_rows(LA.astype(np.uint16) * 257, 16, 4), over_white(GREY3, ALPHA)),
    "png-rgba-16": (png_of_rows(RGBA16, 16, 6), SHOWN),
    "png-grey-2": (png_of_rows(GREY >> 6, 2, 0), np.dstack([(GREY >> 6) * 85] * 3)),
    "tiff-grey-16": (save(GREY16, "TIFF"), GREY3),
    "tiff-white-is-0-16": (tiff(65535 - GREY16, 0), GREY3),
    "tiff-rgb-16": (tiff(RGB16, 2), RGB),
    "tiff-rgb-16-tiles": (tiff(RGB16, 2, tile=16), RGB),
    "tiff-rgba-16": (tiff(RGBA16, 2, extra=2), SHOWN),
    "tiff-rgba-16-opencv": (cv2.imencode(".tif", BGRA16)[1].tobytes(), SHOWN),
    "tiff-rgba-16-premultiplied": (tiff(PREMULTIPLIED.astype(np.uint16) * 257, 2, extra=1), SHOWN),
    "tiff-rgba-premultiplied": (tiff(PREMULTIPLIED, 2, extra=1), SHOWN),
    "tiff-rgba-opencv": (cv2.imencode(".tif", (BGRA16 >> 8).astype(np.uint8))[1].tobytes(), SHOWN),
    "tiff-rgb-and-other": (tiff(RGBA, 2, extra=0), RGB),
    "bmp-565": (
        bmp(
            (RGB[..., 0] >> 3).astype("<u2") << 11 | (RGB[..., 1] >> 2).astype("<u2") << 5 | RGB[..., 2] >> 3,
            16,
            struct.pack("<III", 0xF800, 0x7E0, 0x1F),
        ),
        (RGB >> 3) * (255 / 31),
    ),
}
SMALL = RENDERED | {name: data for name, (data, _) in COMPUTED.items()}


@pytest.mark.parametrize("name", RENDERED)
def test_a_picture_is_what_pillow_shows(name: str) -> None:
    data = RENDERED[name]
    # OpenCV and Pillow round CMYK differently, and Pillow reads YCbCr in TIFF with another filter.
    assert_close(full(data), seen(data), mean=1.5 if "cmyk" in name or "ycck" in name else 0.5)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_picture_is_what_was_stored(name: str) -> None:
    data, expected = COMPUTED[name]
    assert_close(full(data), expected, mean=1.5 if name == "bmp-565" else 0.5)


def test_five_bit_white_is_white() -> None:
    assert full(bmp(np.full((4, 4), 0x7FFF, "<u2"), 16)).min() == 255


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_rounded_to_eight(kind: str) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = png_of_rows(levels, 16, 0) if kind == "png" else tiff(levels, 1)
    expected = np.round(levels / 257).astype(np.uint8)
    assert np.array_equal(full(data), np.dstack([expected] * 3))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_clear_level_of_a_grey_png_is_white(depth: int) -> None:
    levels = (GREY16 >> (16 - depth)).astype(np.uint16)
    clear = int(levels[3, 3])
    found = full(png_of_rows(levels, depth, 0, png_chunk(b"tRNS", struct.pack(">H", clear))))
    expected = np.where(levels == clear, 255, np.round(levels * (255 / (2**depth - 1))))
    assert np.array_equal(found, np.dstack([expected] * 3))


# --- orientation ---------------------------------------------------------------------------------------------

STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # how a picture lies in the file, to be turned upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def oriented(kind: str, pixels: np.ndarray, orientation: int) -> bytes:
    pixels = np.ascontiguousarray(pixels)
    if kind == "late png":  # the chunk may stand after the pixels
        data = save(pixels, "PNG")
        return data[:-12] + png_chunk(b"eXIf", exif(orientation)[6:]) + data[-12:]
    if kind == "tiff 16":
        return tiff(pixels.astype(np.uint16) * 257, 2, orientation=orientation)
    if kind == "png 16":
        chunk = png_chunk(b"eXIf", exif(orientation)[6:])
        return png_of_rows(pixels.astype(np.uint16) * 257, 16, 2, chunk)
    options: dict[str, object] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(kind, {})
    return save(pixels, kind, exif=exif(orientation), **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "late png", "png 16", "tiff 16"])
def test_a_turned_picture_comes_upright(kind: str, orientation: int) -> None:
    data = oriented(kind, STORED[orientation](RGB), orientation)
    assert_close(full(data), RGB, mean=2.5 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_turned_transparent_picture_comes_upright(kind: str, orientation: int) -> None:
    stored = STORED[orientation](RGBA)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = save(np.ascontiguousarray(stored), kind, exif=exif(orientation), **options)
    assert_close(full(data), SHOWN)


def test_damaged_exif_leaves_the_picture_as_stored() -> None:
    for block in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09junk", exif(77)):
        assert_close(full(save(RGB, "JPEG", quality=98, exif=block)), RGB, mean=2.5)
    late = png_chunk(b"eXIf", b"no TIFF structure at all")
    assert np.array_equal(full(RENDERED["png"][:-12] + late + RENDERED["png"][-12:]), RGB)


# --- not one whole image -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_file_cut_anywhere_is_refused_or_gives_the_same_picture(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = SMALL[name]
    whole, refused = full(data), 0
    for length in range(len(data)):
        try:
            assert np.array_equal(full(data[:length]), whole), length
        except DecodeError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(data) / 4  # what may be missing is further frames, or the end of an RLE bitmap
    assert capfd.readouterr().err == ""  # a progress display would be torn


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_a_larger_jpeg_cut_in_its_scans_is_refused(options: dict[str, object]) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (200, 300, 3), np.uint8)
    data = save(noise, "JPEG", **options)
    for length in [*range(700, len(data), 997), *range(len(data) - 40, len(data))]:
        assert "JPEG cut short" in reason(data[:length])


def with_thumbnail() -> bytes:
    thumbnail = save(RGB[:8, :8].copy(), "JPEG")
    body = b"Exif\0\0" + exif(1)[6:] + thumbnail
    data = save(picture(60, 90), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_file() -> None:
    data = with_thumbnail()
    assert full(data).shape == (60, 90, 3)
    for length in range(data.rindex(b"\xff\xda") + 14, len(data), 13):
        assert reason(data[:length]) == "JPEG cut short: no end marker"


def test_bytes_after_the_end_do_not_matter() -> None:
    for name in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        data = SMALL[name]
        assert np.array_equal(full(data + b"\xff\xd8 trailing"), full(data))


def test_fill_bytes_between_segments_do_not_matter() -> None:
    data = RENDERED["jpeg"]
    scan = data.index(b"\xff\xda")
    filled = data[:scan] + b"\xff\xff\xff" + data[scan:-2] + b"\xff\xff\xff" + data[-2:]
    assert np.array_equal(full(filled), full(data))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty file"),
        (b"a list of things to do\n", "not an image in a supported format"),
        (b"RIFF\x10\0\0\0WAVEfmt and so on", "not an image in a supported format"),
        (b"\xff\xd8\xff", "JPEG with a damaged header"),
        (RENDERED["jpeg"][:300], "JPEG"),
        (RENDERED["jpeg"][:-1], "JPEG cut short: no end marker"),
        (RENDERED["png"][:-1], "PNG cut short: no IEND chunk"),
        (RENDERED["webp"][:-1], "WebP cut short"),
        (RENDERED["gif"][:200], "GIF that OpenCV cannot decode"),
        (RENDERED["png"].replace(b"IEND", b"IEMD"), "PNG cut short"),
    ],
)
def test_the_reason_is_short_and_specific(data: bytes, text: str) -> None:
    assert reason(data).startswith(text)


def test_pixels_of_another_size_than_the_header_says_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: RGB[:, :-1])
    assert reason(RENDERED["png"]) == "PNG damaged: the header and the pixels disagree about the size"


def test_a_damaged_png_is_reported_without_noise(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(RENDERED["png"])
    data[data.index(b"IDAT") + 9] ^= 0x40
    assert reason(bytes(data)) == "PNG damaged: wrong checksum of IDAT"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (save(GREY.astype(np.float32), "TIFF"), "signed or floating-point samples"),
        (save(GREY.astype(np.int32), "TIFF"), "signed or floating-point samples"),
        (cv2.imencode(".tif", RGB.astype(np.float32))[1].tobytes(), "signed or floating-point samples"),
        (save(LA, "TIFF"), "alpha in a grey or palette image"),
        (tiff(RGB16, 2, planar=2), "16-bit colours in separate planes"),
        (tiff(RGBA16, 5), "16-bit colours that are not RGB"),
        (tiff(GREY16, 1, bits=12), "12 bits a sample"),
        (tiff(picture(40, 70), 2, tile=32, orientation=6), "8-bit tiles to be turned"),
    ],
)
def test_a_tiff_that_opencv_would_get_wrong_is_refused(data: bytes, text: str) -> None:
    assert text in reason(data)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        # Half of the hits in the header, where structure is.
        at = int(rng.integers(min(len(damaged), 80) if rng.random() < 0.5 else len(damaged)))
        if rng.random() < 0.7:
            damaged[at] = int(rng.integers(256))
        else:
            damaged[at : at + int(rng.integers(6))] = rng.bytes(int(rng.integers(1, 6)))
    return bytes(damaged)


def test_arbitrary_bytes_give_an_array_or_a_decode_error() -> None:
    rng, files, decoded = np.random.default_rng(7), list(SMALL.values()), 0
    for turn in range(6000):
        data = mutated(files[turn % len(files)], rng)
        try:
            pixels = decode(data, size=16, max_pixels=1_000_000)
        except DecodeError as error:
            assert str(error) and "\n" not in str(error)
        else:
            decoded += 1
            assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert decoded > 300  # the loop reaches beyond the headers


# --- limits --------------------------------------------------------------------------------------------------


def huge_png(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, b"\0" * 1000)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def imdecode(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(cv2, "imdecode", imdecode)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("no_decoding")
def test_too_many_pixels_are_refused_from_the_header() -> None:
    big = struct.pack("<HH", 20_000, 20_000)
    gif, frames = RENDERED["gif"], RENDERED["webp-animated"]
    files = [
        huge_png(20_000, 20_000),
        gif[:6] + big + gif[10:],
        RENDERED["bmp"][:18] + struct.pack("<ii", 20_000, 20_000) + RENDERED["bmp"][26:],
        frames[:24] + b"\x1f\x4e\x00" * 2 + frames[30:],
        tiff(RGB, 2).replace(struct.pack("<HHII", 256, 4, 1, W), struct.pack("<HHII", 256, 4, 1, 60_000_000)),
    ]
    for data in files:
        assert "over the limit of 180,000,000 (--max-pixels)" in reason(data)
    for name, data in SMALL.items():
        if "tiles" not in name:
            assert reason(data, max_pixels=H * W - 1) == f"24 x 18 pixels, over the limit of {H * W - 1} (--max-pixels)"


@pytest.mark.filterwarnings("error")
def test_pillows_own_limit_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for data in SMALL.values():
        decode(data)


def test_opencvs_own_limits_are_named() -> None:
    assert "over OpenCV's limit (OPENCV_IO_MAX_IMAGE_PIXELS" in reason(huge_png(40_000, 40_000), max_pixels=2**40)
    assert "at most 1,000,000 on a side" in reason(huge_png(2_000_000, 1))


def test_a_damaged_exif_block_warns_nobody() -> None:
    data = save(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09junk")
    code = "import sys; from pipeline.images.decoding import decode; decode(sys.stdin.buffer.read())"
    command, root = [sys.executable, "-W", "always", "-c", code], Path(decoding.__file__).parents[2]
    done = subprocess.run(command, input=data, capture_output=True, check=True, cwd=root)
    assert b"PIL" not in done.stderr and b"EXIF" not in done.stderr


# --- arrays and sizes ----------------------------------------------------------------------------------------


def test_arrays_are_taken_as_they_are() -> None:
    expected = resize(RGB, 50, "squash")
    assert np.array_equal(decode(RGB, size=50), expected)
    assert np.array_equal(decode(RGB[::-1, ::-1][::-1, ::-1], size=50), expected)  # not contiguous
    grey = resize(GREY3, 50, "squash")
    assert np.array_equal(decode(GREY, size=50), grey)
    assert np.array_equal(decode(GREY[..., None], size=50), grey)
    assert np.array_equal(decode(RGB[..., 0], size=50), grey)


def test_other_arrays_are_refused() -> None:
    for pixels in (RGB / 255, RGBA, RGB[None], RGB[0, 0], RGB.astype(np.int64), RGB.astype(bool)):
        assert "pixels must be uint8 of shape" in reason(pixels)
    assert reason(RGB[:0]) == "no pixels: 24 x 0"
    assert "over the limit of 100 " in reason(RGB, max_pixels=100)


def test_a_picture_of_the_right_size_is_returned_unchanged() -> None:
    square = picture(40, 40)
    for fit in FITS:
        assert decode(square, size=40, fit=fit) is square  # pyright: ignore[reportArgumentType]
    assert np.array_equal(decode(save(square, "PNG"), size=40), square)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 299), (299, 2), (300, 298), (7, 1000)])
def test_any_shape_comes_out_square(shape: tuple[int, int], fit: decoding.Fit) -> None:
    found = decode(np.full((*shape, 3), 200, np.uint8), fit=fit)
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((299, 299, 3), np.uint8, True)
    assert 200 in found
    assert set(np.unique(found)) <= ({127, 200} if fit == "pad" else {200})


def test_shrinking_averages_and_growing_interpolates() -> None:
    stripes = np.tile(np.array([0, 0, 0, 200], np.uint8), (8, 8))[..., None].repeat(3, axis=2)  # 32 columns
    assert (resize(stripes, 8, "squash") == 50).all()
    # 2 rows grow while 32 columns shrink: the columns are averaged first, so no stripe survives.
    assert (resize(stripes[:2], 8, "squash") == 50).all()
    steps = resize(np.array([[[0] * 3, [240] * 3]] * 2, np.uint8), 4, "squash")[0, :, 0]
    assert steps.tolist() == [0, 60, 180, 240]


def test_crop_takes_the_central_square() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = RGB[:10, :10]
    assert np.array_equal(resize(wide, 10, "crop"), RGB[:10, :10])
    assert np.array_equal(resize(wide.swapaxes(0, 1), 10, "crop"), RGB[:10, :10].swapaxes(0, 1))
    assert resize(wide, 10, "crop").flags.c_contiguous


def test_pad_keeps_the_whole_picture_in_the_middle() -> None:
    found = resize(np.full((10, 20, 3), 255, np.uint8), 40, "pad")
    assert (found[10:30] == 255).all()
    assert (found[:10] == 127).all() and (found[30:] == 127).all()


def test_squash_ignores_the_aspect_ratio() -> None:
    found = resize(np.repeat(picture(20, 20), 3, axis=1), 20, "squash")
    assert np.array_equal(found, picture(20, 20))


def test_an_unknown_fit_is_named() -> None:
    with pytest.raises(UsageError, match="squash, crop, pad; found 'stretch'"):
        resize(RGB, 20, "stretch")  # pyright: ignore[reportArgumentType]


def test_the_version_names_both_libraries() -> None:
    assert decoder_version() == f"opencv {cv2.__version__} pillow {PIL.__version__} checks 2"


def test_headers_agree_with_pillow() -> None:
    for name, data in RENDERED.items():
        header = read_header(data)
        assert (header.width, header.height) == Image.open(io.BytesIO(data)).size, name


# --- what a file is that is no image, or none that can be decoded ------------------------------------------------


def jpeg_of(marker: int, precision: int = 8) -> bytes:
    """A JPEG whose frame is coded in another way, as far as its header goes."""
    data = bytearray(RENDERED["jpeg-grey"])
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, precision
    return bytes(data)


def brand(*names: bytes) -> bytes:
    body = names[0] + bytes(4) + b"".join(names)
    return struct.pack(">I", len(body) + 8) + b"ftyp" + body + b"\0\0\0\x08meta"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (brand(b"heic", b"mif1"), "HEIC: not supported; convert it to JPEG or PNG"),
        (brand(b"mif1", b"heic"), "HEIC: not supported"),
        (brand(b"avif", b"mif1", b"miaf"), "AVIF: not supported; convert"),
        (brand(b"mif1", b"avif"), "AVIF: not supported"),
        (brand(b"crx ", b"isom"), "raw photo of a camera: not supported; develop it"),
        (brand(b"isom", b"mp42"), "video, not an image"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL: not supported"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftyp", "JPEG XL: not supported"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000: not supported"),
        (b"FUJIFILMCCD-RAW 0201", "raw photo of a camera"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing: not supported; render it to PNG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<svg/>", "SVG drawing: not supported"),
        (b"\n<!DOCTYPE html><title>404</title>", "HTML page, not an image; download the image itself"),
        (b"<!-- saved -->\n<html>", "HTML page, not an image; download the image itself"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML text, not an image"),
        (b'{"error": "rate limit"}', "JSON text, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer, not the image; fetch"),
        (bytes(5000), "nothing but zeros"),
        (jpeg_of(0xF7), "JPEG-LS: not supported"),
        (jpeg_of(0xC1, 12), "JPEG with 12 bits a sample: not supported"),
        (jpeg_of(0xC5), "hierarchical JPEG: not supported"),
        (tiff(GREY.astype(np.float64), 1), "TIFF with 64 bits a sample: not supported; save it"),
        (cv2.imencode(".tif", RGB.astype(np.float64))[1].tobytes(), "TIFF with signed or floating-point samples: not"),
        (tiff(RGB, 2)[:8] + b"CR\2\0" + tiff(RGB, 2)[12:], "raw photo of a camera"),
    ],
)
def test_what_is_no_image_here_is_called_by_its_name(data: bytes, text: str) -> None:
    assert reason(data).startswith(text)
    assert "damaged" not in reason(data)


def test_a_raw_photo_is_not_taken_for_its_preview() -> None:
    for tags in ([(50706, "I", [1])], [(254, "I", [1]), (330, "I", [8])]):
        plain: list[tuple[int, str, list[int]]] = [
            (256, "I", [W]),
            (257, "I", [H]),
            (258, "H", [8] * 3),
            (259, "H", [1]),
        ]
        plain += [(262, "H", [2]), (273, "I", [8]), (277, "H", [3]), (278, "I", [H]), (279, "I", [RGB.size])]
        assert np.array_equal(full(tiff_bytes(plain, RGB.tobytes())), RGB)
        assert reason(tiff_bytes(sorted([*plain, *tags]), RGB.tobytes())).startswith("raw photo of a camera")


# --- 16 bits that hold fewer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff white is 0", "rgb", "rgba"])
@pytest.mark.parametrize("depth", decoding.DEPTHS)
def test_a_depth_spreads_values_over_the_whole_range(kind: str, depth: int) -> None:
    most = 2**depth - 1
    levels = np.linspace(0, most, 256).round().astype(np.uint16).reshape(16, 16)
    colours = np.dstack([levels] * 3)
    data = {
        "png": lambda: png_of_rows(levels, 16, 0),
        "tiff": lambda: tiff(levels, 1),
        "tiff white is 0": lambda: tiff(levels, 0),
        "rgb": lambda: png_of_rows(colours, 16, 2),
        "rgba": lambda: png_of_rows(np.dstack([colours, np.full((16, 16), 65535, np.uint16)]), 16, 6),
    }[kind]()
    pixels, peak = decoding._decode_file(data, DEFAULT_MAX_PIXELS, depth)
    shown = np.round(levels / most * 255)
    assert np.array_equal(pixels[..., 0], 255 - shown if kind == "tiff white is 0" else shown)
    assert peak == most


def test_values_above_the_depth_are_white() -> None:
    levels = np.array([[0, 4095, 4096, 65535]], np.uint16)
    assert decoding._decode_file(png_of_rows(levels, 16, 0), 100, 12)[0][0, :, 0].tolist() == [0, 255, 255, 255]


def test_pictures_of_8_bits_have_no_depth() -> None:
    for name in ("jpeg", "png", "gif", "tiff", "png-rgba"):
        pixels, peak = decoding._decode_file(RENDERED[name], DEFAULT_MAX_PIXELS, 12)
        assert np.array_equal(pixels, full(RENDERED[name])) and peak == 0


def test_each_depth_is_a_policy_of_its_own_and_16_bits_that_of_before() -> None:
    assert (
        decoding.decode_policy(None) == decoding.decode_policy(16) == decoding.DECODE_POLICY == "rgb8-exif-over_white-1"
    )
    assert decoding.decode_policy(12) == "rgb8-exif-over_white-1-depth_12"
    assert [decoding.depth_of(decoding.decode_policy(depth)) for depth in decoding.DEPTHS] == list(decoding.DEPTHS)
    for depth in (8, 17):
        with pytest.raises(UsageError, match="9 … 16"):
            decoding.decode_policy(depth)
    with pytest.raises(SpecError):
        decoding.depth_of("rgb8-of-another-version")


@pytest.mark.parametrize(
    ("peak", "depth", "text"),
    [(0, 16, ""), (40_000, 16, ""), (20_000, 16, ""), (100, 9, ""), (4095, 12, ""), (3000, 12, ""),
     (4095, 16, "take --depth 12"),
     (300, 16, "take --depth 9"), (100, 16, "take --depth 9"), (16_000, 12, "white; take --depth 14")],
)  # fmt: skip
def test_the_largest_value_of_all_tells_the_depth(peak: int, depth: int, text: str) -> None:
    assert decoding.depth_advice(peak, depth).endswith(text)
    assert bool(decoding.depth_advice(peak, depth)) == bool(text)
