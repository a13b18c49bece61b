"""One stored JPEG tile of a TIFF to pixels, exactly as OpenSlide decodes it, and not at all if a bit is wrong."""

import numpy as np
import simplejpeg

from pipeline.slides import BadTile
from pipeline.slides.tiff import RGB, Stored

START, END = b"\xff\xd8", b"\xff\xd9"


def preamble(level: Stored) -> bytes:
    """What goes before a tile's own data (less its start marker): the level's shared tables, and how its colours are stored.

    TIFF says in a tag of its own whether a stream holds RGB or YCbCr. A JPEG decoder does not see that tag; the Adobe marker
    tells it (transform 0 or 1), and without it RGB streams come out in wrong colours.
    """
    tables = (level.tables or b"").removeprefix(START).removesuffix(END)
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if level.photometric == RGB else b"\x01")
    return START + adobe + tables


def decode(data: bytes, before: bytes, *, into: np.ndarray, where: str) -> None:
    """Decode into RGB uint8 (height, width, 3). `before`: of `preamble`. Raises BadTile.

    Accurate DCT and upsampling, as OpenSlide; what libjpeg-turbo only warns of (a stream that ends early, bytes that are no
    code) is an error here, because such a tile is grey or shifted from there on.
    """
    if not data.startswith(START):
        raise BadTile(f"{where}: the stored tile is no JPEG, it begins with {data[:4].hex() or 'nothing'}")
    try:
        pixels = simplejpeg.decode_jpeg(before + data[2:], colorspace="RGB", strict=True, buffer=into)
    except ValueError as error:
        raise BadTile(f"{where}: {error}") from error
    if pixels.shape != into.shape:
        raise BadTile(f"{where}: the stored tile is {pixels.shape[1]}x{pixels.shape[0]} px, not {into.shape[1]}x{into.shape[0]}")
