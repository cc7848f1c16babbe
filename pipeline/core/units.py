"""Format durations, counts and sizes for messages."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration as text: in seconds below 100 s, in minutes below 100 min, else in hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun, as "1 image" or "2,000 images"; `many` is the plural, by default `one` and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def size_text(count: float) -> str:
    """Return a size as text: about three digits, in bytes, kB, MB or GB (powers of 1000)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if (value := float(f"{count / unit:.3g}")) >= 1:
            decimals = sum(value < digits for digits in (10, 100))
            return f"{value:,.{decimals}f} {name}"
    return f"{count:.0f} bytes"
