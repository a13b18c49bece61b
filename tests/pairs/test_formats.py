"""Each format as its projects write it, and what is wrong with a row told by file and row."""

import io
import json
import pickle
import tarfile

import datasets
import lance
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
from pipeline.vlm.message import MARKER
from schemas.pairs import PAIR
from tests.pairs.writing import faults, jsonl, parquet, picture, rows, shown, text

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
