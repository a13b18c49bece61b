import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import ImageFont

from pipeline.config import ConfigError
from pipeline.vlm.textimage import Page, draw, page_lineage

PAGE = Page(width_px=200, line_px=28, font_px=20, max_lines=6)


def test_a_text_is_black_on_white_pixels_of_whole_lines():
    drawn = draw("a cat", PAGE)
    assert drawn.image.shape == (28, 200, 3) and drawn.image.dtype == np.uint8
    assert drawn.image.min() < 20 and drawn.image.max() == 255
    assert (drawn.image[..., 0] == drawn.image[..., 2]).all()
    assert (drawn.missing, drawn.cut) == ("", False)


def test_the_same_text_gives_the_same_pixels_in_another_process():
    code = "import zlib; from pipeline.vlm.textimage import Page, draw; print(zlib.crc32(draw('Quick, fox!', Page()).image.tobytes()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == zlib.crc32(draw("Quick, fox!", Page()).image.tobytes())


def test_another_text_gives_other_pixels():
    assert not np.array_equal(draw("a cat", PAGE).image, draw("a car", PAGE).image)


def test_lines_are_whole_words_that_fit_the_width():
    text = "the quick brown fox jumps over the lazy dog"
    drawn = draw(text, PAGE)
    assert drawn.image.shape[0] > 28
    assert not drawn.cut and all((drawn.image[top : top + 28] < 128).any() for top in range(0, len(drawn.image), 28))
    # As many lines as a greedy wrap by hand makes with the font's own lengths of whole lines.
    font, lines = ImageFont.load_default(20), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= 200:
            lines[-1] = longer
        else:
            lines.append(word)
    assert drawn.image.shape[0] == 28 * len(lines)
    np.testing.assert_array_equal(drawn.image, np.concatenate([draw(line, PAGE).image for line in lines]))


def test_no_letter_is_lost_at_the_right_edge():
    """A page that is wider, with the same line on it, has the same ink."""
    wide = Page(width_px=400, line_px=28, font_px=20, max_lines=6)
    for line in ("the quick brown f", "W" * 8, "f" * 25):
        narrow, broad = draw(line, PAGE).image, draw(line, wide).image
        assert narrow.shape[0] == 28
        np.testing.assert_array_equal(narrow, broad[:, :200])
        assert (broad[:, 200:] == 255).all()


def test_a_word_wider_than_a_line_is_broken():
    drawn = draw("x" * 60, PAGE)
    assert drawn.image.shape[0] > 28 and drawn.image.shape[1] == 200


def test_a_line_break_begins_a_line_and_white_space_is_one_space():
    np.testing.assert_array_equal(draw("a\nb", PAGE).image, np.concatenate([draw("a", PAGE).image, draw("b", PAGE).image]))
    np.testing.assert_array_equal(draw(" a \t b ", PAGE).image, draw("a b", PAGE).image)


def test_a_long_text_is_cut_and_said_to_be():
    drawn = draw("word " * 500, PAGE)
    assert drawn.image.shape == (6 * 28, 200, 3) and drawn.cut


def test_an_empty_text_is_one_white_line():
    for text in ("", "  \n"):
        assert (draw(text, PAGE).image == 255).all()
    assert draw("", PAGE).image.shape == (28, 200, 3)


def test_characters_that_the_font_lacks_are_left_out_and_reported():
    drawn = draw("日本 caf\u00e9 日 na\u0131ve €", PAGE)
    assert drawn.missing == "日本é\u0131€"
    np.testing.assert_array_equal(drawn.image, draw("caf nave", PAGE).image)
    assert draw("e\u0301", PAGE).missing == "é", "a combining mark counts with its letter"


def test_all_of_ascii_can_be_drawn_and_no_two_letters_look_alike():
    letters = [chr(code) for code in range(33, 127)]
    assert draw("".join(letters), PAGE).missing == ""
    assert len({draw(letter, PAGE).image.tobytes() for letter in letters}) == len(letters)


def test_a_font_file_is_used_and_named_by_its_content(tmp_path):
    own = ImageFont.load_default(20)
    path = tmp_path / "own.ttf"
    own.path.seek(0)
    path.write_bytes(own.path.read())
    named = PAGE.model_copy(update={"font": str(path)})
    np.testing.assert_array_equal(draw("Fox.", named).image, draw("Fox.", PAGE).image)
    moved = tmp_path / "moved.ttf"
    moved.write_bytes(path.read_bytes())
    assert page_lineage(named) == page_lineage(PAGE.model_copy(update={"font": str(moved)}))
    assert page_lineage(named) != page_lineage(PAGE)


def test_lineage_changes_with_whatever_changes_pixels():
    found = {str(page_lineage(page)) for page in (PAGE, Page(), PAGE.model_copy(update={"font_px": 18}), PAGE.model_copy(update={"max_lines": 7}))}
    assert len(found) == 4
    assert page_lineage(PAGE) == page_lineage(PAGE.model_copy())


def test_a_font_that_is_not_there_and_letters_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"font .*none.ttf' cannot be read"):
        draw("a", PAGE.model_copy(update={"font": str(tmp_path / "none.ttf")}))
    with pytest.raises(ValueError, match="letters of 40 px must fit lines of 28 px"):
        Page(font_px=40)
