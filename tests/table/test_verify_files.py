"""Verify and repair: the files of a table, its indices, and several repairs at once."""

import datetime
import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import lancedb
import pyarrow as pa
import pytest

from pipeline.known import hash64
from pipeline.table.at import TableAt
from pipeline.table.commit import Committer
from pipeline.table.contents import read_contents
from pipeline.table.ledger import now, record_run
from pipeline.table.rejects import record_rejects
from pipeline.table.repair import refusal, repair
from pipeline.table.stage import Receipt, Staged, Staging, stage_rows
from pipeline.table.verify import verify
from tests.table.verifying import (
    DIM,
    WEEK,
    age,
    append,
    changed,
    found,
    mend,
    reject,
    repair_and_record,
    rewrite,
    row_of,
    wrong,
)

pytestmark = pytest.mark.usefixtures("cluster")


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
