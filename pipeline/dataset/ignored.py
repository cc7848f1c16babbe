"""Decide by name which files and folders are ignored in a folder of images, and describe them for a message."""

from __future__ import annotations

from collections.abc import Mapping

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"})

_HIDDEN = "hidden"

# Folders that network storage and operating systems create, in lower case; all hidden folders are ignored anyway.
_FOREIGN_FOLDERS = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "@__thumb"),
        *("$recycle.bin", "system volume information", "found.000", "__macosx", "lost+found"),
        *("network trash folder", "temporary items", "thevolumesettingsfolder"),
    }
)
_CONVERT = "convert to JPEG or PNG"
_KINDS: tuple[tuple[str, frozenset[str]], ...] = (
    (f"HEIC; {_CONVERT}", frozenset({".heic", ".heif", ".hif"})),
    (f"AVIF; {_CONVERT}", frozenset({".avif", ".avifs"})),
    (f"JPEG XL; {_CONVERT}", frozenset({".jxl"})),
    (f"JPEG 2000; {_CONVERT}", frozenset({".jp2", ".j2k", ".j2c", ".jpf", ".jpx"})),
    ("vector drawings; render to PNG", frozenset({".svg", ".svgz", ".eps", ".ai", ".wmf", ".emf"})),
    (
        "camera raw; develop to JPEG or TIFF",
        frozenset(
            {
                *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mos", ".mrw"),
                *(".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
            }
        ),
    ),
    ("not downloaded from iCloud; download them", frozenset({".icloud"})),
    ("videos; extract frames", frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm", ".wmv"})),
    ("archives; unpack", frozenset({".7z", ".gz", ".rar", ".tar", ".tgz", ".zip"})),
)
_KIND_OF = {ending: kind for kind, endings in _KINDS for ending in endings}
_OTHER = "no image endings"


def folder_ignored_as(name: str) -> str | None:
    """Return the name with "/" under which a folder is counted, if it is hidden or of another program; else None."""
    return f"{name}/" if name[0] == "." or name.lower() in _FOREIGN_FOLDERS else None


def file_ignored_as(name: str) -> str | None:
    """Return "hidden", or the ending in lower case, under which a file is counted if it is not an image; else None."""
    ending = _ending(name)
    if name[0] == "." and ending != ".icloud":
        return _HIDDEN
    return None if ending in IMAGE_ENDINGS else ending


def ignored_text(ignored: Mapping[str, int]) -> str:
    """Return a message about ignored files and folders: names, counts, what they are, and how to use them."""
    kinds: dict[str, list[str]] = {}
    for name, count in sorted(ignored.items()):
        kinds.setdefault(_kind(name), []).append(f"{name or 'no ending'} {count:,}")
    return "; ".join(f"{', '.join(some)}{f' ({kind})' if kind else ''}" for kind, some in kinds.items())


def _kind(name: str) -> str:
    if name.endswith("/"):
        return "" if name[0] == "." else "of other programs"
    return _KIND_OF.get(name) or (_OTHER if name == "" or name[0] == "." else "")


def _ending(name: str) -> str:
    """Return the ending in lower case: ".jpg" of "a.JPG", ".ds_store" of ".DS_Store", "" of "README"."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot >= 0 else ""
