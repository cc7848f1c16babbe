"""Whether the pixels of a JPEG are all there: what its decoder warns of, and its scans followed bit by bit.

libjpeg decodes anything: it fills what is missing with grey, and prints its first warning only. That one may be
harmless (bytes between two segments), so the file is then decoded again without what lies between the segments. Bytes
left over behind a scan, and a run of zeros within, are signs of damage that sound files have too: there the scan is
followed bit by bit. In a sound scan no code is unknown, no block has more than 64 coefficients, no brightness lies
out of range, and the last byte is the last one. A scan that lost some bytes goes on out of step, and soon breaks one
of these rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# libjpeg's warnings of pixels that are missing or wrong. Others stand in sound files too: extraneous bytes before a
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
_SEQUENTIAL = {0xC0, 0xC1}  # Huffman-coded frames without progression, the ones that can be followed here
_NEEDED = {*_FRAMES, _TABLES, 0xCC, _QUANTISATION, _INTERVAL, _SCAN}
_LS = 0xF7
_RARE = {0xC3: "lossless JPEG", **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
         **dict.fromkeys((0xC9, 0xCA, 0xCB), "arithmetic-coded JPEG")}  # fmt: skip
_MOST_FOLLOWED = 2**22  # bytes of coded data, which take some ten seconds; of more, the decoder is believed
_MOST_DC = 2048  # twice what a block's mean brightness comes to, as editing without decoding may overshoot
_MOST_DC_BITS = 11
_MOST_LEFT = 2  # bytes behind a scan, as of a line's end; one out of step leaves more
_ZEROS = bytes(32)  # as where a block of a disk was lost; a sound scan has them in empty blocks only


@dataclass(frozen=True)
class _Segment:
    """One segment; of a scan also its coded data, cut at the restart markers."""

    marker: int
    body: bytes
    parts: Sequence[bytes] = ()


def rarity(data: bytes) -> str:
    """Return how a JPEG is coded if few programs can decode it, however sound; "" if as usual."""
    frame = next((each for each in _segments(data) if each.marker in _FRAMES or each.marker == _LS), None)
    if frame is None:
        return ""
    if frame.marker == _LS:
        return "JPEG-LS"
    if frame.body[:1] not in (b"", b"\x08"):
        return f"JPEG with {frame.body[0]} bits a sample"
    return _RARE.get(frame.marker, "")


def is_suspect(data: bytes) -> bool:
    """Return whether a JPEG that decodes without a warning should be followed all the same."""
    return _ZEROS in data and any(_ZEROS in part for segment in _segments(data) for part in segment.parts)


def damage(data: bytes, warning: str, warning_of: Callable[[bytes], str]) -> str:
    """Return what is wrong with the pixels of a JPEG, "" if nothing is known to be.

    Parameters
    ----------
    data
        The file; OpenCV decodes it.
    warning
        What libjpeg printed meanwhile, perhaps nothing.
    warning_of
        Decodes another JPEG and returns what libjpeg prints of that.
    """
    if found := _DAMAGE.search(warning):
        return found[0]
    segments = list(_segments(data))
    suspect = not warning or is_suspect(data)
    if warning:  # perhaps about what lies between the segments, and no other one is printed
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
        except (LookupError, ValueError):  # tables or sizes that are not there: libjpeg knows better
            return ""
    left = int(extraneous[1]) if extraneous else 0
    return extraneous[0] if extraneous and left > _MOST_LEFT and not _padded(segments, left) else ""


def _can_be_followed(segments: Sequence[_Segment]) -> bool:
    """Return whether all scans are sequential, and short enough: a megabyte takes about two seconds."""
    coded = sum(len(part) for segment in segments for part in segment.parts)
    return {segment.marker for segment in segments} & _FRAMES <= _SEQUENTIAL and coded <= _MOST_FOLLOWED


def _padded(segments: Sequence[_Segment], count: int) -> bool:
    """Return whether the last `count` bytes of some scan are alike: padding."""
    return any(len({*part[-count:]}) <= 1 for segment in segments for part in segment.parts)


def _written(segment: _Segment) -> bytes:
    coded = b"".join(
        part + (bytes([0xFF, _RESTARTS[i % 8]]) if i < len(segment.parts) - 1 else b"")
        for i, part in enumerate(segment.parts)
    )
    return bytes([0xFF, segment.marker]) + (len(segment.body) + 2).to_bytes(2, "big") + segment.body + coded


def _segments(data: bytes) -> Iterator[_Segment]:
    """Yield the segments up to the end marker; bytes between them are passed over, as libjpeg does."""
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
    """Return the coded data that begins at `at`, cut at its restart markers, and where it ends."""
    parts = list[bytes]()
    start = at
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] in _RESTARTS:
        parts.append(data[start : found.start()])
        start = at = found.end()
    end = found.start() if found else len(data)
    return [*parts, data[start:end]], end


# --- following a sequential scan -----------------------------------------------------------------------------


@dataclass
class _Tables:
    """What the segments before a scan say: of a Huffman table 65,536 numbers, the code's length * 256 + its symbol."""

    huffman: dict[int, Sequence[int]] = field(default_factory=dict)
    quantisation: dict[int, int] = field(default_factory=dict)  # of the mean brightness
    interval: int = 0  # MCUs between restart markers; 0: there are none
    height: int = 0
    width: int = 0
    components: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # → across, down, quantisation table


@dataclass(frozen=True)
class _Block:
    """How one block of an MCU is coded."""

    component: int
    dc: Sequence[int]
    ac: Sequence[int]
    most_dc: int


def _follow(segments: Sequence[_Segment]) -> str:
    """Return what is wrong with the scans of a sequential JPEG, or "".

    Raises LookupError or ValueError if it lacks a table that it refers to.
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
    """Return for each 16 bits that may come next the length of their code * 256 + its symbol; 0 where there is none."""
    lengths = np.repeat(np.arange(1, 17), list(counts))
    if len(lengths) != len(symbols):
        raise ValueError("a Huffman table that is cut short")
    entries = np.repeat(lengths * 256 + np.frombuffer(symbols, np.uint8), 1 << (16 - lengths))
    return np.pad(entries[:65536], (0, max(0, 65536 - len(entries)))).tolist()  # a made-up table has millions


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
    """Return the blocks of an MCU of a scan, and how many MCUs it has."""
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
    wide, high, _ = tables.components[coded[0][0]]  # alone it has no blocks beyond its own edges
    return blocks, -(-tables.width * wide // (8 * across)) * -(-tables.height * high // (8 * down))


def _follow_part(coded: bytes, count: int, blocks: Sequence[_Block]) -> str:
    """Follow `count` MCUs; return what is wrong with them, or ""."""
    data = coded.rstrip(b"\xff").replace(b"\xff\0", b"\xff")  # without fill bytes and stuffing
    padded = np.frombuffer(data + bytes(600), np.uint8).astype(np.uint32)  # a block may run over the end
    packed: Any = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]  # the 24 bits from each byte on
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
    """Return where a block that goes on at bit `at` ends, and how many coefficients it has behind its first.

    That is -1 where a code is unknown.
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
    """Return what is wrong with the bytes behind the last block, which ends before bit `at`; "" of padding.

    An encoder fills the last byte up with ones, so that what follows such a byte was put there by somebody else.
    """
    used, rest = -(-at // 8), data[-(-at // 8) :]
    ones = (1 << (8 * used - at)) - 1
    if len({*rest}) <= 1 or data[used - 1] & ones == ones:
        return ""
    return f"{len(rest):,} bytes too many"
