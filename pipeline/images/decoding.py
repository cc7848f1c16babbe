"""Decode the bytes of an image file to uint8 RGB pixels; all of Icebox decodes with this module.

The header is read before any pixel is decoded, so that a file of a few KB cannot claim gigabytes of memory. OpenCV
then decodes the file. The result is what an image viewer shows: rotated upright by EXIF, 8 bits a channel, blended
over white where transparent, and the first frame of an animation. An incomplete file is refused, never filled up.

Channels of 16 bits may hold fewer: a 12-bit camera writes values up to 4,095, which look nearly black on a scale to
65,535. The file does not state this depth; the user does, with `depth`.
"""

import os
from typing import Literal, get_args

import cv2
import numpy as np
import PIL
from PIL import Image

from pipeline.core.errors import DecodeError, SpecError, UsageError
from pipeline.images import jpeg
from pipeline.images.containers import Header, one_line, read_header
from pipeline.images.foreign_formats import CONVERT

Fit = Literal["squash", "crop", "pad"]
FITS: tuple[str, ...] = get_args(Fit)

# Both names are part of the feature spec: change a name whenever the same file would give different pixels.
DECODE_POLICY = "rgb8-exif-over_white-1"
RESIZE_POLICY = "opencv-area_down-linear_up-1"

FULL_DEPTH = 16
DEPTHS = range(9, FULL_DEPTH + 1)  # how many of its 16 bits a channel may really use
DEFAULT_MAX_PIXELS = 180_000_000

_CHECKS = 2  # version of the rules that refuse files, and of their messages: add 1 when these change
_NO_MEMORY = -4  # cv2.Error.StsNoMem
_MAX_SIDE = 1_000_000  # libpng's limit; OpenCV's own is 2**20 for all formats
_PAD_GREY = 127  # about 0 after x / 127.5 - 1
_EXIF_ORIENTATION = 0x0112

# DecodeError reports every failure; log messages of OpenCV would only break the progress display.
if "OPENCV_LOG_LEVEL" not in os.environ:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode_policy(depth: int | None) -> str:
    """Return the decoding policy that scales 16-bit channels as `depth` bits; None means 16. Raises UsageError."""
    if depth not in (None, *DEPTHS):
        raise UsageError(f"--depth must be a whole number in {DEPTHS[0]} … {DEPTHS[-1]}, found {depth}")
    return DECODE_POLICY if depth in (None, FULL_DEPTH) else f"{DECODE_POLICY}-depth_{depth}"


DECODE_POLICIES = {decode_policy(depth): depth for depth in DEPTHS}


def depth_of(policy: str) -> int:
    """Return as how many bits a decoding policy scales 16-bit channels. Raises SpecError for an unknown policy."""
    if policy not in DECODE_POLICIES:
        raise SpecError(f"images decoded as {policy!r:.60} cannot be decoded by this version of Icebox")
    return DECODE_POLICIES[policy]


def depth_advice(peak: int, depth: int) -> str:
    """Return advice on 16-bit images of largest value `peak`, scaled as `depth` bits; "" if their depth is right."""
    bits = max(peak.bit_length(), DEPTHS[0])
    if not peak or depth - 1 <= bits <= depth:  # within a factor of 2 the images may simply be a little dark
        return ""
    if bits > depth:
        return (
            f"values up to {peak:,} are above the {2**depth - 1:,} of --depth {depth}, and white; take --depth {bits}"
        )
    return (
        f"no value is above {peak:,} of {2**depth - 1:,}, so that they come out dark; if their camera gives no more, "
        f"take --depth {bits}"
    )


def decode(
    data: bytes | np.ndarray,
    *,
    size: int = 299,
    fit: Fit = "squash",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    depth: int = FULL_DEPTH,
) -> np.ndarray:
    """Decode one image and resize it to `size` x `size`.

    Parameters
    ----------
    data
        The bytes of an image file, or pixels: uint8 of shape (h, w), (h, w, 1) or (h, w, 3), RGB.
    size
        The side of the result, in pixels.
    fit
        `squash` ignores the aspect ratio, `crop` takes the largest central square, `pad` adds grey borders.
    max_pixels
        The largest number of pixels; an image with more is refused before it is decoded.
    depth
        How many bits the 16-bit channels of a file really use; greater values become white.

    Returns
    -------
    np.ndarray
        (size, size, 3) uint8, RGB, contiguous. It may be `data` itself, if that has this size already.

    Raises
    ------
    DecodeError
        If `data` is not one whole image; the message is the reason, on one line.
    MemoryError
        If there is not enough memory for the decoded image.
    """
    return decode_with_peak(data, size, fit, max_pixels, depth)[0]


def decode_with_peak(
    data: bytes | np.ndarray, size: int, fit: Fit, max_pixels: int, depth: int
) -> tuple[np.ndarray, int]:
    """Return the pixels that `decode` returns, and the largest value of a file with 16 bits a channel, else 0."""
    if isinstance(data, np.ndarray):
        return resize(_check_pixels(data, max_pixels), size, fit), 0
    pixels, peak = _decode_file(data, max_pixels, depth)
    return resize(pixels, size, fit), peak


def resize(pixels: np.ndarray, size: int, fit: Fit) -> np.ndarray:
    """Resize uint8 pixels (h, w, 3) to (size, size, 3): by area where they shrink, linearly where they grow.

    Returns `pixels` itself if it has that size already. Raises UsageError for an unknown `fit`.
    """
    if fit not in FITS:
        raise UsageError(f"fit must be one of {', '.join(FITS)}; found {fit!r}")
    height, width = pixels.shape[:2]
    if fit == "pad" and height != width:
        return _padded(pixels, size)
    if fit == "crop" and height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    return np.ascontiguousarray(_scaled(pixels, size, size))


def decoder_version() -> str:
    """Return the versions of the decoders and checks; a stored failure is valid for this version only."""
    return f"opencv {cv2.__version__} pillow {PIL.__version__} checks {_CHECKS}"


def _scaled(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    # INTER_AREA is right only for a side that shrinks; a side that grows is resized in a second step.
    smaller = (min(width, pixels.shape[1]), min(height, pixels.shape[0]))
    if smaller != (pixels.shape[1], pixels.shape[0]):
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels


def _padded(pixels: np.ndarray, size: int) -> np.ndarray:
    scale = size / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    top, left = (size - height) // 2, (size - width) // 2
    result = np.full((size, size, 3), _PAD_GREY, np.uint8)
    result[top : top + height, left : left + width] = _scaled(pixels, width, height)
    return result


def _check_pixels(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    shape = pixels.shape
    if pixels.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))):
        raise DecodeError(f"pixels must be uint8 of shape (h, w), (h, w, 1) or (h, w, 3); found {pixels.dtype} {shape}")
    _check_size(shape[1], shape[0], max_pixels)
    if shape[2:] == (3,):
        return pixels
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_GRAY2RGB)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError(f"no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise DecodeError(f"{width} x {height} pixels, over the limit of {max_pixels:,} (--max-pixels)")
    if max(width, height) > _MAX_SIDE:
        raise DecodeError(f"{width} x {height} pixels, and the decoder takes at most {_MAX_SIDE:,} on a side")


def _decode_file(data: bytes, max_pixels: int, depth: int = FULL_DEPTH) -> tuple[np.ndarray, int]:
    data = bytes(data)  # makes no copy of bytes
    header = read_header(data)
    _check_size(header.width, header.height, max_pixels)
    pixels = _decode_pixels(data, header)
    # The size in a TIFF header is that of the upright image; in other formats, that of the stored image.
    if {*pixels.shape[:2]} != {header.width, header.height}:
        raise DecodeError(f"{header.kind} damaged: the header and the pixels disagree about the size")
    peak = _peak(pixels)
    if header.kind != "JPEG":
        pixels = _to_rgb8(pixels, header, depth)
    return _upright(pixels, orientation(header.exif)), peak


def _peak(pixels: np.ndarray) -> int:
    """Return the largest value of 16-bit colours, alpha ignored; 0 for 8-bit pixels."""
    if pixels.dtype != np.uint16:
        return 0
    return int(pixels.max() if pixels.ndim == 2 else pixels[..., :3].max())


def _decode_pixels(data: bytes, header: Header) -> np.ndarray:
    # IMREAD_UNCHANGED alone keeps alpha and 16 bits (IMREAD_ANYDEPTH spoils 16-bit colour TIFFs in 5.0), but it
    # does not rotate images by EXIF, except TIFFs, which OpenCV always rotates. So JPEGs are not rotated here either,
    # and `_upright` rotates all formats but TIFF.
    upright = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    flags = upright if header.kind == "JPEG" else cv2.IMREAD_UNCHANGED
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if error.code == _NO_MEMORY:
            raise MemoryError(f"no memory for {header.width} x {header.height} pixels") from error
        if "CV_IO_MAX_IMAGE" not in str(error):
            raise DecodeError(f"{header.kind} that OpenCV cannot decode ({one_line(error.err)})") from error
        limit = "OPENCV_IO_MAX_IMAGE_PIXELS, _WIDTH or _HEIGHT"
        raise DecodeError(f"{header.width} x {header.height} pixels, over OpenCV's limit ({limit})") from error
    if pixels is None and header.kind == "JPEG" and (rare := jpeg.rarity(data)):
        raise DecodeError(f"{rare}: not supported; {CONVERT}")
    if pixels is None:
        raise DecodeError(f"{header.kind} that OpenCV cannot decode: cut short, damaged or of a rare kind")
    return pixels


def _to_rgb8(pixels: np.ndarray, header: Header, depth: int) -> np.ndarray:
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DecodeError(f"{header.kind} with pixels of {pixels.dtype}, which have no defined range")
    if header.clear is not None and pixels.ndim == 2:
        pixels[pixels == header.clear] = np.iinfo(pixels.dtype).max
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=255 / (2**depth - 1))  # rounds; at 16 bits, 65,535 becomes 255
    if header.inverted:
        pixels = cv2.bitwise_not(pixels)
    if header.five_bits:
        pixels |= pixels >> 5  # OpenCV returns at most 248 for 5 bits; this maps it to 255
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return _over_white(pixels, header)


def _over_white(pixels: np.ndarray, header: Header) -> np.ndarray:
    colour, alpha = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB), cv2.extractChannel(pixels, 3)
    if header.opaque or alpha.min() == 255:
        return colour
    alpha = cv2.cvtColor(alpha, cv2.COLOR_GRAY2RGB)
    if not header.premultiplied:
        colour = cv2.multiply(colour, alpha, scale=1 / 255)
    return cv2.add(colour, cv2.bitwise_not(alpha))


def orientation(exif: bytes) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if the EXIF block is missing or damaged."""
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        value = tags.get(_EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block gives no orientation, and the pixels are complete
        return 1
    return value if isinstance(value, int) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        pixels = cv2.transpose(pixels)
    flips = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # cv2.flip: 1 swaps left and right, 0 top and bottom, -1 both
    return cv2.flip(pixels, flips[orientation]) if orientation in flips else pixels
