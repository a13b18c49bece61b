"""A table made by the embed job is broken in every way that is looked for; each is found, and nothing else is."""

from collections import Counter
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from pipeline.known import hash64
from pipeline.table import scan as scanning
from pipeline.table.ledger import record_run
from pipeline.table.repair import refusal
from pipeline.table.scan import scan, vector_faults
from pipeline.table.verify import verify
from tests.table.verifying import DIM, WEEK, append, changed, embed, found, mend, put, rewrite, row_of, staged_before, unit_vector, wrong

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_sound_table_has_no_findings_and_exact_facts(at, sources):
    _, facts, findings = verify(at, orphan_age=WEEK)
    assert findings == []
    assert (facts.rows, facts.ids, facts.sources) == (39, 39, {str(sources): 39})
    assert (facts.runs, facts.rejects, facts.containers, facts.staged_rows) == ({"done": 2}, {"empty": 1}, 2, 0)
    assert (facts.encoder.target, facts.encoder.dim, facts.encoder.dtype) == ("pipeline.encoders.hashing:Hashing", DIM, "float32")
    files = [path for path in Path(at.path()).rglob("*") if path.is_file() and path.name != "latest_version_hint.json"]
    assert facts.bytes.live + facts.bytes.old_versions == sum(path.stat().st_size for path in files)


def test_verifying_and_a_repair_of_a_sound_table_write_nothing(at):
    def state():
        return {str(path): path.stat().st_mtime_ns for path in Path(at.uri).rglob("*")}

    before = state()
    verify(at, orphan_age=WEEK)
    assert mend(at) == {}
    assert state() == before


def test_an_empty_table_is_noted(at):
    at.require().delete("true")
    assert found(at)["empty_table"] == 1


def test_a_duplicate_row_is_found_and_one_stays(at):
    append(at, row_of(at, "i03"))
    assert found(at) == {"duplicate_ids": 1}
    assert mend(at) == {"duplicate_ids": 1}
    assert found(at) == {}
    assert at.require().count_rows() == 39


def test_of_duplicates_the_newest_run_wins_wherever_it_stands(at):
    first, second = (row_of(at, item)["_run"][0].as_py() for item in ("i03", "a3"))
    append(at, changed(row_of(at, "i03"), _run=second, text="newer"))
    append(at, changed(row_of(at, "a3"), _run=first, text="older"))
    mend(at)
    assert [row_of(at, item)["text"][0].as_py() for item in ("i03", "a3")] == ["newer", "row 3 of a"]
    assert found(at) == {}


def test_of_duplicates_a_sound_vector_beats_a_newer_run(at):
    newer = row_of(at, "a3")["_run"][0].as_py()
    append(at, changed(row_of(at, "i03"), _run=newer, vector=[float("nan")] * DIM))
    assert found(at) == {"duplicate_ids": 1, "not_finite": 1}
    assert mend(at) == {"duplicate_ids": 1}
    assert found(at) == {}


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("not_finite", [float("nan")] + [0.1] * (DIM - 1)),
        ("not_finite", [float("inf")] + [0.1] * (DIM - 1)),
        ("not_finite", [None] + [0.1] * (DIM - 1)),
        ("zero_vectors", [0.0] * DIM),
        ("unnormalised", [0.5] * DIM),
        ("unnormalised", [1e30] * DIM),
    ],
)
def test_a_faulty_vector_is_found_and_deleted(at, code, vector):
    rewrite(at, "i03", vector=vector)
    assert found(at) == {code: 1}
    assert mend(at) == {code: 1}
    assert found(at) == {}
    assert row_of(at, "i03").num_rows == 0


@pytest.mark.parametrize(("item", "reader"), [("i03", "Lines"), ("b3", "Ledgers")])
def test_a_row_that_was_deleted_for_its_vector_comes_back(at, sources, item, reader):
    good = row_of(at, item)["vector"].to_pylist()
    rewrite(at, item, vector=[0.0] * DIM)
    mend(at)
    assert embed(sources, at, reader).written == 1
    assert row_of(at, item)["vector"].to_pylist() == good
    assert found(at) == {}


def test_a_vector_of_the_norm_that_the_embed_job_accepts_is_no_fault(at):
    rewrite(at, "i03", vector=[1.009 * number for number in unit_vector(0)])
    assert found(at) == {}


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 1.01), (np.float16, 1.0105)])
def test_faults_agree_with_a_slow_reference(dtype, largest):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 24))
    vectors *= (rng.uniform(0.98, 1.02, 400) / np.linalg.norm(vectors, axis=1))[:, None]
    vectors[::50] = 0
    vectors[1::50, 3] = np.nan
    vectors = vectors.astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 24)
    faults = vector_faults(column)
    for row, vector in enumerate(vectors.astype(np.float64)):
        norm = sum(x * x for x in vector.tolist()) ** 0.5
        if np.isnan(norm):
            expected = "not_finite"
        elif norm == 0:
            expected = "zero_vectors"
        else:
            expected = "unnormalised" if not 2 - largest <= norm <= largest else None
        assert [fault for fault, mask in faults.items() if mask[row]] == ([expected] if expected else [])


def test_counts_agree_with_a_slow_reference_on_random_duplicates(at):
    rng = np.random.default_rng(1)
    for item in rng.choice([f"i{i:02}" for i in range(1, 20)], 12):
        append(at, row_of(at, item))
    ids = at.require().to_table(columns=["id"])["id"].to_pylist()
    dataset = at.require()
    result = scan(dataset, dataset.get_fragments(), np.empty(0, np.uint64))
    assert result.duplicates == {item: count for item, count in Counter(ids).items() if count > 1}
    assert (result.rows, result.ids) == (len(ids), len(set(ids)))


def test_ids_whose_hashes_clash_are_no_duplicates(at, monkeypatch):
    monkeypatch.setattr(scanning, "hash64", lambda values: hash64(values) % np.uint64(4))
    append(at, row_of(at, "i03"))
    _, facts, findings = verify(at, orphan_age=WEEK)
    assert [(finding.code, finding.examples) for finding in findings] == [("duplicate_ids", ["i03: 2 rows"])]
    assert facts.ids == 39


def test_nulls_are_found_where_none_may_be(at):
    at.require().alter_columns({"path": "uri", "nullable": True})
    rewrite(at, "i03", uri=None)
    rewrite(at, "i04", uri=None)
    assert found(at) == {"null_values": 2}


@pytest.mark.parametrize("column", ["id", "uri", "vector", "source", "_unit", "_version", "_chunk", "_run"])
def test_a_missing_column_is_found_and_nothing_is_repaired(at, column):
    """Without `id`, `_unit`, `_chunk` or `source` verify ended in a traceback."""
    append(at, row_of(at, "i03"))
    at.require().drop_columns([column])
    put(at, staged_before(at))
    seen, facts, findings = verify(at, orphan_age=WEEK)
    assert {finding.code: finding.count for finding in findings}["missing_columns"] == 1
    assert facts.rows == 40
    assert f"lacks the columns {column}" in refusal(at, seen, 1.0)


def test_more_faulty_rows_than_allowed_are_not_deleted(at):
    for item in ("i03", "i04", "i05"):
        rewrite(at, item, vector=[0.0] * DIM)
    seen, _, _ = verify(at, orphan_age=WEEK)
    assert "max_deleted=0.05" in refusal(at, seen, 0.05)
    assert refusal(at, seen, 0.1) is None


def test_rows_of_an_unknown_run_are_found(at):
    rewrite(at, "i03", _run="nobody")
    assert found(at) == {"unknown_runs": 1}
    assert wrong(at) == {"unknown_runs"}


def test_rows_of_another_encoder_are_found(at):
    record_run(at, run="stranger", job="embed", status="done", fingerprint="f" * 32, config={}, report={})
    rewrite(at, "i03", _run="stranger")
    rewrite(at, "i04", _run="stranger")
    assert found(at) == {"mixed_fingerprints": 2}


def test_an_encoder_that_the_models_table_lacks_or_contradicts_is_found(at):
    models = lance.dataset(at.models_path)
    models.update({"dim": "17"})
    assert found(at) == {"model_dim": 1}
    models = lance.dataset(at.models_path)
    models.delete("true")
    assert found(at) == {"unknown_model": 1}


def test_vectors_of_another_length_than_the_metadata_says_are_found(at):
    at.require().update_schema_metadata({"tessera.dim": "32"})
    assert found(at) == {"vector_type": 1, "model_dim": 1}
