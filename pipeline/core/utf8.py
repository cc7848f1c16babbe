"""Convert names of files and classes to valid UTF-8: a file system allows any bytes, JSON, CSV and HTML do not."""

from __future__ import annotations

import re

_LOOKS_SPELT = re.compile(r"\\(?=udc[89a-f][0-9a-f]|x5c)")


def to_utf8(name: str) -> str:
    r"""Return `name` as text that UTF-8 can encode; different names give different texts.

    A byte of a file's name that is not UTF-8 is escaped, as ``\udcff``. A backslash that was before such letters
    already becomes ``\x5c``.
    """
    return _LOOKS_SPELT.sub(r"\\x5c", name).encode("utf-8", "backslashreplace").decode()
