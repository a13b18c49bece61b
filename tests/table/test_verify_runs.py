"""Verify and repair: what a table's ledger, receipts, notes and rejects say of it."""

import json
import os
import shutil

import lance
import pytest

from pipeline.table.ledger import record_run
from pipeline.table.rejects import record_rejects
from pipeline.table.stage import Staging
from pipeline.table.verify import verify
from tests.table.verifying import (
    DIM,
    WEEK,
    age,
    append,
    changed,
    chunk_of,
    embed,
    found,
    lost,
    mend,
    put,
    reject,
    rewrite,
    row_of,
    staged,
    wrong,
)

pytestmark = pytest.mark.usefixtures("cluster")


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
