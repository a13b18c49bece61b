"""MMEB's rows, as VLM2Vec and mmE5 publish them, to pairs."""

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.pairs.mmeb import Mmeb
from pipeline.pairs.rows import marked
from pipeline.vlm.message import MARKER, Message
from pipeline.vlm.templates import template_of
from tests.pairs.writing import faults, jsonl, parquet, picture, rows, shown, text

V1 = {"qry": "", "qry_image_path": "", "pos_text": "", "pos_image_path": "", "neg_text": "", "neg_image_path": ""}


def test_mmeb_v1_rows_become_pairs(tmp_path):
    given = [
        V1 | {"qry": "<|image_1|>\nWhat is it?", "qry_image_path": "a/1.jpg", "pos_text": "a cat", "neg_text": "a dog"},
        V1 | {"qry": "Find a cat.", "pos_text": "<|image_1|>\nRepresent.", "pos_image_path": "a/2.jpg", "neg_image_path": "a/3.jpg"},
        V1 | {"qry": "Which one?", "pos_text": "this"},
    ]
    found = rows(Mmeb(parquet(tmp_path / "train.parquet", given, row_group_size=2), image_dir="/images"))
    assert found[0]["query"] == shown("/images/a/1.jpg", f"{MARKER}What is it?")
    assert found[0]["positives"] == [text("a cat")] and found[0]["negatives"] == [text("a dog")]
    assert found[1]["positives"] == [shown("/images/a/2.jpg", f"{MARKER}Represent.")]
    assert found[1]["negatives"] == [shown("/images/a/3.jpg")]
    assert found[2]["negatives"] == []
    assert [row["uri"] for row in found] == [f"{tmp_path}/train.parquet#{row}" for row in range(3)]
    assert not any(row["reject_reason"] for row in found)


def test_mmeb_rows_as_they_are_published_are_given_to_the_model_as_vlm2vec_gives_them(tmp_path):
    """The line breaks of the rows and those of the template came both: two after the image, two at the end."""
    asked = "Represent the given image with the following question: What is it?"
    given = [
        V1 | {"qry": f"<|image_1|>\n{asked}\n", "qry_image_path": "1.jpg", "pos_text": "a cat"},
        V1 | {"qry": "Find me an image of: a cat\n", "pos_text": "<|image_1|>\nRepresent the given image.\n", "pos_image_path": "1.jpg"},
        V1 | {"qry": "Is <|image_1|>\na cat?\n", "qry_image_path": "1.jpg", "pos_text": "yes"},
    ]
    template, image = template_of("vlm2vec-v1"), (np.zeros((4, 4, 3), np.uint8),)

    def said(message):
        return Message(message["text"], image if message["images"] else ())

    found = rows(Mmeb(jsonl(tmp_path / "x.jsonl", given)))
    queries = [template.query("", said(row["query"])) for row in found]
    assert queries == [f"{MARKER}\n{asked}\n", "Find me an image of: a cat\n", f"Is {MARKER}\na cat?\n"]
    documents = [template.document("", said(row["positives"][0])) for row in found]
    assert documents == ["a cat", f"{MARKER}\nRepresent the given image.\n", "yes"]
    assert template_of("plain").query("", said(found[0]["query"])) == f"{MARKER}\n{asked}"


def test_mmeb_images_are_taken_from_the_files_folder_unless_said_otherwise(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [V1 | {"qry_image_path": "./p/../1.jpg", "pos_text": "a"}])
    assert rows(Mmeb(path))[0]["query"] == shown(tmp_path / "1.jpg")


def test_mmeb_v1_rows_that_are_wrong_are_told(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        [
            V1 | {"qry": "<|image_1|> what?", "pos_text": "a"},
            V1 | {"pos_text": "a"},
            V1 | {"qry": "a"},
            V1 | {"qry": " ", "pos_text": "a"},
            V1 | {"qry": 5, "pos_text": "a"},
            V1 | {"qry": "a", "pos_text": "b", "neg_text": "['c', 'd']"},
            "{broken",
            V1 | {"qry": "a", "pos_text": "[not a list]"},
            V1 | {"qry": "a <|image_1|> <|image_1|>", "qry_image_path": "1.jpg", "pos_text": "b"},
        ],
    )
    reader = Mmeb(path)
    wanted = [(0, "markers"), (1, "empty"), (2, "no_positive"), (3, "empty"), (4, "bad_row"), (5, "bad_row"), (6, "bad_row"), (8, "markers")]
    assert faults(reader) == [(f"x.jsonl#{row}", reason) for row, reason in wanted]
    details = {row["uri"].rpartition("#")[2]: row["reject_detail"] for row in rows(reader)}
    assert "string_lists: true" in details["5"] and "line 7, column 2" in details["6"] and "1 image markers" in details["0"]


def test_mme5_negatives_are_lists_spelled_as_text_and_nothing_is_evaluated(tmp_path):
    given = [
        V1 | {"qry": "a", "pos_text": "b", "neg_text": "['it\\'s', \"two\"]", "neg_image_path": "['', '']"},
        V1 | {"qry": "a", "pos_text": "b", "neg_text": "['', 'x']", "neg_image_path": "['1.jpg', '']"},
        V1 | {"qry": "a", "pos_text": "b", "neg_text": "['x']", "neg_image_path": "['1.jpg', '2.jpg']"},
        V1 | {"qry": "a", "pos_text": "b", "neg_text": "__import__('os').getcwd()"},
        V1 | {"qry": "a", "pos_text": "b", "neg_text": "['x', 'y']", "neg_image_path": ""},
        V1 | {"qry": "a", "pos_text": "b", "neg_text": "[" * 5000},
    ]
    reader = Mmeb(jsonl(tmp_path / "x.jsonl", given), image_dir="/i", string_lists=True)
    found = rows(reader)
    assert found[0]["negatives"] == [text("it's"), text("two")]
    assert found[1]["negatives"] == [shown("/i/1.jpg"), text("x")]
    assert found[4]["negatives"] == [text("x"), text("y")]
    assert faults(reader) == [("x.jsonl#2", "bad_row"), ("x.jsonl#3", "bad_row"), ("x.jsonl#5", "bad_row")]


def test_mmeb_v2_rows_have_structs_of_images(tmp_path):
    def images(*paths, data=()):
        return {"paths": list(paths), "bytes": list(data), "resolutions": [[4, 4]] * len(paths)}

    given = [
        {
            "query_text": "<|image_pad|> <|image_pad|> same?",
            "query_image": images("1.jpg", "2.jpg", data=[picture(), None]),
            "pos_text": "yes",
            "pos_image": images(),
            "neg_text": ["no", "<|image_pad|>"],
            "neg_image": [images(), images("3.jpg")],
            "global_dataset_name": "same/train",
        }
    ]
    reader = Mmeb(parquet(tmp_path / "x.parquet", given), image_dir="/i", marker="<|image_pad|>")
    row = rows(reader)[0]
    assert row["query"]["text"] == f"{MARKER} {MARKER} same?"
    assert row["query"]["images"] == [{"bytes": picture(), "uri": None}, {"bytes": None, "uri": "/i/2.jpg"}]
    assert row["negatives"] == [text("no"), shown("/i/3.jpg", MARKER)] and row["positives"] == [text("yes")]
    assert row["task"] == "same/train"
    assert reader.uses()["global_dataset_name"] == "task"


def test_numbered_markers_say_which_image():
    one, two = {"uri": "1"}, {"uri": "2"}
    assert marked("<|image_2|> after <|image_1|>", [one, two], None) == (f"{MARKER} after {MARKER}", [two, one])


def test_files_that_are_no_mmeb_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not of MMEB"):
        Mmeb(jsonl(tmp_path / "x.jsonl", [{"query": "a", "pos": ["b"]}])).list()
    with pytest.raises(ConfigError, match="no row"):
        Mmeb(jsonl(tmp_path / "y.jsonl", ["{"])).list()
