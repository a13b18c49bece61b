"""A table made by the embed job is broken in every way that is looked for; each is found, and nothing else is."""

import datetime
import json
import os
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest

from jobs.embed import EmbedJob, run
from pipeline.known import hash64
from pipeline.table import scan as scanning
from pipeline.table.at import TableAt
from pipeline.table.commit import Committer
from pipeline.table.contents import read_contents
from pipeline.table.ledger import now, record_run
from pipeline.table.rejects import record_rejects
from pipeline.table.repair import refusal, repair
from pipeline.table.scan import scan, vector_faults
from pipeline.table.stage import Receipt, Staged, Staging, stage_rows
from pipeline.table.verify import verify
from schemas.rejects import REJECT

pytestmark = pytest.mark.usefixtures("cluster")
WEEK = datetime.timedelta(days=7)
DIM = 16


def embed(folder, at, reader, *, sync=None):
    job = {
        "source": {"target": f"tests.sources:{reader}", "args": {"uri": str(folder)}},
        "encoder": {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": DIM}},
        "table": {"uri": at.uri, "name": at.name},
        "compute": {"cpus": 1, "chunk_rows": 8},
        "limits": {"max_rejects": 1.0},
        "sync": sync or {},
    }
    return run(EmbedJob.model_validate(job))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """20 files of text, one of them empty, and two containers of 10 rows."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(20):
        (folder / f"i{i:02}.txt").write_text(f"text number {i}" if i else "  ")
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps([[f"{name}{i}", f"row {i} of {name}"] for i in range(10)]))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, sources, cluster):
    at = TableAt(uri=str(tmp_path_factory.mktemp("made")), name="t")
    embed(sources, at, "Lines")
    embed(sources, at, "Ledgers")
    return at


@pytest.fixture
def at(tmp_path, made):
    """A copy of the table and of all that lies beside it."""
    shutil.copytree(made.uri, tmp_path / "db")
    return TableAt(uri=str(tmp_path / "db"), name="t")


def found(at):
    """Count by code."""
    return {finding.code: finding.count for finding in verify(at, orphan_age=WEEK)[2]}


def wrong(at):
    return {finding.code for finding in verify(at, orphan_age=WEEK)[2] if finding.severity == "wrong"}


def mend(at):
    """What was repaired, by code; written into the ledger as the job does."""
    seen, _, _ = verify(at, orphan_age=WEEK)
    assert refusal(at, seen, 0.5) is None
    return repair_and_record(at, seen)


def repair_and_record(at, seen):
    repaired = repair(at, seen, orphan_age=WEEK)
    if repaired:
        report = {"repaired": [done.model_dump() for done in repaired]}
        record_run(at, run="mended", job="verify", status="done", fingerprint=None, config={}, report=report)
    return {done.code: done.count for done in repaired}


def row_of(at, item):
    return at.require().to_table(filter=f"id = '{item}'").slice(0, 1)


def changed(row, **values):
    """A row with other values in some columns."""
    for name, value in values.items():
        place = row.schema.get_field_index(name)
        row = row.set_column(place, row.schema.field(name), pa.array([value], row.schema.field(name).type))
    return row


def append(at, row, suffix=""):
    lance.write_dataset(row, at.path(suffix), mode="append")


def rewrite(at, item, **values):
    row = changed(row_of(at, item), **values)
    at.require().delete(f"id = '{item}'")
    append(at, row)


def unit_vector(seed):
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).tolist()


def age(path, days):
    then = os.stat(path).st_mtime - days * 24 * 3600
    os.utime(path, (then, then))


# ---- a sound table ----


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


# ---- rows ----


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


# ---- encoder and runs ----


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


def test_open_runs_are_noted_until_a_later_run_of_their_source_is_done(at, sources):
    config = {"source": {"target": "tests.sources:Lines", "args": {"uri": str(sources)}}}
    for run_id, status in (("killed", "started"), ("unhappy", "failed")):
        record_run(at, run=run_id, job="embed", status=status, fingerprint=None, config=config, report=None)
    assert found(at) == {"unfinished_runs": 1, "failed_runs": 1}
    assert wrong(at) == set()
    embed(sources, at, "Ledgers")
    assert found(at) == {"unfinished_runs": 1, "failed_runs": 1}, "a run of another source says nothing of it"
    embed(sources, at, "Lines")
    assert found(at) == {}


# ---- planned and present ----


def lost(at):
    [finding] = [finding for finding in verify(at, orphan_age=WEEK)[2] if finding.code == "lost_rows"]
    return finding.count, finding.examples


def chunk_of(at, item):
    return row_of(at, item)["_chunk"][0].as_py()


def test_planned_chunks_are_told_apart_by_what_became_of_them(at):
    """20 files in chunks of 8, and two containers."""
    assert verify(at, orphan_age=WEEK)[1].chunks.model_dump() == {"planned": 5, "present": 5, "staged": 0, "rowless": 0, "missing": 0}
    chunk = chunk_of(at, "i03")
    rows = at.require().count_rows(f"_chunk = '{chunk}'")
    at.require().delete("id = 'i03'")
    assert lost(at) == (1, [f"chunk {chunk} of run {row_of(at, 'i04')['_run'][0].as_py()}: {rows - 1} of {rows} rows"])
    at.require().delete(f"_chunk = '{chunk}'")
    assert verify(at, orphan_age=WEEK)[1].chunks.missing == 1
    assert lost(at)[0] == rows


def test_rows_that_come_in_by_other_means_do_not_make_up_for_a_lost_chunk(at):
    chunk = chunk_of(at, "i03")
    rows = at.require().count_rows(f"_chunk = '{chunk}'")
    row = row_of(at, "a3")
    at.require().delete(f"_chunk = '{chunk}'")
    for number in range(rows):
        append(at, changed(row, id=f"x{number}"))
    assert lost(at)[0] == rows


def test_a_restored_table_has_lost_rows(at, sources):
    lance.dataset(at.path(), version=at.require().version - 1).restore()
    assert lost(at)[0] == 39 - at.require().count_rows() > 0
    embed(sources, at, "Lines")
    embed(sources, at, "Ledgers")
    assert "lost_rows" not in found(at)


def test_rows_that_a_run_or_a_repair_replaced_or_deleted_are_not_lost(at, sources, tmp_path):
    folder = tmp_path / "moving"
    shutil.copytree(sources, folder)
    (folder / "z.txt").write_text("of this folder alone")
    embed(folder, at, "Lines")
    (folder / "z.txt").unlink()
    assert embed(folder, at, "Lines", sync={"vanished": "delete", "max_vanished": 1.0}).deleted == 1
    assert "lost_rows" not in found(at)
    rewrite(at, "i03", vector=[0.0] * DIM)
    mend(at)
    assert "lost_rows" not in found(at)
    at.require().delete("id = 'i04'")
    assert lost(at)[0] == 1


def test_chunks_of_a_run_that_was_killed_are_counted_by_what_became_of_them(at, sources):
    chunk, other = chunk_of(at, "i03"), reject("x", "1")
    config = {"source": {"target": "tests.sources:Lines", "args": {"uri": str(sources)}}}
    planned = {"planned": [chunk, "late", other["_chunk"][0].as_py(), "never"]}
    put(at, staged(at, ["x1", "x2"]))
    record_rejects(at, [other])
    record_run(at, run="killed", job="embed", status="started", fingerprint=None, config=config, report=planned)
    _, facts, findings = verify(at, orphan_age=WEEK)
    assert facts.chunks.model_dump() == {"planned": 4 + 2, "present": 1 + 2, "staged": 1, "rowless": 1, "missing": 1}
    [unfinished] = [finding for finding in findings if finding.code == "unfinished_runs"]
    assert "of 4 planned chunks 1 are in the table, 1 staged, 1 missing" in unfinished.examples[0]


def test_a_ledger_of_an_older_release_names_no_chunks_and_is_no_error(at):
    runs = at.open(".runs")
    runs.update({"report": "NULL"})
    assert found(at) == {}
    assert verify(at, orphan_age=WEEK)[1].chunks.planned == 0


# ---- beside the table ----


def staged(at, ids, *, chunk="late", fingerprint=None):
    """A receipt of rows that were staged: copies of a row under other ids."""
    rows = pa.concat_tables([changed(row_of(at, "i03"), id=item, _version="9") for item in ids]).combine_chunks()
    fragments = stage_rows(rows, at, at.require())
    new = Staged(fragments, hash64(rows["id"]), hash64(rows["_version"]))
    fingerprint = fingerprint or verify(at, orphan_age=WEEK)[1].encoder.fingerprint
    return Receipt(chunk=chunk, fingerprint=fingerprint, listed=len(ids), new=new)


def staged_before(at):
    """A receipt whose rows are not looked at."""
    ids = pa.array(["x1", "x2"])
    return Receipt(chunk="late", listed=2, new=Staged([], hash64(ids), hash64(ids)))


def put(at, receipt, *, hours_old=0):
    receipt.staged_at = time.time() - hours_old * 3600
    Staging(at).put(f"receipts/{receipt.chunk}", receipt.to_bytes())


def test_staged_rows_are_noted_and_neither_orphans_nor_deleted(at):
    receipt = staged(at, ["x1", "x2"])
    put(at, receipt, hours_old=1000)
    for path in receipt.files():
        age(f"{at.path()}/data/{path}", days=30)
    assert found(at) == {"staged_receipts": 2}
    _, facts, _ = verify(at, orphan_age=WEEK)
    assert (facts.staged_rows, facts.bytes.orphaned) == (2, 0)
    assert facts.bytes.staged == sum(os.stat(f"{at.path()}/data/{path}").st_size for path in receipt.files())
    mend(at)
    assert found(at) == {"staged_receipts": 2}


def test_receipts_that_nobody_takes_over_are_deleted_when_they_are_old(at):
    committed, gone, foreign = staged(at, ["x1"], chunk="done"), staged(at, ["x2"], chunk="gone"), staged(at, ["x3"], chunk="other", fingerprint="e")
    append(at, changed(row_of(at, "i03"), id="x1", _version="9"))
    for path in gone.files():
        os.remove(f"{at.path()}/data/{path}")
    for receipt in (committed, gone, foreign):
        put(at, receipt, hours_old=0.5)
    assert found(at) == {"dead_receipts": 3}
    assert mend(at) == {}
    for receipt in (committed, gone, foreign):
        put(at, receipt, hours_old=2)
    assert mend(at) == {"dead_receipts": 3}
    assert Staging(at).receipts() == []
    assert found(at) == {"unreferenced_files": 2}, "the files of the two receipts that had any"


def test_rows_lost_behind_a_containers_back_are_found_and_come_back(at, sources):
    at.require().delete("id IN ('a3', 'a4')")
    assert found(at) == {"contradicted_notes": 1, "lost_rows": 2}
    assert wrong(at) == {"contradicted_notes", "lost_rows"}
    assert mend(at) == {"contradicted_notes": 1}
    assert found(at) == {"lost_rows": 2}
    report = embed(sources, at, "Ledgers")
    assert (report.written, report.unchanged) == (2, 18)
    assert found(at) == {}


def test_rows_that_a_sync_deleted_make_their_note_outdated_and_not_wrong(at, sources, tmp_path):
    folder = tmp_path / "moving"
    shutil.copytree(sources, folder)
    embed(folder, at, "Ledgers")  # all rows stand in the table already, from another folder
    (folder / "c.json").write_text(json.dumps([["c0", "zero"], ["c1", "one"], ["c2", "two"]]))
    embed(folder, at, "Ledgers")
    (folder / "c.json").unlink()
    assert embed(folder, at, "Ledgers", sync={"vanished": "delete", "max_vanished": 1.0}).deleted == 3
    assert found(at) == {"outdated_notes": 1}
    assert wrong(at) == set()
    assert mend(at) == {"contradicted_notes": 1}
    assert found(at) == {}


def reject(item, version, reason="empty"):
    fixed = {"uri": "u", "source": "s", "_unit": None, "stage": "decode", "detail": "", "_chunk": "c", "_run": "r"}
    return pa.Table.from_pylist([{"id": item, "_version": version, "reason": reason, **fixed}], schema=REJECT)


def test_rejects_of_rows_that_are_there_are_stale_but_not_of_duplicates_and_other_versions(at):
    version = row_of(at, "i03")["_version"][0].as_py()
    record_rejects(at, [reject("i03", version), reject("i04", "another"), reject("a1", "row 1 of a", "duplicate_id")])
    assert found(at) == {"stale_rejects": 1}
    assert mend(at) == {"stale_rejects": 1}
    assert found(at) == {}
    assert set(at.open(".rejects").to_table()["id"].to_pylist()) == {"i00", "i04", "a1"}


def test_of_several_rejects_of_an_id_the_newest_stays(at):
    for version in ("1", "2", "3"):
        append(at, reject("x", version), ".rejects")
    assert found(at) == {"duplicate_rejects": 1}
    assert mend(at) == {"duplicate_rejects": 2}
    assert found(at) == {}
    assert at.open(".rejects").to_table(filter="id = 'x'")["_version"].to_pylist() == ["3"]


# ---- files ----


def test_old_files_that_nothing_refers_to_are_deleted_and_young_ones_are_not(at):
    kept = row_of(at, "i03")
    for folder, name in (("data", "lost.lance"), ("_indices/0000", "page.lance"), ("_deletions", "9-9-9.arrow")):
        Path(f"{at.path()}/{folder}").mkdir(parents=True, exist_ok=True)
        path = Path(f"{at.path()}/{folder}/{name}")
        path.write_bytes(b"x" * 100)
        age(path, days=8)
    Path(f"{at.path()}/data/young.lance").write_bytes(b"x")
    assert found(at) == {"orphaned_files": 3, "unreferenced_files": 1}
    assert wrong(at) == set()
    assert verify(at, orphan_age=WEEK)[1].bytes.orphaned == 301
    assert mend(at) == {"orphaned_files": 3}
    assert found(at) == {"unreferenced_files": 1}
    assert row_of(at, "i03") == kept


def test_a_file_younger_than_a_run_that_has_not_ended_is_no_orphan_whatever_age_is_asked_for(at, monkeypatch):
    """A repair with orphans_older_than_days=0.01 took the files that a run of some hours had not staged yet."""
    path = Path(f"{at.path()}/data/in_hand.lance")
    path.write_bytes(b"x")
    age(path, days=0.05)
    soon = datetime.timedelta(days=0.01)
    with monkeypatch.context() as clock:
        clock.setattr("pipeline.table.ledger.now", lambda: now() - datetime.timedelta(hours=2))
        record_run(at, run="working", job="embed", status="started", fingerprint=None, config={}, report=None)
    seen, _, findings = verify(at, orphan_age=soon)
    assert {finding.code for finding in findings} == {"unfinished_runs", "unreferenced_files"}
    repair(at, seen, orphan_age=soon)
    assert path.exists()
    record_run(at, run="working", job="embed", status="done", fingerprint=None, config={}, report=None)
    seen, _, _ = verify(at, orphan_age=soon)
    repair(at, seen, orphan_age=soon)
    assert not path.exists()


def test_leftovers_of_killed_runs_are_counted_and_go_when_they_are_old(at):
    staging = Staging(at)
    staging.put("attempts/run-chunk", b"{}")
    staging.put("receipts/torn", b"not a receipt")
    lance.write_dataset(pa.table({"id": ["a"]}), f"{at.uri}/selftest-0123456789ab.lance")
    assert found(at) == {"leftovers": 3}
    assert mend(at) == {}
    assert found(at) == {"leftovers": 3}, "they may be a running job's"
    met = json.loads(staging.get("strays"))
    staging.put("strays", json.dumps(dict.fromkeys(met, time.time() - 8 * 24 * 3600)).encode())
    assert mend(at) == {"leftovers": 3}
    assert found(at) == {}


def test_files_of_older_versions_are_no_orphans(at):
    at.require().delete("id = 'i03'")
    old = lance.dataset(at.path(), version=at.require().version - 1)
    for path in Path(at.path()).rglob("*"):
        age(path, days=30)
    mend(at)
    assert old.to_table().num_rows == 39


def test_a_missing_and_a_damaged_file_are_found_the_rest_is_counted_and_nothing_is_repaired(at):
    paths = [f"{at.path()}/data/{fragment.data_files()[0].path}" for fragment in at.require().get_fragments()[:2]]
    rows = [fragment.count_rows() for fragment in at.require().get_fragments()]
    os.remove(paths[0])
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:500])
    seen, facts, findings = verify(at, orphan_age=WEEK)
    assert {finding.code: finding.count for finding in findings} == {"missing_files": 1, "unreadable_files": 1}
    assert facts.rows == sum(rows[2:])
    assert "Restore them first" in refusal(at, seen, 1.0)


def test_many_small_fragments_are_a_hint(at):
    row, before = row_of(at, "i03"), len(at.require().get_fragments())
    for number in range(101):
        append(at, changed(row, id=f"x{number}"))
    assert found(at) == {"small_fragments": 101 + before}
    assert wrong(at) == set()


def test_rows_that_an_index_lacks_are_noted_and_taken_in(at):
    lancedb.connect(at.uri).open_table(at.name).create_index("id", config=lancedb.index.BTree())
    assert found(at) == {}
    append(at, changed(row_of(at, "i03"), id="x"))
    assert found(at) == {"unindexed_rows": 1}
    assert mend(at) == {"unindexed_rows": 1}
    assert found(at) == {}


def test_where_no_file_seems_to_belong_to_the_table_none_is_judged_or_deleted(at):
    """As of a shallow clone. If Lance ever names a table's folder otherwise than it was opened by, all of its files look like orphans."""
    at.require().shallow_clone(at.path("_clone"), at.require().version)
    clone = TableAt(uri=at.uri, name="t_clone")
    (Path(clone.path()) / "data").mkdir(exist_ok=True)
    kept = Path(clone.path()) / "data" / "kept.lance"
    kept.write_bytes(b"x")
    age(kept, days=30)
    assert found(clone)["unknown_files"] == 1
    mend(clone)
    assert kept.exists()
    assert clone.require().to_table().num_rows == 39


# ---- beside other writers ----


def test_two_repairs_at_once_delete_what_one_would(at):
    for item in ("i03", "i04", "i05"):
        append(at, row_of(at, item))
    for item in ("i06", "i07"):
        rewrite(at, item, vector=[0.0] * DIM)
    record_rejects(at, [reject("i08", row_of(at, "i08")["_version"][0].as_py())])
    for number in range(20):
        path = Path(f"{at.path()}/data/lost{number}.lance")
        path.write_bytes(b"x")
        age(path, days=8)
    seen, _, _ = verify(at, orphan_age=WEEK)
    with ThreadPoolExecutor(2) as pool:
        done = [Counter({step.code: step.count for step in steps}) for steps in pool.map(lambda _: repair(at, seen, orphan_age=WEEK), range(2))]
    assert done[0]["duplicate_ids"] + done[1]["duplicate_ids"] == 3
    assert done[0]["zero_vectors"] + done[1]["zero_vectors"] == 2
    # Rows that are to be made again, as the ledger was not told; and files of the commits that were refused.
    assert set(found(at)) - {"unreferenced_files"} == {"lost_rows"}
    assert at.require().count_rows() == 39 - 2


def test_a_repair_racing_with_a_writer_loses_nothing(at):
    """While duplicates and faulty rows are mended, another job brings in new rows, and new versions of some of these rows."""
    items = [f"i{i:02}" for i in range(1, 20)]
    for item in items[:6]:
        append(at, row_of(at, item))
    for item in items[6:12]:
        rewrite(at, item, vector=[0.0] * DIM)
    good = changed(row_of(at, "a3"), _unit=None)

    def receipt(number, ids, *, is_changed):
        rows = pa.concat_tables([changed(good, id=item, _version="new", _chunk=f"w{number}") for item in ids]).combine_chunks()
        part = Staged(stage_rows(rows, at, at.require()), hash64(rows["id"]), hash64(rows["_version"]))
        return Receipt(chunk=f"w{number}", listed=len(ids), new=Staged() if is_changed else part, changed=part if is_changed else Staged())

    source = row_of(at, "i03")["source"][0].as_py()
    committer = Committer(at, Staging(at), read_contents(at, at.require(), source=source))
    replaced = items[4:8]
    receipts = [receipt(number, [f"n{number}"], is_changed=False) for number in range(8)]
    receipts += [receipt(10 + number, [item], is_changed=True) for number, item in enumerate(replaced)]
    seen, _, _ = verify(at, orphan_age=WEEK)
    writer = threading.Thread(target=lambda: [committer.commit([entry]) for entry in receipts])
    writer.start()
    done = repair_and_record(at, seen)
    writer.join()
    rows = at.require().to_table(columns=["id", "_version"]).to_pylist()
    versions = {row["id"]: row["_version"] for row in rows}
    assert len(rows) == len(versions)
    assert set(versions) >= {f"n{number}" for number in range(8)} | set(items[:8]) | set(items[12:])
    assert {versions[item] for item in replaced} == {"new"}
    assert done["zero_vectors"] >= 4, "those that the writer did not replace"
    assert wrong(at) == set()
