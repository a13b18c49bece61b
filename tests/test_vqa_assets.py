"""The VLM of real parts and its questions: whole, and what they are said to be. Skipped where the packages cannot be had."""

import json

import pytest
import torch
from safetensors.torch import load_file

from demo.assets import fetch
from demo.packages import Unavailable
from demo.vqa_assets import fetch_vqa
from pipeline.vlm.backbone import check_images_matter, load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.message import MARKER
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.settings import Sizes


@pytest.fixture(scope="module")
def vqa():
    try:
        return fetch_vqa()
    except Unavailable as error:
        pytest.skip(str(error))


def test_every_question_has_its_picture_and_one_of_eleven_answers_and_the_blind_ones_have_none(vqa):
    answers = {path.stem for path in (vqa / "vqa" / "answers").glob("*.txt")}
    assert len(answers) == 11 and not answers & {"yes", "no"}
    for split, num in (("train", 10_168), ("test", 2_537)):
        seeing, blind = ([json.loads(line) for line in (vqa / "vqa" / f"{split}{kind}.jsonl").open()] for kind in ("", "_blind"))
        assert len(seeing) == len(blind) == num
        assert {row["pos_text"] for row in seeing} == answers
        assert all((vqa / "vqa" / path).is_file() for path in {row["qry_image_path"] for row in seeing})
        assert all(not one["qry_image_path"] and other["qry"] == f"<|image_1|> {one['qry']}" for one, other in zip(blind, seeing, strict=True))


def test_the_model_has_the_classifiers_weights_and_its_images_reach_the_vector(vqa):
    weights = load_file(vqa / "vlm" / "model.safetensors")
    tower = [values for name, values in weights.items() if "vision_tower" in name and values.dim() == 4]
    theirs = [values for values in torch.load(fetch() / "encoder" / "classifier.pth", weights_only=True).values() if values.dim() == 4]
    assert {values.numpy().tobytes() for values in tower} == {values.numpy().tobytes() for values in theirs}
    base = base_of(str(vqa / "vlm"))
    preparer = Preparer(base, Sizes())
    check_images_matter(load_backbone(base, preparer, dtype="float32", device="cpu"))
    assert preparer.prepare(f"{MARKER} what?", (torch.zeros(64, 64, 3, dtype=torch.uint8).numpy(),)).image_tokens == 16
