"""Recognise files that are not images in a supported format, by their content, and say how to fix each."""

from __future__ import annotations

CONVERT = "convert it to JPEG or PNG"
RAW = "raw photo of a camera: not supported; develop it to JPEG or TIFF"

_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_FIRST_BYTES = {
    b"\xff\x0a": f"JPEG XL: not supported; {CONVERT}",
    b"\0\0\0\x0cJXL \r\n\x87\n": f"JPEG XL: not supported; {CONVERT}",
    b"\0\0\0\x0cjP  \r\n\x87\n": f"JPEG 2000: not supported; {CONVERT}",
    b"\xff\x4f\xff\x51": f"JPEG 2000: not supported; {CONVERT}",
    b"FUJIFILMCCD-RAW": RAW,
    b"IIU\0": RAW,
    b"IIRO": RAW,
    b"IIRS": RAW,
    b"MMOR": RAW,
    b"8BPS": f"Photoshop file: not supported; {CONVERT}",
    b"\x76\x2f\x31\x01": f"OpenEXR: not supported; {CONVERT}",
    b"\0\0\1\0": f"icon: not supported; {CONVERT}",
    b"%PDF": f"PDF document: not supported; {CONVERT}",
    b"PK\3\4": "zip archive, not an image; unpack it",
    b"\x1f\x8b": "gzip file, not an image; unpack it",
    b"version https://git-lfs.github.com/spec/": "Git LFS pointer, not the image; fetch the images by `git lfs pull`",
}
_TEXTS = {
    b"<svg": "SVG drawing: not supported; render it to PNG",
    b"<!doctype html": "HTML page, not an image; download the image itself",
    b"<html": "HTML page, not an image; download the image itself",
    b"<?xml": "XML text, not an image, perhaps what a server answered; download the image itself",
    b"{": "JSON text, not an image, perhaps what a server answered; download the image itself",
}
_LOOKED_AT = 4096  # bytes at the start of a text that are searched


def foreign(data: bytes) -> str:
    """Return the format of a file and how to fix it, on one line; "" if the format is unknown."""
    if data[4:8] == b"ftyp":
        return _of_brands(data)
    if data[128:132] == b"DICM":
        return f"DICOM file: not supported; {CONVERT}"
    if not data.strip(b"\0"):
        return "nothing but zeros: its content was lost; copy or download it again"
    known = next((what for first, what in _FIRST_BYTES.items() if data.startswith(first)), "")
    return known or _of_text(data[:_LOOKED_AT])


def _of_brands(data: bytes) -> str:
    """Return the format of an ISO base media file, by the brands in its first box, and how to fix it."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return f"AVIF: not supported; {CONVERT}"
    if b"crx " in brands:
        return RAW
    if brands & _HEIC:
        return f"HEIC: not supported; {CONVERT}"
    return "video, not an image; take single pictures of it"


def _of_text(text: bytes) -> str:
    start = text.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in start:
        return _TEXTS[b"<svg"]
    if start.startswith(b"<!--") and b"<html" in start:
        return _TEXTS[b"<html"]
    return next((what for first, what in _TEXTS.items() if start.startswith(first)), "")
