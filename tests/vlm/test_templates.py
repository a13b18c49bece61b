"""Templates, to the space: what the models behind the names were trained and measured with."""

import pytest

from pipeline.config import ConfigError
from pipeline.vlm.message import MARKER, PLACEHOLDER, Message
from pipeline.vlm.templates import TEMPLATES, template_of, with_placeholder
from tests.vlm.models import picture

TEXT = Message("a cat on a mat")
IMAGE = Message("", (picture(0),))
BOTH = Message("What is it?", (picture(0),))
INSIDE = Message(f"first {MARKER} then {MARKER}", (picture(0), picture(1)))


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (TEXT, "Find it: a cat on a mat"),
        (IMAGE, f"{MARKER}\nFind it:"),
        (BOTH, f"{MARKER}\nFind it: What is it?"),
        (INSIDE, f"Find it: first {MARKER} then {MARKER}"),
    ],
)
def test_plain(message, wanted):
    plain = template_of("plain")
    assert plain.query("Find it:", message) == plain.document("Find it:", message) == wanted
    assert plain.document("", TEXT) == "a cat on a mat"
    assert plain.document("", IMAGE) == MARKER


@pytest.mark.parametrize(
    ("instruction", "message", "wanted"),
    [
        # image_qa_dataset.py and image_cls_dataset.py: image, line break, instruction, question, line break
        (
            "Represent the given image with the following question:",
            BOTH,
            f"{MARKER}\nRepresent the given image with the following question: What is it?\n",
        ),
        ("Represent the given image for classification", IMAGE, f"{MARKER}\nRepresent the given image for classification\n"),
        # image_t2i_eval.py: instruction, caption, line break
        (
            "Find me an everyday image that matches the given caption:",
            TEXT,
            "Find me an everyday image that matches the given caption: a cat on a mat\n",
        ),
    ],
)
def test_vlm2vec_v1_queries(instruction, message, wanted):
    assert template_of("vlm2vec-v1").query(instruction, message) == wanted


def test_vlm2vec_v1_documents():
    v1 = template_of("vlm2vec-v1")
    assert v1.document("Represent the given image.", IMAGE) == f"{MARKER}\nRepresent the given image.\n"
    assert v1.document("", TEXT) == "a cat on a mat"


def test_visdial_ends_in_two_line_breaks_where_the_query_is_a_text():
    visdial = template_of("vlm2vec-v1-visdial")
    said = "Represent the given dialogue about an image, which is used for image retrieval:"
    assert visdial.query(said, TEXT) == f"{said} a cat on a mat\n\n"
    assert visdial.document("Represent the given image.", IMAGE) == f"{MARKER}\nRepresent the given image.\n"


def test_vlm2vec_v2():
    v2 = template_of("vlm2vec-v2")
    asked = "Find a document image that matches the given query:"
    assert v2.query(asked, TEXT) == f"{asked} a cat on a mat"
    assert v2.document("Understand the content of the provided document image.", IMAGE) == (
        f"{MARKER} Understand the content of the provided document image."
    )
    assert v2.query(asked, BOTH) == f"{MARKER} {asked} What is it?"


@pytest.mark.parametrize(
    ("instruction", "message", "system", "user"),
    [
        ("Represent the user's input.", TEXT, "Represent the user's input.", "a cat on a mat"),
        (" Retrieve images relevant to the query ", IMAGE, "Retrieve images relevant to the query.", MARKER),
        ("Is it so?", BOTH, "Is it so?", f"{MARKER}What is it?"),
        ("検索。", Message(), "検索。", "NULL"),
    ],
)
def test_qwen3_vl_embedding(instruction, message, system, user):
    wanted = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    template = template_of("qwen3-vl-embedding")
    assert template.query(instruction, message) == template.document(instruction, message) == wanted
    assert template.instruction == "Represent the user's input."


def test_prompt_eol():
    eol = template_of("prompt-eol")
    assert eol.query("", TEXT) == 'This sentence : "a cat on a mat" means in one word:"'
    assert eol.query("", IMAGE) == f"{MARKER}\nSummary of the above image in one word:"
    assert eol.query("", BOTH) == f"{MARKER}\nWhat is it?\nSummary of the above image and text in one word:"
    assert eol.query("Think of animals.", TEXT) == 'Think of animals.\nThis sentence : "a cat on a mat" means in one word:"'


def test_only_vlm2vec_has_bare_images():
    assert {name for name, template in TEMPLATES.items() if template.bare} == {"vlm2vec-v1", "vlm2vec-v1-visdial", "vlm2vec-v2"}


def test_a_template_of_ones_own_is_filled_in_once():
    own = template_of("Task: {instruction}\nInput: {input}.")
    assert own.query("see {input}", Message("{instruction} {braces}")) == "Task: see {input}\nInput: {instruction} {braces}."
    assert own.document("x", BOTH) == f"Task: x\nInput: {MARKER}What is it?."


def test_a_placeholder_goes_before_the_text():
    eol = with_placeholder(template_of("prompt-eol"))
    assert eol.query("", TEXT) == eol.document("", TEXT) == f'This sentence : "{PLACEHOLDER}a cat on a mat" means in one word:"'
    assert with_placeholder(template_of("plain")).query("Find it:", BOTH) == f"{MARKER}\nFind it: {PLACEHOLDER}What is it?"


def test_a_wrong_name_is_refused_with_the_right_one():
    with pytest.raises(ConfigError, match="did you mean 'vlm2vec-v1'"):
        template_of("vlm2vec_v1")
