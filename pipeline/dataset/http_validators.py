"""Build validators of remote files from ETag, date and the like: texts that differ once the file changes."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Any

GRAIN = 2  # seconds; a file changed more recently may change again without a new date

# Entries of fsspec's `info` that change with the content of a file.
_MARKS = (
    *("ETag", "etag", "e_tag", "checksum", "md5Hash", "content_md5", "blob_id", "crc32c", "generation", "VersionId"),
    *("version_id", "LastModified", "last_modified", "modified", "updated", "mtime", "modify", "modificationTime"),
)


def of_file(about: dict[str, Any]) -> str | None:
    """Return the validator of a file from its fsspec `info`; None if that has no entry that shows changes."""
    found = [f"{name}={about[name]}" for name in _MARKS if about.get(name) is not None]
    return "; ".join([f"size={about.get('size')}", *found]) if found else None


def of_answer(response: Any) -> str | None:
    """Return the validator of an HTTP response: its ETag and Last-Modified.

    None if both are missing, or the last change is so recent that another could have the same date.
    """
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
