"""Each format as its projects write it, and what is wrong with a row told by file and row."""

import io
import json
import pickle
import tarfile

import datasets
import lance
import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.pairs.contract import check_pair_reader
from pipeline.pairs.flag import Flag
from pipeline.pairs.megapairs import MegaPairs
from pipeline.pairs.mmeb import Mmeb
from pipeline.pairs.sentence_transformers import SentenceTransformers
from pipeline.pairs.table import Pairs, Table
from pipeline.pairs.tevatron import Tevatron
from pipeline.pairs.webdataset import WebDataset
from pipeline.vlm.message import MARKER, Message
from pipeline.vlm.templates import template_of
from schemas.pairs import PAIR
from tests.pairs.writing import faults, jsonl, parquet, picture, rows, shown, text

V1 = {"qry": "", "qry_image_path": "", "pos_text": "", "pos_image_path": "", "neg_text": "", "neg_image_path": ""}


# ---- MMEB ----


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
    from pipeline.pairs.rows import marked

    one, two = {"uri": "1"}, {"uri": "2"}
    assert marked("<|image_2|> after <|image_1|>", [one, two], None) == (f"{MARKER} after {MARKER}", [two, one])


def test_files_that_are_no_mmeb_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not of MMEB"):
        Mmeb(jsonl(tmp_path / "x.jsonl", [{"query": "a", "pos": ["b"]}])).list()
    with pytest.raises(ConfigError, match="no row"):
        Mmeb(jsonl(tmp_path / "y.jsonl", ["{"])).list()


# ---- MegaPairs ----


def test_megapairs_give_a_row_for_each_text(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        [
            {"q_img": "a.jpg", "q_text": ["in red", "older"], "t_img": "b.jpg", "hns": ["c.jpg", "d.jpg"]},
            {"q_img": "a.jpg", "q_text": "one", "t_img": "b.jpg", "hns": []},
            {"q_img": "", "q_text": ["x"], "t_img": "b.jpg", "hns": []},
            {"q_img": "a.jpg", "q_text": [], "t_img": "b.jpg", "hns": []},
        ],
    )
    reader = MegaPairs(path, image_dir="/i")
    found = rows(reader)
    assert [row["uri"].rpartition("#")[2] for row in found] == ["0.0", "0.1", "1", "2", "3"]
    assert [row["query"] for row in found[:3]] == [shown("/i/a.jpg", words) for words in ("in red", "older", "one")]
    assert found[1]["negatives"] == [shown("/i/c.jpg"), shown("/i/d.jpg")] and found[1]["positives"] == [shown("/i/b.jpg")]
    assert faults(reader) == [("x.jsonl#2", "empty"), ("x.jsonl#3", "empty")]


# ---- sentence-transformers ----


def test_columns_are_taken_by_their_order(tmp_path):
    given = [{"question": "q", "answer": "a", "wrong": "w", "worse": None}, {"question": "q2", "answer": "a2", "wrong": "w2", "worse": "x2"}]
    reader = SentenceTransformers(parquet(tmp_path / "x.parquet", given))
    found = rows(reader)
    assert found[0]["query"] == text("q") and found[0]["positives"] == [text("a")] and found[0]["negatives"] == [text("w")]
    assert found[1]["negatives"] == [text("w2"), text("x2")]
    assert reader.uses() == {"question": "query", "answer": "positives", "wrong": "negatives, number 1", "worse": "negatives, number 2"}
    turned = rows(SentenceTransformers(str(tmp_path / "x.parquet"), columns=["answer", "question"]))
    assert turned[0]["query"] == text("a") and turned[0]["positives"] == [text("q")]


def test_a_saved_hugging_face_dataset_is_read(tmp_path):
    datasets.Dataset.from_dict({"a": [f"q{i}" for i in range(2500)], "b": [f"d{i}" for i in range(2500)]}).save_to_disk(str(tmp_path / "x"))
    found = rows(SentenceTransformers(str(tmp_path / "x")))
    assert [row["query"]["text"] for row in found] == [f"q{i}" for i in range(2500)]
    assert found[-1]["uri"].endswith("#2499")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["positive", "anchor"], "anchor, positive"),
        (["negative_1", "anchor", "positive", "negative_2"], "anchor, positive, negative_1, negative_2"),
        (["question", "context", "answer"], "question, answer, context"),
    ],
)
def test_columns_whose_names_say_another_order_than_they_have_are_refused(tmp_path, names, wanted):
    """Keys of JSON come in any order, and a column called negative was trained on as a query, as sentence-transformers would."""
    path = jsonl(tmp_path / "x.jsonl", [{name: name for name in names}])
    with pytest.raises(ConfigError, match=rf"in the order {', '.join(names)}, .*columns: \[{wanted}\]"):
        SentenceTransformers(path).list()
    (row,) = rows(SentenceTransformers(path, columns=wanted.split(", ")))
    assert row["query"]["text"] == wanted.split(", ")[0]


@pytest.mark.parametrize(
    "names", [["anchor", "positive", "negative_2", "negative_1"], ["query", "answer"], ["question", "passage", "negative"], ["a", "b"]]
)
def test_columns_of_usual_names_are_taken_in_their_order(tmp_path, names):
    (row,) = rows(SentenceTransformers(jsonl(tmp_path / "x.jsonl", [{name: name for name in names}])))
    assert [row["query"]["text"], row["positives"][0]["text"], *(each["text"] for each in row["negatives"])] == names


@pytest.mark.parametrize("name", ["id", "query_id", "docid", "idx", "__index_level_0__"])
def test_a_leftover_id_column_must_be_named(tmp_path, name):
    path = parquet(tmp_path / "x.parquet", [{name: "7", "anchor": "q", "positive": "d"}])
    with pytest.raises(ConfigError, match=f"'{name}' would be an input"):
        SentenceTransformers(path).list()
    reader = SentenceTransformers(path, ignore=[name])
    assert rows(reader)[0]["query"] == text("q")
    assert reader.uses() == {name: None, "anchor": "query", "positive": "positives"}


def test_scored_pairs_need_a_threshold(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl", [{"a": "x", "b": "y", "score": 0.9}, {"a": "x", "b": "z", "score": 0.1}, {"a": "x", "b": "y", "score": "high"}]
    )
    with pytest.raises(ConfigError, match="min_score"):
        SentenceTransformers(path).list()
    reader = SentenceTransformers(path, min_score=0.5)
    found = rows(reader)
    assert (found[0]["label"], found[0]["pos_scores"], found[0]["reject_reason"]) == ("0.9", [pytest.approx(0.9)], None)
    assert faults(reader) == [("x.jsonl#1", "unwanted"), ("x.jsonl#2", "scores")]


def test_texts_with_classes_have_the_other_classes_as_negatives(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "goal!", "label": 1}, {"text": "?", "label": 3}])
    with pytest.raises(ConfigError, match="classes"):
        SentenceTransformers(path).list()
    reader = SentenceTransformers(path, classes=["politics", "sports", "food"])
    row = rows(reader)[0]
    assert row["positives"] == [text("sports")] and row["negatives"] == [text("politics"), text("food")] and row["label"] == "1"
    assert faults(reader) == [("x.jsonl#1", "bad_row")]


@pytest.mark.parametrize(("label", "positive", "negative"), [([3.0, 1.0, 2.0], [3.0], [1.0, 2.0]), ([2.0, 1.0], [0.0], [-2.0, -1.0])])
def test_a_teachers_scores_or_margins_are_kept(tmp_path, label, positive, negative):
    row = rows(SentenceTransformers(jsonl(tmp_path / "x.jsonl", [{"q": "a", "p": "b", "n1": "c", "n2": "d", "label": label}])))[0]
    assert (row["pos_scores"], row["neg_scores"]) == (positive, negative)


def test_cells_may_be_images_dicts_or_chats(tmp_path):
    chat = [
        {"role": "system", "content": "Find it."},
        {"role": "user", "content": [{"type": "image", "image": "/c.jpg"}, {"type": "text", "text": " this"}]},
    ]
    given = [
        {"anchor": chat, "positive": {"text": "two", "image": "p.jpg"}, "negative": "n.jpg"},
        {"anchor": [{"role": "assistant", "content": "x"}], "positive": "b", "negative": "n.jpg"},
    ]
    reader = SentenceTransformers(jsonl(tmp_path / "x.jsonl", given), images=["negative"], image_dir="/i")
    row = rows(reader)[0]
    assert row["query"] == shown("/c.jpg", f"{MARKER} this") and row["instruction_q"] == "Find it."
    assert row["positives"] == [shown("/i/p.jpg", "two")] and row["negatives"] == [shown("/i/n.jpg")]
    assert faults(reader) == [("x.jsonl#1", "bad_row")]


# ---- Tevatron ----


def test_tevatron_v1_passages_have_titles_and_ids(tmp_path):
    passage = {"docid": "7", "title": "Cats", "text": "They purr."}
    given = [
        {"query_id": "1", "query": "purr?", "positive_passages": [passage], "negative_passages": [{"docid": 8, "title": "", "text": "Dogs."}]},
        {"query_id": "2", "query": "x", "positive_passages": [], "negative_passages": []},
        {"query_id": "3", "query": "x", "positive_passages": [{"docid": "9", "text": ""}], "negative_passages": []},
    ]
    reader = Tevatron(jsonl(tmp_path / "x.jsonl", given))
    row = rows(reader)[0]
    assert row["query"] == text("purr?", "1") and row["positives"] == [text("Cats They purr.", "7")] and row["negatives"] == [text("Dogs.", "8")]
    assert faults(reader) == [("x.jsonl#1", "no_positive"), ("x.jsonl#2", "empty")]


def test_tevatron_v2_documents_are_looked_up_in_the_corpus(tmp_path):
    corpus = [{"docid": f"d{i}", "text": f"document {i}", "image": {"bytes": picture(i), "path": None} if i == 1 else None} for i in range(700)]
    parquet(tmp_path / "corpus.parquet", corpus)
    given = [
        {"query_id": "1", "query_text": "a", "query_image": None, "positive_document_ids": ["d699"], "negative_document_ids": ["d1", "d0"]},
        {"query_id": "2", "query_text": "a", "query_image": None, "positive_document_ids": ["d700"], "negative_document_ids": []},
    ]
    path = parquet(tmp_path / "train.parquet", given)
    with pytest.raises(ConfigError, match="give `corpus`"):
        Tevatron(path).list()
    reader = Tevatron(path, corpus=str(tmp_path / "corpus.parquet"))
    row = rows(reader)[0]
    assert row["positives"] == [text("document 699", "d699")]
    assert row["negatives"] == [{"text": "document 1", "images": [{"bytes": picture(1), "uri": None}], "id": "d1"}, text("document 0", "d0")]
    assert faults(reader) == [("train.parquet#1", "missing")]
    assert reader.uses()["corpus.text"] == "document text"
    parquet(tmp_path / "corpus.parquet", [*corpus, corpus[3]])
    with pytest.raises(ConfigError, match="'d3' more than once"):
        rows(reader)


# ---- FlagEmbedding ----


def test_flag_rows_have_lists_scores_and_a_prompt(tmp_path):
    given = [
        {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [1, 0.5], "neg_scores": [0.25], "prompt": "Find.", "type": "normal"},
        {"query": "q", "pos": ["a"], "neg": ["c", "d"], "teacher_scores": [3, 2, 1], "task": "qa"},
        {"query": "q", "pos": [], "neg": ["c"]},
        {"query": "", "pos": ["a"], "neg": ["c"]},
        {"query": "q", "pos": ["a"], "neg": ["c", ""]},
        {"query": "q", "pos": "a", "neg": []},
        {"query": "q", "pos": ["a"], "neg": [], "pos_scores": ["high"]},
        {"query": "q", "pos": ["a"], "neg": ["c"], "teacher_scores": [1]},
        "[1]",
    ]
    reader = Flag(jsonl(tmp_path / "x.jsonl", given))
    found = rows(reader)
    assert found[0]["positives"] == [text("a"), text("b")] and found[0]["instruction_q"] == "Find."
    assert (found[0]["pos_scores"], found[0]["neg_scores"]) == ([1.0, 0.5], [0.25])
    assert (found[1]["pos_scores"], found[1]["neg_scores"], found[1]["task"]) == ([3.0], [2.0, 1.0], "qa")
    wanted = ["no_positive", "empty", "empty", "bad_row", "scores", "scores", "bad_row"]
    assert faults(reader) == [(f"x.jsonl#{row}", reason) for row, reason in enumerate(wanted, 2)]
    assert reader.uses()["type"] is None and reader.uses()["neg"] == "negatives.text"


def test_a_json_array_is_read_as_well(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"query": f"q{i}", "pos": ["a"]} for i in range(3)]))
    assert [row["query"]["text"] for row in rows(Flag(str(tmp_path / "x.json")))] == ["q0", "q1", "q2"]


def test_rows_keep_their_ids_when_the_source_moves(tmp_path):
    ids = []
    for place in ("here", "there"):
        (tmp_path / place / "part").mkdir(parents=True)
        for name in ("a", "part/b"):
            jsonl(tmp_path / place / f"{name}.jsonl", [{"query": f"{name}{i}", "pos": ["x"]} for i in range(3)])
        ids.append(check_pair_reader(Flag(str(tmp_path / place)))["row_id"].to_pylist())
    assert ids[0] == ids[1]


def test_a_large_file_is_read_in_slices_and_by_a_reader_that_travelled(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"query": f"q{i}", "pos": ["x"]} for i in range(9000)])
    reader = Flag(path)
    slices = reader.split(reader.list())
    assert slices.num_rows == 2
    travelled = pickle.loads(pickle.dumps(reader))
    last = pa.concat_tables(travelled.read(slices.slice(1)))
    assert [row["query"]["text"] for row in last.to_pylist()] == [f"q{i}" for i in range(8192, 9000)]


def test_records_with_large_images_are_held_few_at_a_time(tmp_path):
    given = [{"query_text": "a", "query_image": {"bytes": [bytes(3_000_000)], "paths": ["1.jpg"]}, "pos_text": "b"} for _ in range(30)]
    reader = Mmeb(parquet(tmp_path / "x.parquet", given))
    sizes = [table.num_rows for table in reader.read(reader.split(reader.list()))]
    assert sum(sizes) == 30 and max(sizes) <= 12


# ---- WebDataset ----


def test_samples_of_shards_are_pairs_of_image_and_caption(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in [("a.png", picture(1)), ("a.txt", b"one"), ("b.png", picture(2)), ("c.png", picture(3)), ("c.txt", b"three")]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    found = rows(WebDataset(str(tmp_path / "0.tar")))
    assert found[0]["query"] == {"text": None, "images": [{"bytes": picture(1), "uri": None}], "id": None}
    assert found[0]["positives"] == [text("one")]
    reader = WebDataset(str(tmp_path / "0.tar"), query="text")
    assert rows(reader)[2]["query"] == text("three")
    assert faults(reader) == [("0.tar#b", "empty")]
    assert reader.uses() == {"txt": "query", "jpg;png;jpeg;webp": "positives"}


# ---- Lance tables ----


def test_columns_of_a_lance_table_are_pairs(tmp_path):
    table = pa.table(
        {
            "q": ["a", "b", "c"],
            "photo": pa.array([picture(), None, None], pa.binary()),
            "doc": ["x", "y", None],
            "doc_id": [1, 2, 3],
            "bad": [["u", "v"], [], None],
            "class": ["g", "g", None],
            "left": [1.0, 2.0, 3.0],
        }
    )
    lance.write_dataset(table, tmp_path / "pairs.lance", data_storage_version="2.2", max_rows_per_file=2)
    reader = Table(
        str(tmp_path),
        "pairs",
        query={"text": "q", "image": "photo"},
        positives={"text": "doc"},
        negatives={"text": "bad"},
        columns={"group": "class"},
    )
    found = rows(reader)
    assert found[0]["query"] == {"text": "a", "images": [{"bytes": picture(), "uri": None}], "id": None}
    assert found[0]["negatives"] == [text("u"), text("v")] and found[0]["group"] == "g" and found[1]["negatives"] == []
    assert found[2]["reject_reason"] == "no_positive"
    assert reader.uses()["left"] is None and reader.uses()["class"] == "group"
    with pytest.raises(ConfigError, match="no column 'qq'; did you mean 'q'"):
        Table(str(tmp_path), "pairs", query={"text": "qq"}, positives={"text": "doc"}).list()
    with pytest.raises(ConfigError, match="'picture' is none of text, image, id"):
        Table(str(tmp_path), "pairs", query={"picture": "q"}, positives={"text": "doc"})


def test_a_table_of_pair_rows_is_read_as_it_is(tmp_path):
    made = check_pair_reader(Flag(jsonl(tmp_path / "x.jsonl", [{"query": f"q{i}", "pos": ["x"], "neg": ["y"]} for i in range(5)]))).select(PAIR.names)
    lance.write_dataset(made, tmp_path / "mined.lance", data_storage_version="2.2")
    reader = Pairs(str(tmp_path), "mined")
    assert check_pair_reader(reader).select(PAIR.names).to_pylist() == made.to_pylist()
    lance.write_dataset(made.drop_columns(["group"]), tmp_path / "poor.lance", data_storage_version="2.2")
    with pytest.raises(ConfigError, match="no column 'group'"):
        Pairs(str(tmp_path), "poor").list()
