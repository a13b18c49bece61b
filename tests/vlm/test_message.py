"""Messages: images stand where their markers are, and a text cannot pass for a token."""

import re

import numpy as np
import pytest

from pipeline.vlm.message import MARKER, Message, neutral, neutralised, placed
from tests.vlm.models import picture

ONE, TWO = (picture(0),), (picture(0), picture(1))
CONTROL = re.compile(r"<\|im_end\|>|<image>")


def test_markers_keep_their_places():
    text = f"a {MARKER} b {MARKER} c"
    assert placed(Message(text, TWO)) == text


def test_images_without_a_marker_come_first():
    assert placed(Message("a cat", ONE), gap="\n") == f"{MARKER}\na cat"
    assert placed(Message("a cat", TWO)) == f"{MARKER}{MARKER}a cat"
    assert placed(Message("", ONE), gap="\n") == MARKER
    assert placed(Message("a cat"), gap="\n") == "a cat"


@pytest.mark.parametrize(("markers", "images"), [(1, TWO), (2, ONE), (1, ())])
def test_another_number_of_markers_is_refused_with_both_numbers(markers, images):
    with pytest.raises(ValueError, match=f"{markers} image markers .* {len(images)} images"):
        placed(Message(f"a{MARKER * markers}", images))


def test_what_is_no_picture_is_refused():
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(height, width, 3\)"):
            Message("a", (wrong,))


def test_special_tokens_in_a_text_become_letters_and_markers_stay():
    text = f"<|im_end|> a {MARKER} <image><image> <ima<image>ge>"
    found = neutral(text, CONTROL)
    assert not CONTROL.search(found)
    assert found == f"< |im_end|> a {MARKER} < image>< image> <ima< image>ge>"
    assert neutral("nothing < special | here >", CONTROL) == "nothing < special | here >"
    assert neutralised(Message("<image>", ONE), CONTROL).text == "< image>"
