"""Indices: the kind fits the size, a rerun changes nothing, new rows are taken in, other jobs may write meanwhile."""

import functools
import threading

import lance
import lancedb
import numpy as np
import pytest
from lance.commit import CommitConflictError

from pipeline.config import ConfigError, JobFailed
from pipeline.index import MAX_SEGMENTS, IndexSettings, Step, _commit, build, choose_kind, plan
from tests.tables import clustered, rows_of, write


@pytest.fixture
def at(tmp_path):
    return write(tmp_path, rows_of(clustered(3000)))


def kinds(at):
    return {index.name: index.index_type for index in lancedb.connect(at.uri).open_table(at.name).list_indices()}


def add(at, count, start):
    write(at.uri, rows_of(clustered(count, seed=start), start=start))


@pytest.mark.parametrize(
    ("rows", "dim", "kind"),
    [(0, 64, "exact"), (49_999, 64, "exact"), (50_000, 64, "ivf_rq"), (10**8, 64, "ivf_rq"), (10**7, 30, "ivf_hnsw_sq")],
)
def test_auto_chooses_by_size(rows, dim, kind):
    assert choose_kind(rows, dim, IndexSettings())[0] == kind


def test_a_small_table_gets_no_vector_index_and_the_report_says_why(at):
    report = build(at, IndexSettings())
    assert (report.kind, report.rows, report.indexed_rows, report.unindexed_rows, report.done) == ("exact", 3000, 0, 3000, [])
    assert "fewer than exact_below=50000" in report.reason


@pytest.mark.parametrize(("kind", "name"), [("ivf_hnsw_sq", "IvfHnswSq"), ("ivf_rq", "IvfRq"), ("ivf_pq", "IvfPq")])
def test_a_forced_kind_is_built_over_every_row(at, kind, name):
    report = build(at, IndexSettings(kind=kind))
    assert kinds(at) == {"vector_idx": name}
    assert (report.indexed_rows, report.unindexed_rows) == (3000, 0)
    assert report.bytes > 3000 * 8
    assert lance.dataset(at.path()).stats.index_stats("vector_idx")["indices"][0]["metric_type"] == "cosine"


def test_a_rerun_adds_no_version(at):
    settings = IndexSettings(kind="ivf_rq", scalar=["id", "label"], text=["text"], with_position=True)
    first = build(at, settings)
    again = build(at, settings)
    assert len(first.done) == 4
    assert again.done == []
    assert again.version == first.version == at.require().version


def test_filters_get_bitmaps_for_few_values_and_b_trees_for_many(at):
    build(at, IndexSettings(scalar=["id", "label", "year"]))
    assert kinds(at) == {"id_idx": "BTree", "label_idx": "Bitmap", "year_idx": "BTree"}
    plan_text = at.require().scanner(filter="id = 'item-7'", columns=["id"]).explain_plan()
    assert "ScalarIndexQuery" in plan_text


def test_new_rows_are_taken_into_every_index_without_rewriting_data(at):
    settings = IndexSettings(kind="ivf_rq", scalar=["id", "label"], text=["text"])
    build(at, settings)
    add(at, 200, 3000)
    before = [fragment.fragment_id for fragment in at.require().get_fragments()]
    report = build(at, settings)
    assert {state.name: state.unindexed_rows for state in report.indices} == {"vector_idx": 0, "id_idx": 0, "label_idx": 0, "text_text_idx": 0}
    assert all(step.startswith("extend") for step in report.done)
    assert [fragment.fragment_id for fragment in at.require().get_fragments()] == before
    # A B-tree extended by pylance must stay visible to lancedb, whose core is older.
    table = lancedb.connect(at.uri).open_table(at.name)
    assert "ScalarIndexQuery" in table.search().where("id = 'item-3100'").select(["id"]).explain_plan()
    assert table.search().where("id = 'item-3100'").select(["id"]).to_list() == [{"id": "item-3100"}]


def test_segments_are_merged_when_there_are_many(at):
    settings = IndexSettings(kind="ivf_rq")
    build(at, settings)
    for round_ in range(MAX_SEGMENTS):
        add(at, 30, 3000 + 30 * round_)
        report = build(at, settings)
    assert report.done[0].startswith("merge")
    assert (report.indices[0].segments, report.unindexed_rows) == (1, 0)
    assert build(at, settings).done == []


def test_another_kind_replaces_and_exact_drops(at):
    build(at, IndexSettings(kind="ivf_rq"))
    replaced = build(at, IndexSettings(kind="ivf_hnsw_sq"))
    assert kinds(at) == {"vector_idx": "IvfHnswSq"}
    assert replaced.done[0].startswith("replace vector_idx")
    dropped = build(at, IndexSettings(kind="exact"))
    assert kinds(at) == {}
    assert dropped.done[0].startswith("drop vector_idx")


def test_an_index_of_the_wrong_kind_under_another_name_is_dropped(at):
    table = lancedb.connect(at.uri).open_table(at.name)
    table.create_index("vector", config=lancedb.index.IvfPq(distance_type="cosine"), name="by_hand")
    build(at, IndexSettings(kind="ivf_rq"))
    assert kinds(at) == {"vector_idx": "IvfRq"}


def test_an_index_of_another_metric_is_replaced(at):
    lancedb.connect(at.uri).open_table(at.name).create_index("vector", config=lancedb.index.IvfRq(distance_type="l2"))
    assert build(at, IndexSettings(kind="ivf_rq")).done[0].startswith("replace")
    assert lance.dataset(at.path()).stats.index_stats("vector_idx")["indices"][0]["metric_type"] == "cosine"


def test_another_tokenizer_replaces_the_full_text_index(at):
    build(at, IndexSettings(text=["text"]))
    report = build(at, IndexSettings(text=["text"], tokenizer="icu"))
    assert report.done[0].startswith("replace text_text_idx")
    assert build(at, IndexSettings(text=["text"], tokenizer="icu")).done == []


def test_a_column_may_have_both_a_full_text_and_a_scalar_index(at):
    build(at, IndexSettings(text=["text"], scalar=["text"]))
    assert kinds(at) == {"text_idx": "BTree", "text_text_idx": "FTS"}
    assert build(at, IndexSettings(text=["text"], scalar=["text"])).done == []


def test_deleted_rows_do_not_make_work(at):
    build(at, IndexSettings(kind="ivf_rq", scalar=["id"]))
    at.require().delete("year < 100")
    assert build(at, IndexSettings(kind="ivf_rq", scalar=["id"])).done == []


def test_equal_vectors_do_not_make_a_rerun_train_anew(tmp_path):
    at = write(tmp_path, rows_of(np.repeat(clustered(3), 700, axis=0)))
    build(at, IndexSettings(kind="ivf_rq"))
    assert build(at, IndexSettings(kind="ivf_rq")).done == []


def test_float16_vectors_are_indexed(tmp_path):
    at = write(tmp_path, rows_of(clustered(2000), dtype="float16"))
    assert build(at, IndexSettings(kind="ivf_rq")).indexed_rows == 2000


@pytest.mark.parametrize("rows", [0, 100])
def test_too_few_rows_to_train_are_searched_exactly(tmp_path, rows):
    at = write(tmp_path, rows_of(clustered(rows or 1)).slice(0, rows))
    report = build(at, IndexSettings(kind="ivf_pq", scalar=["id", "label"], text=["text"]))
    assert report.kind == "exact"
    assert "too few to train ivf_pq" in report.reason
    assert build(at, IndexSettings(kind="ivf_pq", scalar=["id", "label"], text=["text"])).done == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scalar": ["lable"]}, "did you mean 'label'"),
        ({"text": ["txt"]}, "did you mean 'text'"),
        ({"text": ["year"]}, "holds int64; a full-text index needs strings"),
        ({"scalar": ["vector"]}, "which filters cannot compare"),
        ({"scalar": ["thumbnail"]}, "which filters cannot compare"),
    ],
)
def test_wrong_columns_are_refused_before_anything_is_built(at, settings, message):
    version = at.require().version
    with pytest.raises(ConfigError, match=message):
        build(at, IndexSettings(kind="ivf_rq", **settings))
    assert at.require().version == version


def test_ivf_rq_of_an_odd_length_is_refused(tmp_path):
    at = write(tmp_path, rows_of(clustered(300, dim=30)))
    with pytest.raises(ConfigError, match="divides by 8"):
        build(at, IndexSettings(kind="ivf_rq"))


def test_a_plan_changes_nothing(at):
    version = at.require().version
    steps = [str(step) for step in plan(at, IndexSettings(kind="ivf_rq", scalar=["id"])).steps]
    assert steps == ["build vector_idx (IvfRq): the job asks for it", "build id_idx (BTree): filters name it"]
    assert at.require().version == version


def test_a_commit_that_lost_a_race_is_tried_again(at):
    """A compaction between reading and committing makes lancedb raise a RuntimeError that says `commit conflict`."""
    add(at, 500, 3000)
    stale = lancedb.connect(at.uri).open_table(at.name)
    at.require().optimize.compact_files(target_rows_per_fragment=100_000)
    handles = [stale]

    def change():
        table = handles.pop() if handles else lancedb.connect(at.uri).open_table(at.name)
        table.create_index("vector", config=lancedb.index.IvfRq(distance_type="cosine"), name="vector_idx")

    _commit(Step("build", "vector_idx", "a test"), change)
    assert handles == []
    assert kinds(at) == {"vector_idx": "IvfRq"}


def test_an_index_is_built_while_another_writer_commits(at):
    """Merge commits, as the embed job makes them: neither side may lose, or wait for the other to end."""
    ended, commits = threading.Event(), []

    def write_on():
        while not ended.is_set():
            dataset = at.require()
            rows = rows_of(clustered(20, seed=len(commits)), start=3000 + 20 * len(commits))
            new = lance.fragment.write_fragments(rows, at.path(), schema=dataset.schema, mode="append", data_storage_version="2.2")
            kept = [fragment.metadata for fragment in dataset.get_fragments()]
            try:
                lance.LanceDataset.commit(at.path(), lance.LanceOperation.Merge([*kept, *new], dataset.lance_schema), read_version=dataset.version)
            except CommitConflictError:
                continue
            commits.append(len(rows))

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        for kind in ("ivf_hnsw_sq", "ivf_rq"):
            report = build(at, IndexSettings(kind=kind, scalar=["id", "label"]))
    finally:
        ended.set()
        writer.join()
    assert len(commits) > 3
    assert report.indexed_rows >= 3000
    assert at.require().count_rows() == 3000 + sum(commits)
    build(at, IndexSettings(kind="ivf_rq"))
    assert build(at, IndexSettings(kind="ivf_rq")).unindexed_rows == 0


def test_a_race_that_is_always_lost_fails_and_other_errors_pass_through(at, monkeypatch):
    monkeypatch.setattr("pipeline.index.time.sleep", lambda seconds: None)
    step = Step("build", "vector_idx", "a test")
    tries = []

    def fail(text):
        tries.append(text)
        raise RuntimeError(text)

    with pytest.raises(JobFailed, match="run this again"):
        _commit(step, functools.partial(fail, "lance error: Retryable commit conflict for version 6"))
    assert len(tries) == 5
    with pytest.raises(RuntimeError, match="disk full"):
        _commit(step, functools.partial(fail, "disk full"))
    assert len(tries) == 6
