"""Read the header of an image file, and check that the file is complete, without decoding a pixel.

A decoder may fill the missing part of a file with grey and report no error. So JPEG, PNG and WebP files are parsed to
their end here. The other formats need no such check: OpenCV reports a truncated BMP, GIF or TIFF
(`tests/images/test_decoding.py` truncates each of them at every length).
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import BmpImagePlugin, JpegImagePlugin
from PIL import TiffImagePlugin as Tiff

from pipeline.core.errors import DecodeError
from pipeline.images import jpeg
from pipeline.images.foreign_formats import CONVERT, RAW, foreign

# These warnings report unusual metadata, such as a damaged EXIF block, once per file; no pixel depends on them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Jpeg|Tiff|Bmp)ImagePlugin")

# A marker that ends a scan or begins a segment: not a stuffed 0xFF byte, a restart marker or a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END = 0xD9

_PNG_CHECKED = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"})
_PNG_WANTED = frozenset({b"IHDR", b"tRNS", b"eXIf"})

_TIFF_ORIENTATION = 274
_SUBFILE, _SUBFILES, _DNG = 254, 330, 50706  # tags of raw photos
_CLASSIC = 42  # version of a TIFF that is not a BigTIFF, in its third or fourth byte


@dataclass(frozen=True, slots=True)
class Header:
    """The size and pixel format of an image file: facts needed before decoding, or that OpenCV does not return.

    `width` and `height` are the size of the stored image in pixels; for a TIFF, of the upright image.
    """

    kind: str
    width: int
    height: int
    exif: bytes = b""
    clear: int | None = None  # the grey level that means transparent, on the scale of the decoded pixels
    opaque: bool = False  # a fourth channel, if present, is not alpha
    premultiplied: bool = False  # colours are already multiplied by alpha
    inverted: bool = False  # 0 is white
    five_bits: bool = False  # channels have 5 or 6 bits, the upper ones of 8
    deep: bool = False  # more than 8 bits a channel
    alpha: bool = False  # may have transparent pixels; always False for a GIF


def read_header(data: bytes) -> Header:
    """Return the header of an image file; check that JPEG, PNG and WebP files are complete, as OpenCV does not.

    Raises DecodeError, and no other error, if `data` is not one whole image, as far as this is visible here.
    """
    if not data:
        raise DecodeError("empty file")
    kind, read = next((entry[1:] for entry in _FORMATS if data.startswith(entry[0])), ("", None))
    if read is None or (kind == "WebP" and data[8:12] != b"WEBP"):
        raise DecodeError(foreign(data) or "not an image in a supported format (JPEG, PNG, WebP, BMP, TIFF, GIF)")
    try:
        return read(data)
    except DecodeError:
        raise
    except Exception as error:  # arbitrary bytes cause any error; only these two types have a useful text
        detail = f" ({one_line(error)})" if isinstance(error, OSError | SyntaxError) else ""
        raise DecodeError(f"{kind} with a damaged header{detail}") from error


def one_line(message: object) -> str:
    """Return the message of a library on one line, at most 80 characters."""
    return " ".join(str(message).split())[:80]


# Pillow's classes are called directly, because Image.open would add a pixel limit of its own to --max-pixels.
# Headers of PNG, WebP and GIF are read here, because Pillow does more than that for these formats: it unpacks text
# and profiles, allocates a decoder and a canvas, and follows frames.


def _read_jpeg(data: bytes) -> Header:
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    except (SyntaxError, OSError) as error:
        if rare := jpeg.rarity(data):
            raise DecodeError(f"{rare}: not supported; {CONVERT}") from error
        raise
    check_jpeg(data)
    return Header("JPEG", *image.size, exif=image.info.get("exif", b""))


def check_jpeg(data: bytes) -> None:
    """Check that the segments of a JPEG reach its end marker; bytes after it (MPO, trailers) are ignored.

    Raises DecodeError if the file ends earlier.
    """
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _JPEG_END:
            return
        # Skipping the content of segments also skips the end marker of an EXIF thumbnail.
        # Scan data follows its segment directly, so the next search goes through it.
        at += int.from_bytes(data[at : at + 2], "big")
    raise DecodeError("JPEG cut short: no end marker")


def _read_png(data: bytes) -> Header:
    chunks = png_chunks(data)
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    clear = None
    if colour == 0 and len(chunks.get(b"tRNS", b"")) == 2:  # OpenCV ignores tRNS in grey images only
        clear = int.from_bytes(chunks[b"tRNS"], "big")
        clear = clear if depth >= 8 else clear * 255 // (2**depth - 1)
    exif, alpha = chunks.get(b"eXIf", b""), colour in (4, 6) or b"tRNS" in chunks
    return Header("PNG", width, height, exif=exif, clear=clear, deep=depth > 8, alpha=alpha)


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """Return the bodies of the PNG chunks IHDR (always), tRNS and eXIf (if present), read up to IEND.

    Checksums are compared here, because libpng would report wrong ones on stderr at any log level.

    Raises DecodeError for a file without its end, a wrong checksum or a missing header.
    """
    found: dict[bytes, bytes] = {}
    view, at, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at) if at + 12 <= len(data) else (0, b"")
        body, at = at + 8, at + 12 + length
        if not kind or at > len(data):
            raise DecodeError("PNG cut short: no IEND chunk")
        if kind in _PNG_CHECKED and zlib.crc32(view[body - 4 : at - 4]).to_bytes(4, "big") != view[at - 4 : at]:
            raise DecodeError(f"PNG damaged: wrong checksum of {kind.decode()}")
        if kind in _PNG_WANTED:
            found.setdefault(kind, data[body : at - 4])
    if len(found.get(b"IHDR", b"")) != 13:
        raise DecodeError("PNG damaged: no header")
    return found


def _read_webp(data: bytes) -> Header:
    chunks = webp_chunks(data)
    alpha = False
    if canvas := chunks.get(b"VP8X"):
        alpha = bool(canvas[0] & 0x10)
        width, height = (int.from_bytes(canvas[at : at + 3], "little") + 1 for at in (4, 7))
    elif lossless := chunks.get(b"VP8L"):
        bits = int.from_bytes(lossless[1:5], "little")
        alpha = bool(bits >> 28 & 1)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", chunks[b"VP8 "], 6))
    return Header("WebP", width, height, exif=chunks.get(b"EXIF", b""), alpha=alpha)


def webp_chunks(data: bytes) -> dict[bytes, bytes]:
    """Return the first chunk of each kind in a WebP file: at most ten bytes of each, and all of EXIF.

    Raises DecodeError if the file is shorter than its header says.
    """
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise DecodeError("WebP cut short: the file is shorter than its header says")
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        found.setdefault(kind, data[at + 8 : at + 8 + (length if kind == b"EXIF" else min(length, 10))])
        at += 8 + length + length % 2
    return found


def _read_gif(data: bytes) -> Header:
    return Header("GIF", *struct.unpack_from("<HH", data, 6))


def _read_bmp(data: bytes) -> Header:
    image = BmpImagePlugin.BmpImageFile(io.BytesIO(data))
    bits = data[28] if data[14] >= 40 else 0
    return Header("BMP", *image.size, five_bits=bits == 16, alpha=image.mode == "RGBA")


def _read_tiff(data: bytes) -> Header:
    try:
        image = Tiff.TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:  # Pillow has no mode for this TIFF; if its tags can be read, the file is not damaged
        raise _unsupported_tiff(data, error) from error
    tags = image.tag_v2
    bits: tuple[int, ...] = tags.get(Tiff.BITSPERSAMPLE, (1,))
    extra: tuple[int, ...] = tags.get(Tiff.EXTRASAMPLES, ())
    if data[8:10] == b"CR" or _DNG in tags or (tags.get(_SUBFILE, 0) & 1 and _SUBFILES in tags):
        raise DecodeError(RAW)  # the first picture of a raw photo is a small preview
    if fault := _tiff_fault(tags, bits):
        raise DecodeError(f"TIFF with {fault}: not supported; save it with 8 or 16 bits a channel")
    return Header(
        "TIFF",
        *image.size,
        opaque=image.mode != "RGBA",
        # 1 means colours multiplied by alpha, 2 not multiplied; libtiff multiplies them when it reads 8 bits.
        premultiplied=1 in extra or (2 in extra and bits[0] == 8),
        inverted=bits[0] == 16 and tags[Tiff.PHOTOMETRIC_INTERPRETATION] == 0,  # libtiff inverts 8 bits itself
        deep=bits[0] > 8,
        alpha=image.mode == "RGBA",
    )


def _unsupported_tiff(data: bytes, error: SyntaxError) -> DecodeError | SyntaxError:
    """Return the error to raise for a TIFF that Pillow cannot open."""
    tags = Tiff.ImageFileDirectory_v2(data[:8] if _CLASSIC in data[2:4] else data[:16])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    if Tiff.BITSPERSAMPLE not in tags:
        return error
    fault = _tiff_fault(tags, tags[Tiff.BITSPERSAMPLE]) or "a combination of channels and bits"
    return DecodeError(f"TIFF with {fault}: not supported; save it with 8 or 16 bits a channel")


def _tiff_fault(tags: Mapping[int, Any], bits: tuple[int, ...]) -> str:
    """Return the property of a TIFF that OpenCV 5.0 would decode wrongly without an error; "" if none."""
    photometric, planes = tags.get(Tiff.PHOTOMETRIC_INTERPRETATION, 0), tags.get(Tiff.PLANAR_CONFIGURATION, 1)
    tiled, deep = Tiff.TILEWIDTH in tags, bits[0] == 16
    faults = {
        "signed or floating-point samples": not {*tags.get(Tiff.SAMPLEFORMAT, (1,))} <= {1},
        f"{max(bits)} bits a sample": len({*bits}) > 1 or bits[0] not in (1, 2, 4, 8, 16),
        "alpha in a grey or palette image": photometric in (0, 1, 3) and tags.get(Tiff.SAMPLESPERPIXEL, 1) > 1,
        "16-bit colours that are not RGB": deep and photometric not in (0, 1, 2),
        "16-bit colours in separate planes": deep and planes != 1 and len(bits) > 1,
        "8-bit tiles to be turned": tiled and not deep and tags.get(_TIFF_ORIENTATION, 1) != 1,
    }
    return next((fault for fault, found in faults.items() if found), "")


_FORMATS: tuple[tuple[bytes, str, Callable[[bytes], Header]], ...] = (
    (b"\xff\xd8\xff", "JPEG", _read_jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _read_png),
    (b"RIFF", "WebP", _read_webp),
    (b"GIF87a", "GIF", _read_gif),
    (b"GIF89a", "GIF", _read_gif),
    (b"BM", "BMP", _read_bmp),
    (b"II*\0", "TIFF", _read_tiff),
    (b"MM\0*", "TIFF", _read_tiff),
    (b"II+\0", "TIFF", _read_tiff),
    (b"MM\0+", "TIFF", _read_tiff),
)
