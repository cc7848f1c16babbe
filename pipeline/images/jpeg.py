"""Check whether the pixels of a JPEG are damaged, by the warnings of libjpeg and by parsing its scans bit by bit.

libjpeg decodes damaged files too: it fills missing parts with grey and prints its first warning only. That warning may
be harmless (extra bytes between two segments), so the file is then decoded again without such bytes. Extra bytes after
a scan, and runs of zeros in it, are signs of damage, but intact files may have them too. In these cases the scan is
parsed bit by bit. In an intact scan every code is known, no block has more than 64 coefficients, every brightness is
in range, and no bytes are left after the last block. A scan that lost some bytes is read from a wrong bit on, and soon
breaks one of these rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# libjpeg's warnings about missing or wrong pixels. Intact files may cause the others: extraneous bytes before a
# marker, an unknown JFIF revision, a bad ICC marker.
_DAMAGE = re.compile(
    r"[Pp]remature end[\w ]*|bad (Huffman|arithmetic) code|found marker 0x\w+ instead of RST\d|"
    r"Inconsistent progression sequence"
)
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")
MAGIC = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_RESTARTS = range(0xD0, 0xD8)
_ALONE = {0x01, 0xD8, *_RESTARTS}  # markers without a segment
_START, _END, _SCAN, _TABLES, _QUANTISATION, _INTERVAL = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD
_FRAMES = {*range(0xC0, 0xD0)} - {_TABLES, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}  # Huffman-coded frames without progression, which `_follow` can parse
_NEEDED = {*_FRAMES, _TABLES, 0xCC, _QUANTISATION, _INTERVAL, _SCAN}
_LS = 0xF7
_RARE = {0xC3: "lossless JPEG", **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
         **dict.fromkeys((0xC9, 0xCA, 0xCB), "arithmetic-coded JPEG")}  # fmt: skip
_MOST_FOLLOWED = 2**22  # bytes of coded data, about ten seconds of parsing; for more, only warnings of libjpeg count
_MOST_DC = 2048  # twice the largest mean brightness of a block, because lossless editing may exceed that
_MOST_DC_BITS = 11
_MOST_LEFT = 2  # extra bytes after a scan that are harmless, such as a line end; damage leaves more
_ZEROS = bytes(32)  # a sign of a lost disk block; an intact scan has them in empty image blocks only


@dataclass(frozen=True)
class _Segment:
    """One segment of a JPEG: marker and content; a scan also has its coded data, split at the restart markers."""

    marker: int
    body: bytes
    parts: Sequence[bytes] = ()


def rarity(data: bytes) -> str:
    """Return the name of a JPEG's coding if few programs can decode it; "" for the usual codings."""
    frame = next((each for each in _segments(data) if each.marker in _FRAMES or each.marker == _LS), None)
    if frame is None:
        return ""
    if frame.marker == _LS:
        return "JPEG-LS"
    if frame.body[:1] not in (b"", b"\x08"):
        return f"JPEG with {frame.body[0]} bits a sample"
    return _RARE.get(frame.marker, "")


def is_suspect(data: bytes) -> bool:
    """Return whether to parse the scans of a JPEG even if it decodes without a warning: they contain 32 zero bytes."""
    return _ZEROS in data and any(_ZEROS in part for segment in _segments(data) for part in segment.parts)


def damage(data: bytes, warning: str, warning_of: Callable[[bytes], str]) -> str:
    """Return the damage to the pixels of a JPEG; "" if none is found.

    Parameters
    ----------
    data
        The bytes of the file, which OpenCV can decode.
    warning
        The text that libjpeg printed while decoding it; may be empty.
    warning_of
        Decodes another JPEG and returns the text that libjpeg prints.
    """
    if found := _DAMAGE.search(warning):
        return found[0]
    segments = list(_segments(data))
    suspect = not warning or is_suspect(data)
    if warning:  # may be about bytes between segments, and hide a later warning
        bare = b"\xff\xd8" + b"".join(_written(each) for each in segments if each.marker in _NEEDED) + b"\xff\xd9"
        warning = warning_of(bare)
        if found := _DAMAGE.search(warning):
            return found[0]
    extraneous = _EXTRANEOUS.search(warning)
    if not (suspect or extraneous):
        return ""
    if _can_be_followed(segments):
        try:
            return _follow(segments)
        except (LookupError, ValueError):  # a table or size is missing here: only warnings of libjpeg count
            return ""
    left = int(extraneous[1]) if extraneous else 0
    return extraneous[0] if extraneous and left > _MOST_LEFT and not _padded(segments, left) else ""


def _can_be_followed(segments: Sequence[_Segment]) -> bool:
    """Return whether all scans are sequential and short enough; parsing takes about two seconds per megabyte."""
    coded = sum(len(part) for segment in segments for part in segment.parts)
    return {segment.marker for segment in segments} & _FRAMES <= _SEQUENTIAL and coded <= _MOST_FOLLOWED


def _padded(segments: Sequence[_Segment], count: int) -> bool:
    """Return whether the last `count` bytes of any scan part are equal, and so are padding."""
    return any(len({*part[-count:]}) <= 1 for segment in segments for part in segment.parts)


def _written(segment: _Segment) -> bytes:
    coded = b"".join(
        part + (bytes([0xFF, _RESTARTS[i % 8]]) if i < len(segment.parts) - 1 else b"")
        for i, part in enumerate(segment.parts)
    )
    return bytes([0xFF, segment.marker]) + (len(segment.body) + 2).to_bytes(2, "big") + segment.body + coded


def _segments(data: bytes) -> Iterator[_Segment]:
    """Yield the segments up to the end marker; bytes between segments are skipped, as in libjpeg."""
    at = 2
    while found := _MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _END:
            return
        if marker in _ALONE:
            continue
        body, at = data[at + 2 : at + int.from_bytes(data[at : at + 2], "big")], at + _length(data, at)
        parts = list[bytes]()
        if marker == _SCAN:
            parts, at = _coded(data, at)
        yield _Segment(marker, body, parts)


def _length(data: bytes, at: int) -> int:
    return max(2, int.from_bytes(data[at : at + 2], "big"))


def _coded(data: bytes, at: int) -> tuple[list[bytes], int]:
    """Return the coded data from offset `at`, split at its restart markers, and the offset of its end."""
    parts = list[bytes]()
    start = at
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] in _RESTARTS:
        parts.append(data[start : found.start()])
        start = at = found.end()
    end = found.start() if found else len(data)
    return [*parts, data[start:end]], end


# --- parsing a sequential scan bit by bit -----------------------------------------------------------------------------


@dataclass
class _Tables:
    """Tables and sizes from the segments before a scan.

    A Huffman table is 65,536 numbers, one for each 16 bits: the length of their first code * 256 + its symbol.
    """

    huffman: dict[int, Sequence[int]] = field(default_factory=dict)
    quantisation: dict[int, int] = field(default_factory=dict)  # table → divisor of a block's mean brightness (DC)
    interval: int = 0  # MCUs (groups of blocks) between restart markers; 0 for no markers
    height: int = 0
    width: int = 0
    components: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # blocks across, down, and table


@dataclass(frozen=True)
class _Block:
    """The component and tables of one block of an MCU, and the largest absolute DC value allowed."""

    component: int
    dc: Sequence[int]
    ac: Sequence[int]
    most_dc: int


def _follow(segments: Sequence[_Segment]) -> str:
    """Return the first fault in the scans of a sequential JPEG, or "".

    Raises LookupError or ValueError if a table that a scan refers to is missing.
    """
    tables = _Tables()
    for segment in segments:
        if segment.marker == _SCAN:
            if fault := _follow_scan(segment, tables):
                return fault
        else:
            _take(segment, tables)
    return ""


def _take(segment: _Segment, tables: _Tables) -> None:
    body, at = segment.body, 0
    if segment.marker == _INTERVAL:
        tables.interval = int.from_bytes(body[:2], "big")
    elif segment.marker in _FRAMES:
        tables.height, tables.width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(body[5])]
        tables.components = {part[0]: (part[1] >> 4, part[1] & 15, part[2]) for part in parts}
    while segment.marker == _QUANTISATION and at < len(body):
        size = 1 + (body[at] >> 4)
        tables.quantisation[body[at] & 15] = int.from_bytes(body[at + 1 : at + 1 + size], "big")
        at += 1 + 64 * size
    while segment.marker == _TABLES and at + 17 <= len(body):
        counts = body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        tables.huffman[body[at]] = _huffman(counts, symbols)
        at += 17 + sum(counts)


def _huffman(counts: bytes, symbols: bytes) -> Sequence[int]:
    """Return for each value of 16 bits the length of its first code * 256 + the code's symbol; 0 if no code fits."""
    lengths = np.repeat(np.arange(1, 17), list(counts))
    if len(lengths) != len(symbols):
        raise ValueError("a Huffman table that is cut short")
    entries = np.repeat(lengths * 256 + np.frombuffer(symbols, np.uint8), 1 << (16 - lengths))
    return np.pad(entries[:65536], (0, max(0, 65536 - len(entries)))).tolist()  # a forged table has millions


def _follow_scan(scan: _Segment, tables: _Tables) -> str:
    blocks, count = _layout(scan.body, tables)
    interval = tables.interval or count
    for part in scan.parts:
        if not count and part:
            return "restart markers that are too many"
        if count and (fault := _follow_part(part, min(count, interval), blocks)):
            return fault
        count -= min(count, interval)
    return "restart markers are missing" if count else ""


def _layout(body: bytes, tables: _Tables) -> tuple[list[_Block], int]:
    """Return the blocks in one MCU of a scan, and the number of its MCUs."""
    coded = [(body[1 + 2 * i], body[2 + 2 * i]) for i in range(body[0])]
    across, down = (max(each[side] for each in tables.components.values()) for side in (0, 1))
    blocks = list[_Block]()
    for component, selected in coded:
        wide, high, quantisation = tables.components[component]
        ways = tables.huffman[selected >> 4], tables.huffman[16 | selected & 15]
        block = _Block(component, *ways, _MOST_DC // max(1, tables.quantisation[quantisation]) + 1)
        blocks += [block] * (wide * high if len(coded) > 1 else 1)
    if len(coded) > 1:
        return blocks, -(-tables.width // (8 * across)) * -(-tables.height // (8 * down))
    wide, high, _ = tables.components[coded[0][0]]  # a scan of one component has no blocks beyond its edges
    return blocks, -(-tables.width * wide // (8 * across)) * -(-tables.height * high // (8 * down))


def _follow_part(coded: bytes, count: int, blocks: Sequence[_Block]) -> str:
    """Return the first fault in `count` coded MCUs, or ""."""
    data = coded.rstrip(b"\xff").replace(b"\xff\0", b"\xff")  # removes fill bytes and byte stuffing
    padded = np.frombuffer(data + bytes(600), np.uint8).astype(np.uint32)  # a block may be read past the end
    packed: Any = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]  # the 24 bits that start at each byte
    words = memoryview(packed)
    at, end, means = 0, 8 * len(data), dict.fromkeys((block.component for block in blocks), 0)
    for _ in range(count):
        for block in blocks:
            start, entry = at, block.dc[words[at >> 3] >> (8 - (at & 7)) & 0xFFFF]
            bits = entry & 0xFF
            at += entry >> 8
            if not entry or bits > _MOST_DC_BITS:
                return "an unknown code"
            if bits:
                value = (words[at >> 3] >> (8 - (at & 7)) & 0xFFFF) >> (16 - bits)
                means[block.component] += value if value >> (bits - 1) else value - (1 << bits) + 1
                at += bits
            if abs(means[block.component]) > block.most_dc:
                return "a brightness out of range"
            at, filled = _follow_block(words, at, block.ac)
            if at > end:
                return "the data ends before the picture"
            if filled < 0 or filled > 63:
                return "a block with too many coefficients" if filled > 63 else "an unknown code"
            if filled == 63 and not any(data[(start >> 3) + 1 : at >> 3]) and at - start > 128:
                return "a run of zeros"
    return _left_over(data, at)


def _follow_block(words: memoryview, at: int, codes: Sequence[int]) -> tuple[int, int]:
    """Return the bit where a block ends, and the number of its AC coefficients, which start at bit `at`.

    The number is -1 if a code is unknown.
    """
    filled = 0
    while filled < 63:
        entry = codes[words[at >> 3] >> (8 - (at & 7)) & 0xFFFF]
        at += (entry >> 8) + (entry & 15)
        if entry & 15:
            filled += (entry >> 4 & 15) + 1
        elif entry & 0xFF == 0xF0:  # sixteen zeros
            filled += 16
        else:
            return at, filled if entry and not entry & 0xFF else -1
    return at, filled


def _left_over(data: bytes, at: int) -> str:
    """Return the fault in the bytes after the last block, which ends before bit `at`; "" for padding.

    An encoder fills the last byte with ones. Bytes after such a byte were added later, by another program.
    """
    used, rest = -(-at // 8), data[-(-at // 8) :]
    ones = (1 << (8 * used - at)) - 1
    if len({*rest}) <= 1 or data[used - 1] & ones == ones:
        return ""
    return f"{len(rest):,} bytes too many"
