"""Names of files and classes as UTF-8 can carry them: a file system takes any bytes, JSON, CSV and pages do not."""

from __future__ import annotations

import re

_LOOKS_SPELT = re.compile(r"\\(?=udc[89a-f][0-9a-f]|x5c)")


def to_utf8(name: str) -> str:
    r"""Return a name such as UTF-8 can carry it, no two names alike.

    An odd byte of a file's name is spelt out, as ``\udcff``; a backslash that stood before such letters already
    becomes ``\x5c``.
    """
    return _LOOKS_SPELT.sub(r"\\x5c", name).encode("utf-8", "backslashreplace").decode()
