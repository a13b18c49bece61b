"""From a source to rows that can be trained on: checked, told, found again."""

import pickle

import numpy as np
import pytest

from pipeline.config import ConfigError, Ref
from pipeline.pairs.keys import content_key, cost_of, hash64, told_key
from pipeline.pairs.prepare import Dataset, prepare
from schemas.pairs import PAIR_REJECT, PREPARED
from tests.pairs.writing import jsonl, picture, pictures, text

FLAG = "pipeline.pairs.flag:Flag"
MMEB = "pipeline.pairs.mmeb:Mmeb"


def flag(path, **given):
    return Dataset(name="qa", reader=Ref(target=FLAG, args={"uri": str(path)}), **given)


def mmeb(path, **given):
    return Dataset(name="vqa", reader=Ref(target=MMEB, args={"uri": str(path)}), **given)


def shown(image, **given):
    return {"qry": "<|image_1|> what?", "qry_image_path": image, "pos_text": "a cat", "pos_image_path": ""} | given


def test_rows_are_completed_with_what_the_data_set_says(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        [{"query": "q", "pos": ["a"], "neg": ["b", "c"], "prompt": "Own."}, {"query": "q2", "pos": ["a", "d"], "neg": [], "task": "other"}],
    )
    prepared = prepare(flag(path, instruction_q="Find.", instruction_d="Read.", tokens_per_image=100), str(tmp_path / "cache"))
    table = prepared.open().to_table()
    assert table.schema.equals(PREPARED)
    one, two = table.to_pylist()
    assert (one["instruction_q"], two["instruction_q"], one["instruction_d"]) == ("Own.", "Find.", "Read.")
    assert (one["task"], two["task"], one["in_batch_negatives"]) == ("qa", "other", True)
    assert one["positive_keys"] == two["positive_keys"][:1] == [told_key(content_key(text("a")), "Read.")]
    assert one["row_key"] == hash64(one["row_id"]) and one["cost"] == 1
    assert prepared.uses() == {"query": "query.text", "pos": "positives.text", "neg": "negatives.text", "prompt": "instruction_q", "task": "task"}
    assert prepared.rejects().schema.equals(PAIR_REJECT) and prepared.rejects().num_rows == 0


def test_swapped_rows_ask_the_other_way_and_those_that_cannot_are_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"query": "q", "pos": ["a"], "prompt": "Own."}, {"query": "q2", "pos": ["a", "d"]}])
    cache = str(tmp_path / "cache")
    prepared = prepare(flag(path, swap=True, instruction_q="Find.", max_rejects=0.5), cache)
    (row,) = prepared.open().to_table().to_pylist()
    assert (row["query"]["text"], [each["text"] for each in row["positives"]]) == ("a", ["q"])
    assert (row["query_key"], row["positive_keys"], row["instruction_q"]) == (
        told_key(content_key(text("a")), "Find."),
        [content_key(text("q"))],
        "Find.",
    )
    assert prepared.path != prepare(flag(path, instruction_q="Find."), cache).path
    with pytest.raises(ConfigError, match=r"x.jsonl#1: bad_row: it has 2 positives and 0 negatives, and swap needs one positive"):
        prepare(flag(path, swap=True), cache)
    jsonl(tmp_path / "x.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"]}])
    with pytest.raises(ConfigError, match="1 positives and 1 negatives"):
        prepare(flag(path, swap=True), cache)
    assert prepare(flag(path, swap=True, negatives="dropped"), cache).num_rows() == 1


def test_rows_are_read_at_random_in_any_order_also_after_travelling(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"query": f"q{i}", "pos": ["a"]} for i in range(1200)])
    prepared = pickle.loads(pickle.dumps(prepare(flag(path), str(tmp_path / "cache"))))
    wanted = np.array([1100, 3, 3, 0, 1199])
    assert [row["query"]["text"] for row in prepared.take(wanted).to_pylist()] == [f"q{i}" for i in wanted]
    assert pickle.loads(pickle.dumps(prepared)).num_rows() == 1200


def test_the_same_query_or_document_under_another_instruction_is_another_one(tmp_path):
    """Such rows were of one group, and each other's answers were no negatives: what an instruction asks for could not be learnt."""

    def chat(system, question):
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    rows = [{"a": chat(told, "red cat"), "b": "RED CAT"} for told in ("Find the colour.", "Find the animal.", "Find the colour.")]
    reader = Ref(target="pipeline.pairs.sentence_transformers:SentenceTransformers", args={"uri": jsonl(tmp_path / "x.jsonl", rows)})

    def keys(**given):
        return prepare(Dataset(name="x", reader=reader, **given), str(tmp_path / "cache")).keys().to_pydict()

    first, second, third = keys()["query_key"]
    assert first == third != second
    (plain,) = {key for own in keys()["positive_keys"] for key in own}
    (told,) = {key for own in keys(instruction_d="Passage.")["positive_keys"] for key in own}
    assert told != plain and keys(instruction_d="Passage.")["query_key"][0] == first


def test_what_was_prepared_is_found_again_until_the_source_or_a_setting_changes(tmp_path):
    path = tmp_path / "x.jsonl"
    jsonl(path, [{"query": "q", "pos": ["a"]}])
    first = prepare(flag(path), str(tmp_path / "cache"))
    assert prepare(flag(path, weight=3.0, max_rejects=0.5), str(tmp_path / "cache")).path == first.path
    assert first.open().version == 1
    assert prepare(flag(path, instruction_q="x"), str(tmp_path / "cache")).path != first.path
    jsonl(path, [{"query": "q", "pos": ["a", "b"]}])
    assert prepare(flag(path), str(tmp_path / "cache")).path != first.path


def test_a_bad_row_ends_the_job_naming_file_and_row_and_a_policy_lets_it_pass(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"query": f"q{i}", "pos": ["a"] if i != 3 else []} for i in range(10)])
    with pytest.raises(ConfigError, match=r"x.jsonl#3: no_positive: pos is empty.*max_rejects"):
        prepare(flag(path), str(tmp_path / "cache"))
    prepared = prepare(flag(path, max_rejects=0.1), str(tmp_path / "cache"))
    assert prepared.num_rows() == 9
    assert prepared.rejects().to_pylist() == [{"uri": f"{path}#3", "reason": "no_positive", "detail": "pos is empty"}]
    assert prepared.rejected() == {"no_positive": 1}


def test_rows_that_a_looser_policy_let_pass_are_refused_under_a_stricter_one(tmp_path):
    """What was prepared with bad rows was found again, whatever max_rejects had become."""
    path = jsonl(tmp_path / "x.jsonl", [{"query": f"q{i}", "pos": ["a"] if i != 3 else []} for i in range(10)])
    loose = prepare(flag(path, max_rejects=0.1), str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"1 of 10 rows are bad, more than max_rejects=0.05 allows. .*x.jsonl#3: no_positive"):
        prepare(flag(path, max_rejects=0.05), str(tmp_path / "cache"))
    assert prepare(flag(path, max_rejects=0.5), str(tmp_path / "cache")).path == loose.path


def test_a_row_without_a_negative_is_a_fault_where_one_is_required(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"]}, {"query": "q", "pos": ["a"], "neg": []}])
    assert prepare(flag(path), str(tmp_path / "cache")).num_rows() == 2
    with pytest.raises(ConfigError, match=r"x.jsonl#1: no_negative"):
        prepare(flag(path, negatives="required"), str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"x.jsonl#1: no_negative.*nothing to learn"):
        prepare(flag(path, in_batch_negatives=False), str(tmp_path / "cache"))
    dropped = prepare(flag(path, negatives="dropped"), str(tmp_path / "cache")).open().to_table()
    assert dropped["negatives"].to_pylist() == [[], []] and dropped["negative_keys"].to_pylist() == [[], []]


def test_scores_must_fit_their_documents(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [1.0], "neg_scores": [0.5]}])
    with pytest.raises(ConfigError, match=r"x.jsonl#0: scores: neg_scores has 1 numbers for 2 negatives"):
        prepare(flag(path), str(tmp_path / "cache"))


@pytest.mark.parametrize("images", ["exist", "decode", "store"])
def test_an_image_that_is_not_there_is_a_fault_of_its_row(tmp_path, images):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "empty.png").touch()
    given = [shown("a.png"), shown("gone.png"), shown("b.png", neg_image_path="gone.png"), shown("empty.png"), shown("b.png")]
    path = jsonl(tmp_path / "x.jsonl", given)
    prepared = prepare(mmeb(path, images=images, max_rejects=1.0), str(tmp_path / "cache"))
    found = [(row["uri"].rpartition("#")[2], row["reason"]) for row in prepared.rejects().to_pylist()]
    assert found == [("1", "missing"), ("2", "missing"), ("3", "bad_image")]
    kept = [row["query"]["images"][0] for row in prepared.open().to_table().to_pylist()]
    if images == "store":
        assert kept == [{"bytes": picture(0), "uri": None}, {"bytes": picture(10), "uri": None}]
    else:
        assert kept == [{"bytes": None, "uri": f"{tmp_path}/{name}.png"} for name in "ab"]


def test_a_damaged_image_is_found_where_images_are_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(picture()[:40])
    path = jsonl(tmp_path / "x.jsonl", [shown("a.png")])
    assert prepare(mmeb(path), str(tmp_path / "cache")).num_rows() == 1
    with pytest.raises(ConfigError, match=r"x.jsonl#0: bad_image: .*a.png: corrupt_image"):
        prepare(mmeb(path, images="decode"), str(tmp_path / "cache"))


def test_rows_that_are_not_wanted_are_no_faults(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"a": "x", "b": f"y{i}", "score": i / 10} for i in range(10)])
    reader = Ref(target="pipeline.pairs.sentence_transformers:SentenceTransformers", args={"uri": path, "min_score": 0.5})
    prepared = prepare(Dataset(name="sts", reader=reader), str(tmp_path / "cache"))
    assert prepared.num_rows() == 5 and prepared.rejected() == {"unwanted": 5}
    with pytest.raises(ConfigError, match="none of 10 rows"):
        prepare(Dataset(name="sts", reader=Ref(target=reader.target, args={"uri": path, "min_score": 2.0})), str(tmp_path / "cache"))


def test_what_a_reader_says_is_wrong_reaches_the_user(tmp_path):
    """Lance hid a ConfigError that was raised while it asked for rows in an error of its own."""
    corpus = jsonl(tmp_path / "corpus.jsonl", [{"docid": "a", "text": "x"}, {"docid": "a", "text": "y"}])
    path = jsonl(tmp_path / "x.jsonl", [{"query_text": "q", "positive_document_ids": ["a"]}])
    reader = Ref(target="pipeline.pairs.tevatron:Tevatron", args={"uri": path, "corpus": corpus})
    with pytest.raises(ConfigError, match="'a' more than once"):
        prepare(Dataset(name="t", reader=reader), str(tmp_path / "cache"))


def test_keys_tell_contents_apart():
    one, two = {"bytes": b"1", "uri": None}, {"bytes": None, "uri": "1"}
    messages = [text("a"), text("ab"), text("a") | {"images": [one]}, text("a") | {"images": [two]}, text("a") | {"images": [one, two]}, text("")]
    assert len({content_key(message) for message in messages}) == len(messages)
    assert hash64("a", "b") != hash64("ab") and hash64(None) != hash64("")
    assert cost_of([text("12345"), text("a") | {"images": [one, one]}], 10) == 22
