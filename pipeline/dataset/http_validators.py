"""What is said of something behind an address, without its content, that will be other once it changes."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Any

GRAIN = 2  # seconds: what was changed later than this before it was sent may change again and look the same

# What changes with the content, as the file systems of fsspec call it.
_MARKS = (
    *("ETag", "etag", "e_tag", "checksum", "md5Hash", "content_md5", "blob_id", "crc32c", "generation", "VersionId"),
    *("version_id", "LastModified", "last_modified", "modified", "updated", "mtime", "modify", "modificationTime"),
)


def of_file(about: dict[str, Any]) -> str | None:
    """Return the marks in what a file system of fsspec says of a file; None without any."""
    found = [f"{name}={about[name]}" for name in _MARKS if about.get(name) is not None]
    return "; ".join([f"size={about.get('size')}", *found]) if found else None


def of_answer(response: Any) -> str | None:
    """Return ETag and date of an answer; None without either, or if it was changed too lately to be sure."""
    headers = response.headers
    tag, changed = headers.get("ETag"), headers.get("Last-Modified")
    if not (tag or changed) or (changed and _is_fresh(changed, headers.get("Date"))):
        return None
    return f"ETag={tag}; Last-Modified={changed}"


def _is_fresh(changed: str, sent: str | None) -> bool:
    try:
        at = parsedate_to_datetime(sent).timestamp() if sent else time.time()
        return at - parsedate_to_datetime(changed).timestamp() < GRAIN
    except ValueError:
        return True
