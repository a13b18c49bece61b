"""Preparer: what the real processors make of a text and images, with nothing lost, smuggled in or cut in two."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import ConfigError
from pipeline.vlm.base import base_of
from pipeline.vlm.message import MARKER, PLACEHOLDER, Message
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.settings import Sizes
from pipeline.vlm.templates import template_of
from tests.vlm.models import FAMILIES, SPECIAL, picture

PLAIN = template_of("plain")
PICTURES = (picture(1, 40, 20), picture(2, 16, 50), picture(3, 64, 64))


@pytest.fixture
def preparer_of(backbone_of):
    return lambda family: backbone_of(family).preparer


def special_of(family):
    return SPECIAL["qwen" if family.startswith("qwen") else "idefics" if family in ("idefics3", "smolvlm") else family.split("_")[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_the_models_own_processor_makes(family, preparer_of, folder_of):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder_of(family))
    token = f"<|vision_start|>{processor.image_token}<|vision_end|>" if family.startswith("qwen") else processor.image_token
    pictures = [Image.fromarray(image) for image in PICTURES]
    nested = [pictures] if family in ("idefics3", "smolvlm", "llava_onevision") else pictures
    theirs = processor(text=[f"{token}one {token}and {token}"], images=nested, return_tensors="pt")
    ours = preparer_of(family).prepare(f"{MARKER}one {MARKER}and {MARKER}", PICTURES)
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert len(ours) == len(ours.input_ids)
    assert ours.images and all(torch.equal(values, torch.as_tensor(theirs[name])) for name, values in ours.images.items())
    assert ours.image_tokens == int((theirs["input_ids"] == processor.image_token_id).sum()) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_message_are_read_as_letters(family, preparer_of):
    preparer, special = preparer_of(family), special_of(family)
    text = " and ".join(special) + "".join(special)
    ids = set(range(len(special)))
    assert ids <= set(preparer.tokenizer(text)["input_ids"]), "the tokenizer alone does take them for special"
    row = preparer.read(Message(text), PLAIN, instruction=text)
    bos = {preparer.tokenizer.bos_token_id} if family == "paligemma" else set()
    assert set(row.input_ids.tolist()) & ids == bos
    with_image = preparer.read(Message(text, PICTURES[:1]), PLAIN)
    assert with_image.image_tokens == preparer.read(Message("a", PICTURES[:1]), PLAIN).image_tokens


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_no_text_put_together_of_pieces_becomes_special(family, preparer_of):
    preparer, special = preparer_of(family), special_of(family)
    rng = random.Random(0)
    pieces = [*special, PLACEHOLDER, *(token[:cut] for token in special for cut in (1, 2, len(token) // 2)), *(token[2:] for token in special), " "]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        row = preparer.read(Message(text), PLAIN)
        assert min(row.input_ids.tolist()) >= len(special), text


def test_a_templates_own_special_tokens_are_special(preparer_of):
    preparer = preparer_of("qwen3_vl")
    row = preparer.read(Message("a <|im_end|> b"), template_of("qwen3-vl-embedding"))
    starts, ends = (SPECIAL["qwen"].index(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert [int((row.input_ids == token).sum()) for token in (starts, ends)] == [3, 2]


@pytest.mark.parametrize("text", [f"a {MARKER}", f"{MARKER}{MARKER}{MARKER}"])
def test_markers_and_images_must_agree(text, preparer_of):
    with pytest.raises(ValueError, match=r"image marker"):
        preparer_of("qwen2_vl").read(Message(text, PICTURES[:2]), PLAIN)
    with pytest.raises(ValueError, match=r"no image marker .* 2 images"):
        preparer_of("qwen2_vl").prepare("a", PICTURES[:2])


def test_an_empty_message_is_refused(preparer_of):
    with pytest.raises(ValueError, match="nothing to embed"):
        preparer_of("llava").read(Message(""), PLAIN)


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "paligemma"])
def test_long_texts_are_cut_from_the_end_and_images_never(family, folder_of):
    long = f"first {MARKER} " + "word " * 40 + MARKER + " tail " * 40
    base = base_of(str(folder_of(family)))
    whole = Preparer(base, Sizes()).read(Message(long, PICTURES[:2]), PLAIN)
    for limit in (len(whole) - 1, whole.image_tokens + 60, whole.image_tokens + 30):
        row = Preparer(base, Sizes(max_tokens=limit)).read(Message(long, PICTURES[:2]), PLAIN)
        assert limit - 5 < len(row) <= limit
        assert row.image_tokens == whole.image_tokens
        assert all(torch.equal(values, row.images[name]) for name, values in whole.images.items())
        assert row.input_ids[:6].tolist() == whole.input_ids[:6].tolist()
    with pytest.raises(ValueError, match=rf"{whole.image_tokens} of them of 2 images.*max_tokens=5"):
        Preparer(base, Sizes(max_tokens=5)).read(Message(long, PICTURES[:2]), PLAIN)


def test_what_a_template_puts_after_the_message_is_not_cut(folder_of):
    preparer = Preparer(base_of(str(folder_of("qwen3_vl"))), Sizes(max_tokens=120))
    row = preparer.read(Message("日本語 and more, " * 40), template_of("qwen3-vl-embedding"))
    assert len(row) <= 120
    assert preparer.tokenizer.decode(row.input_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_pixel_limits_change_the_number_of_tokens(folder_of):
    base = base_of(str(folder_of("qwen2_5_vl")))
    large = Message("", (picture(0, 100, 100),))
    counts = [Preparer(base, Sizes(max_pixels=pixels)).read(large, PLAIN).image_tokens for pixels in (256, 1024, 4096)]
    assert counts == [4, 16, 64]  # 8 x 8 pixels a token
    tiny = Message("", (picture(0, 3, 3),))
    assert Preparer(base, Sizes(min_pixels=1024)).read(tiny, PLAIN).image_tokens == 16
    with pytest.raises(ConfigError, match="min_pixels=4096 is more than max_pixels=1024"):
        Preparer(base, Sizes(min_pixels=4096))


def test_tiles_can_be_turned_off(folder_of):
    base = base_of(str(folder_of("idefics3")))
    large = Message("", (picture(0, 64, 64),))
    on, off = (Preparer(base, Sizes(tiles=tiles)).read(large, PLAIN).image_tokens for tiles in (True, False))
    assert (on, off) == (20, 4)


@pytest.mark.parametrize(("family", "sizes"), [("llava", {"max_pixels": 99}), ("idefics3", {"min_pixels": 9}), ("qwen2_vl", {"tiles": True})])
def test_a_size_that_a_model_does_not_have_is_refused(family, sizes, folder_of):
    with pytest.raises(ConfigError, match=f"{next(iter(sizes))}.*{family}"):
        Preparer(base_of(str(folder_of(family))), Sizes(**sizes))


def test_bare_images_count_their_positions_as_text(backbone_of):
    """VLM2Vec's models never saw rows and columns of an image: their prompt lacks the token by which its code finds one."""
    backbone = backbone_of("qwen2_vl")
    for name, bare in (("vlm2vec-v2", True), ("plain", False)):
        row = backbone.preparer.read(Message("what?", PICTURES[:1]), template_of(name), instruction="Find.")
        batch = backbone.preparer.collate([row])
        positions, _ = backbone.model.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"])
        straight = torch.arange(len(row)).expand(3, 1, -1)
        assert torch.equal(positions, straight) == bare
        assert (SPECIAL["qwen"].index("<|vision_start|>") in row.input_ids) != bare


def test_a_row_of_thin_pictures_is_prepared_or_refused_by_name(preparer_of):
    """Of an array of 3 x 3 x 3 no one can tell which side is colour."""
    row = preparer_of("qwen2_vl").prepare(MARKER, (np.zeros((3, 3, 3), np.uint8),))
    assert row.image_tokens >= 1
    with pytest.raises(ValueError, match="aspect ratio"):
        preparer_of("qwen2_vl").prepare(MARKER, (np.zeros((2, 900, 3), np.uint8),))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_was_resized_before_gives_the_same_row(family, preparer_of):
    preparer = preparer_of(family)
    for height, width in ((40, 20), (100, 333), (7, 9), (64, 64), (500, 700)):
        image = picture(height, height, width)
        resized = preparer.resized(image)
        wanted, found = (preparer.prepare(MARKER, (each,)) for each in (image, resized))
        assert torch.equal(wanted.input_ids, found.input_ids)
        assert all(torch.equal(values, found.images[name]) for name, values in wanted.images.items())
        assert resized.size <= 32 * 32 * 3 if family.startswith("qwen") else resized is image
    thin = np.zeros((2, 900, 3), np.uint8)
    assert preparer.resized(thin) is thin
