"""How many damaged JPEGs does the decoding notice, how many sound files does it refuse, and what does that cost?

    python benchmarks/damaged_jpegs.py --photos FOLDER --count 1000 --runs 5

Makes so many sound files of the photos (Pillow, OpenCV, TensorFlow, and cjpeg and ImageMagick where they are installed,
in many settings; a part of them with what libraries warn of though every pixel is there), and damages as many JPEGs: a
run of zeros, a scan cut short, one that was cut and closed with an end marker, two blocks that changed places. Prints
one JSON object: caught and missed by kind of damage, what was wrongly refused, and images/s of the sound files decoded
without and with the check, in turn: medians with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bare import spread
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.core.errors import DecodeError  # noqa: E402
from pipeline.images import decoding  # noqa: E402
from pipeline.images.decode_process import decode_whole, listen  # noqa: E402

HOW = 299, "squash", decoding.DEFAULT_MAX_PIXELS, decoding.FULL_DEPTH
SMALL = 4000  # bytes of a file that is as good as empty
Encoder = Callable[[np.ndarray, np.random.Generator], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    listen()
    rng = np.random.default_rng(0)
    photos = [path for path in sorted(given.photos.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    sound = list(sound_files(photos, given.count, rng))
    damaged = list(
        damaged_files([data for name, data in sound if name not in WARNED and len(data) > SMALL], given.count, rng)
    )
    refused = [(name, why) for name, data in sound if (why := verdict(data))]
    common = [data for name, data in sound if name not in (*WARNED, "pillow flat")]
    result = {
        "sound": {
            "files": len(sound),
            "wrongly refused": len(refused),
            "by encoder": counted(sound),
            "refused": refused[:20],
        },
        "damaged": {"files": len(damaged), **caught(damaged)},
        "images/s, nothing to warn of": rates(common, given.runs),
        "images/s, all": rates([data for _, data in sound], given.runs),
    }
    print(json.dumps(result, indent=1))


def verdict(data: bytes) -> str:
    """Return why a file is refused, or ""."""
    try:
        decode_whole(data, *HOW)
    except DecodeError as error:
        return str(error)
    return ""


def counted(files: list[tuple[str, bytes]]) -> dict[str, int]:
    return dict(sorted(Counter(name for name, _ in files).items()))


def caught(damaged: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Return of each kind of damage how many files there are, how many were refused, and for what."""
    found: dict[str, Any] = {}
    for name, data in damaged:
        of_kind = found.setdefault(name, {"files": 0, "caught": 0, "missed": 0, "reasons": Counter()})
        reason = verdict(data)
        of_kind["files"] += 1
        of_kind["caught" if reason else "missed"] += 1
        of_kind["reasons"][reason.split(":")[-1].strip().lstrip("0123456789, ")] += bool(reason)
    return {"caught": sum(each["caught"] for each in found.values()), **found}


def rates(files: list[bytes], runs: int) -> dict[str, Any]:
    """Return images/s without and with the check, in turn."""
    ways = {"before": decoding.decode_with_peak, "after": decode_whole}
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, decode in ways.items():
            start = time.perf_counter()
            for data in files:
                decode(data, *HOW)
            measured[name].append(len(files) / (time.perf_counter() - start))
    ratios = [after / before for before, after in zip(measured["before"], measured["after"], strict=True)]
    return {name: spread(values) for name, values in {**measured, "after / before": ratios}.items()}


# --- sound files ---------------------------------------------------------------------------------------------


def sound_files(photos: list[Path], count: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield who wrote a file, and the file: by each encoder in turn, one in four with something to warn of."""
    makers = [*ENCODERS.items(), *installed()]
    for i in range(count):
        path = photos[i % len(photos)]
        pixels = np.asarray(Image.open(path).convert("RGB"))
        name, encode = makers[i % len(makers)]
        if i % 4:
            yield name, encode(pixels, rng)
            continue
        name, warn = list(WARNED.items())[i // 4 % len(WARNED)]
        yield name, warn(pixels, rng)


def saved(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def by_pillow(**options: Any) -> Encoder:
    def encode(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
        return saved(pixels, quality=int(rng.integers(5, 101)), **options)

    return encode


def by_opencv(*flags: int) -> Encoder:
    def encode(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(5, 101))]
        return cv2.imencode(".jpg", pixels[..., ::-1], [*quality, *flags])[1].tobytes()

    return encode


def by_tensorflow(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    import tensorflow as tf

    options = {"progressive": bool(rng.integers(2)), "chroma_downsampling": bool(rng.integers(2))}
    encoded: Any = tf.io.encode_jpeg(pixels, quality=int(rng.integers(5, 101)), **options)
    return encoded.numpy()


def grey(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return by_pillow(optimize=True)(pixels[..., 1], rng)


def cmyk(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return saved(Image.fromarray(pixels).convert("CMYK"), quality=90)


def flat(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    """One colour, a dot, and tables that were made for it: mostly zeros."""
    blank = np.full((1200, 1600, 3), pixels[0, 0], np.uint8)
    blank[600:640, 800:840] = pixels[-1, -1]
    return saved(blank, quality=90, optimize=True)


ENCODERS: dict[str, Encoder] = {
    "pillow": by_pillow(),
    "pillow 4:4:4": by_pillow(subsampling=0),
    "pillow 4:2:2": by_pillow(subsampling=1),
    "pillow optimize": by_pillow(optimize=True),
    "pillow progressive": by_pillow(progressive=True),
    "pillow restart by rows": by_pillow(restart_marker_rows=1),
    "pillow restart by blocks": by_pillow(restart_marker_blocks=7),
    "pillow rgb": by_pillow(keep_rgb=True),
    "pillow grey": grey,
    "pillow cmyk": cmyk,
    "pillow flat": flat,
    "opencv": by_opencv(),
    "opencv optimize": by_opencv(cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    "opencv progressive": by_opencv(cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "opencv restart": by_opencv(cv2.IMWRITE_JPEG_RST_INTERVAL, 5),
    "opencv 4:1:1": by_opencv(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
    "opencv 4:4:0": by_opencv(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
    "tensorflow": by_tensorflow,
}


def installed() -> Iterator[tuple[str, Encoder]]:
    """Yield the programs that are at hand; each gets a PPM and gives a JPEG."""
    options = {
        "cjpeg": [["-optimize"], ["-progressive"], ["-restart", "1"], ["-dct", "fast"], ["-sample", "1x1"]],
        "magick": [["ppm:-", "-sampling-factor", "4:2:0", "jpg:-"], ["ppm:-", "-interlace", "JPEG", "jpg:-"]],
    }
    for program, ways in options.items():
        if (path := shutil.which(program)) is not None:
            yield from ((f"{program} {' '.join(way)}", by_program([path, *way])) for way in ways)


def by_program(command: list[str]) -> Encoder:
    def encode(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
        return subprocess.run(command, input=saved(pixels, "PPM"), capture_output=True, check=True).stdout

    return encode


def before_segment(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    data = by_pillow(progressive=bool(rng.integers(2)))(pixels, rng)
    at = data.index(b"\xff\xdb")
    return data[:at] + b"left behind" + data[at:]


def before_end(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    """Zeros after the scan, as cameras fill blocks up."""
    data = by_pillow()(pixels, rng)
    return data[:-2] + bytes(int(rng.integers(1, 400))) + data[-2:]


def text_before_end(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    data = by_pillow()(pixels, rng)
    return data[:-2] + b"a note of somebody's" + data[-2:]


def odd_revision(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return by_pillow()(pixels, rng).replace(b"JFIF\0\1\1", b"JFIF\0\3\7", 1)


def odd_profile(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    data = by_pillow(icc_profile=b"no profile" * 20)(pixels, rng)
    return data.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\5\1", 1)


def trailer(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return by_opencv()(pixels, rng) + rng.bytes(5000)


def exif_of_zeros(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return by_pillow(exif=b"Exif\0\0MM\0*\0\0\0\x08" + bytes(3000))(pixels, rng)


def png_profile(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return saved(pixels[::2, ::2], "PNG", icc_profile=b"a profile that libpng warns of" * 10)


def png_text(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    data, body = saved(pixels[::2, ::2], "PNG"), b"zTXt" + b"name\0\0no zlib"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def tiff_tags(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    tags = {65000: "an unknown tag", 33550: (1.0, 1.0, 0.0)}
    return saved(pixels[::2, ::2], "TIFF", tiffinfo=tags)


WARNED: dict[str, Encoder] = {
    "bytes before a segment": before_segment,
    "zeros before the end": before_end,
    "text before the end": text_before_end,
    "unknown JFIF revision": odd_revision,
    "bad ICC marker": odd_profile,
    "bytes after the end": trailer,
    "EXIF of zeros": exif_of_zeros,
    "PNG with a bad iCCP": png_profile,
    "PNG with a bad zTXt": png_text,
    "TIFF with unknown tags": tiff_tags,
}

# --- damaged files -------------------------------------------------------------------------------------------


def damaged_files(sound: list[bytes], count: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield the kind of damage and the file, of the four kinds in turn."""
    for i in range(count):
        name, spoil = list(DAMAGES.items())[i % len(DAMAGES)]
        data = sound[int(rng.integers(len(sound)))]
        first = data.index(b"\xff\xda") + 20
        way = "progressive" if b"\xff\xc2" in data[:first] else "sequential"
        yield f"{name}, {way}", spoil(data, first, rng)


def _run(data: bytes, first: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return where in the scans a run of 2% to 20% of them begins, and how long it is."""
    length = len(data) - first - 2
    run = int(length * rng.uniform(0.02, 0.2))
    return first + int(rng.uniform(0, length - 2 * run)), run


def zeros(data: bytes, first: int, rng: np.random.Generator) -> bytes:
    at, run = _run(data, first, rng)
    return data[:at] + bytes(run) + data[at + run :]


def cut(data: bytes, first: int, rng: np.random.Generator) -> bytes:
    return data[: _run(data, first, rng)[0]]


def cut_and_closed(data: bytes, first: int, rng: np.random.Generator) -> bytes:
    return cut(data, first, rng) + b"\xff\xd9"


def swapped(data: bytes, first: int, rng: np.random.Generator) -> bytes:
    at, run = _run(data, first, rng)
    return data[:at] + data[at + run : at + 2 * run] + data[at : at + run] + data[at + 2 * run :]


DAMAGES: dict[str, Callable[[bytes, int, np.random.Generator], bytes]] = {
    "a run of zeros": zeros,
    "cut short": cut,
    "cut and closed": cut_and_closed,
    "blocks swapped": swapped,
}

if __name__ == "__main__":
    main()
