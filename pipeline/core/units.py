"""Amounts as people read them: durations, counts, sizes."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return how long that is, as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return "1 image", "2,000 images": a number and its noun, in the plural `many` if that is not `one` and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def size_text(count: float) -> str:
    """Return how many bytes that is, as people say it: two or three digits, in bytes, kB, MB or GB (powers of 1000)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if (value := float(f"{count / unit:.3g}")) >= 1:
            decimals = sum(value < digits for digits in (10, 100))
            return f"{value:,.{decimals}f} {name}"
    return f"{count:.0f} bytes"
