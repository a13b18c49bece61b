"""Which slide a DICOM file belongs to: its series, read from the file's head. OpenSlide does not list the series of a folder, it takes one file's.

Data elements are read as PS3.5, section 7.1.2 lays them out (explicit VR, little endian): what compressed slides must be stored in.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class of a whole slide's image (PS3.4, table B.5-1)."""
CLASS, SERIES = 0x0008_0016, 0x0020_000E
HEAD_BYTES = 2**20
"""The series stands near the start, before any pixels."""
PREAMBLE = 128
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Value representations whose length has four bytes."""
ITEM, ITEM_END, SEQUENCE_END, OPEN = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD, 0xFFFF_FFFF


def series_of(file: Path) -> str | None:
    """The SeriesInstanceUID of a file of a slide; None if it is of something else, such as a report, or cannot be told."""
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    if head[PREAMBLE : PREAMBLE + 4] != b"DICM":
        return None
    found: dict[int, str] = {}
    try:
        for tag, value in _elements(head, PREAMBLE + 4):
            if tag > SERIES:
                break
            if tag in (CLASS, SERIES):
                found[tag] = value.rstrip(b"\0 ").decode("ascii")
    except (struct.error, ValueError, RecursionError):  # the head ends, or it is stored otherwise
        return None
    return found.get(SERIES) if found.get(CLASS) == SLIDE else None


def _elements(data: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """Tags (group and element as one number) and values from `place` on; of a sequence without a stated length the value is left out."""
    while True:
        tag, start, length = _header(data, place)
        if length == OPEN:
            place = _after_sequence(data, start)
            yield tag, b""
        else:
            place = start + length
            yield tag, data[start:place]


def _header(data: bytes, place: int) -> tuple[int, int, int]:
    """Tag of the element at `place`, where its value begins, and how long that is."""
    group, element = struct.unpack_from("<HH", data, place)
    tag = group << 16 | element
    if group == ITEM >> 16:  # items and ends have no value representation
        return tag, place + 8, struct.unpack_from("<I", data, place + 4)[0]
    kind = data[place + 4 : place + 6]
    if not (kind.isalpha() and kind.isupper()):
        raise ValueError(f"no value representation: {kind!r}")
    if kind in LONG:
        return tag, place + 12, struct.unpack_from("<I", data, place + 8)[0]
    return tag, place + 8, struct.unpack_from("<H", data, place + 6)[0]


def _after_sequence(data: bytes, place: int) -> int:
    """Where a sequence, or an item, without a stated length ends whose contents begin at `place`."""
    while True:
        tag, start, length = _header(data, place)
        if tag in (SEQUENCE_END, ITEM_END):
            return start
        place = _after_sequence(data, start) if length == OPEN else start + length
