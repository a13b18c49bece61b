"""One stored JPEG tile of a TIFF to pixels, exactly as OpenSlide decodes it, and not at all if a bit is wrong."""

import numpy as np
import simplejpeg

from pipeline.slides import BadTile
from pipeline.slides.tiff import RGB, Stored

START, END = b"\xff\xd8", b"\xff\xd9"
APP0, APP14, SCAN = 0xE0, 0xEE, 0xDA


def preamble(level: Stored) -> bytes:
    """What goes before a tile's own data (less its start marker): the level's shared tables, and how its colours are stored.

    TIFF says in a tag of its own whether a stream holds RGB or YCbCr. A JPEG decoder does not see that tag; the Adobe marker
    tells it (transform 0 or 1), and without it RGB streams come out in wrong colours. The tag holds also where the stream says
    something else, as in OpenSlide.
    """
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if level.photometric == RGB else b"\x01")
    return START + adobe + _colourless((level.tables or START).removesuffix(END))


def _colourless(stream: bytes) -> bytes:
    """A stream less its start marker and its own words on its colours: the segments of JFIF and Adobe (ISO/IEC 10918-1, annex B.1.1)."""
    place, kept, parts = 2, 2, list[bytes]()
    while stream[place : place + 1] == b"\xff" and place + 4 <= len(stream) and stream[place + 1] != SCAN:
        end = place + 2 + int.from_bytes(stream[place + 2 : place + 4])
        if stream[place + 1] in (APP0, APP14):
            parts.append(stream[kept:place])
            kept = end
        place = end
    return b"".join([*parts, stream[kept:]])


def decode(data: bytes, before: bytes, *, into: np.ndarray, where: str) -> None:
    """Decode into RGB uint8 (height, width, 3). `before`: of `preamble`. Raises BadTile.

    Accurate DCT and upsampling, as OpenSlide; what libjpeg-turbo only warns of (a stream that ends early, bytes that are no
    code) is an error here, because such a tile is grey or shifted from there on.
    """
    if not data.startswith(START):
        raise BadTile(f"{where}: the stored tile is no JPEG, it begins with {data[:4].hex() or 'nothing'}")
    try:
        pixels = simplejpeg.decode_jpeg(before + _colourless(data), colorspace="RGB", strict=True, buffer=into)
    except ValueError as error:
        raise BadTile(f"{where}: {error}") from error
    if pixels.shape != into.shape:
        raise BadTile(f"{where}: the stored tile is {pixels.shape[1]}x{pixels.shape[0]} px, not {into.shape[1]}x{into.shape[0]}")
