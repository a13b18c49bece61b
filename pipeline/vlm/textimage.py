"""A text drawn as a page of pixels, for encoders that read it with their vision tower instead of a tokenizer.

The idea is of "Pixel Sentence Representation Learning" (arXiv 2402.08183); the layout here is our own. Drawing is
deterministic: left to right, letter after letter. It is for scripts whose letters stand side by side; Arabic and the
scripts of India would need shaping, which is not done.

Pillow's own font (Aileron) has 113 glyphs: ASCII, quotation marks and a few signs; no accents, no Greek, no Chinese.
For anything else name a font file. What a font lacks is left out and reported, never drawn as a box.
"""

import functools
import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from pipeline.config import ConfigError, Model
from pipeline.encoders.lineage import sha256_of

_NO_CHARACTER = "\uffff"
"""Never assigned: every font draws what it has for a missing glyph."""
_SPECIMEN = "".join(map(chr, range(33, 127)))


class Page(Model):
    """How a text is drawn. A section of a job file and of a saved encoder."""

    width_px: pydantic.PositiveInt = 448
    """Width of every page."""
    line_px: pydantic.PositiveInt = 28
    """Height of a line. 28 is one token of Qwen2-VL."""
    font_px: pydantic.PositiveInt = 20
    """Size of the letters."""
    max_lines: pydantic.PositiveInt = 32
    """Text beyond it is not drawn, and reported."""
    font: str | None = None
    """A TrueType or OpenType file; null for Pillow's own, which has ASCII only."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "Page":
        if self.font_px > self.line_px or self.line_px > self.width_px:
            raise ValueError(f"letters of {self.font_px} px must fit lines of {self.line_px} px, and those a width of {self.width_px} px")
        return self


@dataclass(frozen=True)
class Drawn:
    """A page, and what of the text is not on it."""

    image: np.ndarray
    """(line_px x lines, width_px, 3), uint8, black on white."""
    missing: str
    """The characters that the font lacks, each once, in their order."""
    cut: bool
    """Whether there was more text than lines."""


def draw(text: str, page: Page) -> Drawn:
    """The text as pixels. As high as its lines, at least one; white space counts as one space, a line break as itself."""
    from PIL import Image, ImageDraw

    font = _font(page)
    text = unicodedata.normalize("NFC", text)
    missing = "".join(dict.fromkeys(character for character in text if not character.isspace() and not font.has(character)))
    kept = text.translate({ord(character): None for character in missing})
    lines = [line for paragraph in kept.splitlines() or [""] for line in _wrapped(paragraph, font, page.width_px)]
    image = Image.new("L", (page.width_px, page.line_px * min(len(lines), page.max_lines)), 255)
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines[: page.max_lines]):
        pen.text((0, row * page.line_px + (page.line_px - page.font_px) // 2), line, font=font.font, fill=0)
    return Drawn(np.stack([np.asarray(image)] * 3, axis=-1), missing, cut=len(lines) > page.max_lines)


def page_lineage(page: Page) -> dict[str, object]:
    """What the pixels of any text depend on: the layout, the font's file, and how this machine's FreeType draws a specimen."""
    specimen = draw(_SPECIMEN, page)
    return {
        **page.model_dump(exclude={"font"}),
        "font": None if page.font is None else sha256_of(page.font),
        "specimen": hashlib.sha256(specimen.image.tobytes()).hexdigest(),
    }


@dataclass(frozen=True)
class _Font:
    font: Any
    missing_glyph: tuple[bytes, float]

    @functools.cache  # noqa: B019  fonts are kept for the life of the process
    def has(self, character: str) -> bool:
        """Whether there is a glyph for it. One that looks just like the font's sign for a missing glyph counts as missing."""
        return _glyph(self.font, character) != self.missing_glyph

    @functools.cache  # noqa: B019
    def width(self, character: str) -> float:
        """How far the pen moves, in pixels."""
        return float(self.font.getlength(character))


def _font(page: Page) -> _Font:
    return _loaded(page.font, page.font_px)


@functools.cache
def _loaded(path: str | None, size: int) -> _Font:
    from PIL import ImageFont

    try:
        # The basic layout: the other one depends on a library that not every build of Pillow has.
        if path is None:
            font: Any = ImageFont.load_default(size)
        else:
            font = ImageFont.truetype(str(Path(path).expanduser()), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ConfigError(f"font {path!r} cannot be read: {error}; give the path of a .ttf or .otf file, or null for Pillow's own") from error
    if not hasattr(font, "getbbox") or not hasattr(font, "font"):
        raise ConfigError("this build of Pillow has no FreeType, which drawing text needs: pip install --force-reinstall pillow")
    return _Font(font, _glyph(font, _NO_CHARACTER))


def _glyph(font: Any, character: str) -> tuple[bytes, float]:
    return bytes(font.getmask(character)), float(font.getlength(character))


def _wrapped(paragraph: str, font: _Font, width_px: int) -> list[str]:
    """Lines of whole words; a word that is wider than a line is broken where it must be."""
    lines, line, used = [], "", 0.0
    space = font.width(" ")
    for word in paragraph.split():
        pieces = _broken(word, font, width_px)
        for index, piece in enumerate(pieces):
            length = sum(map(font.width, piece))
            if line and index == 0 and used + space + length <= width_px:
                line, used = f"{line} {piece}", used + space + length
                continue
            if line:
                lines.append(line)
            line, used = piece, length
    return [*lines, line]


def _broken(word: str, font: _Font, width_px: int) -> list[str]:
    pieces, used = [""], 0.0
    for character in word:
        length = font.width(character)
        if pieces[-1] and used + length > width_px:
            pieces.append("")
            used = 0.0
        pieces[-1] += character
        used += length
    return pieces
