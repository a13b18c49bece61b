"""Commits race in threads and processes; the table must come out as if they had taken turns."""

import dataclasses
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import lance
import numpy as np
import pyarrow as pa
import pytest

from pipeline.known import Contents, Known, hash64
from pipeline.plan import plan
from pipeline.table import swap
from pipeline.table.at import TableAt, create_dataset
from pipeline.table.commit import Committer
from pipeline.table.contents import read_contents
from pipeline.table.rejects import record_rejects
from pipeline.table.stage import Receipt, Staged, Staging, Unproved, read_staged, stage_rows
from pipeline.table.swap import EngineRefused, self_test
from schemas.items import LISTING
from schemas.rejects import REJECT
from schemas.vectors import vector_schema

SCHEMA = vector_schema(4, fingerprint="test")


def rows_of(ids, *, version="1", chunk="c"):
    n = len(ids)
    vectors = np.random.default_rng(len(ids)).normal(size=(n, 4)).astype(np.float32)
    made = {"id": ids, "uri": ids, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4), "source": ["s"] * n}
    made |= {"_version": [version] * n, "_chunk": [chunk] * n, "_run": ["r"] * n}
    columns = [pa.array(made[f.name], f.type) if f.name in made else pa.nulls(n, f.type) for f in SCHEMA]
    return pa.table(columns, schema=SCHEMA)


def receipt_of(at, ids, *, version="1", chunk="c", changed=()):
    def staged(some):
        rows = rows_of(some, version=version, chunk=chunk)
        return Staged(stage_rows(rows, at, at.require()), hash64(rows["id"]), hash64(rows["_version"])) if some else Staged()

    return Receipt(chunk=chunk, listed=len(ids), new=staged([i for i in ids if i not in changed]), changed=staged(list(changed)))


@pytest.fixture
def at(tmp_path):
    table = TableAt(uri=str(tmp_path), name="t")
    create_dataset(table.path(), SCHEMA, {})
    return table


def committer(at):
    dataset = at.require()
    return Committer(at, Staging(at), read_contents(at, dataset, source="s"))


def ids_in(at):
    return sorted(at.require().to_table(columns=["id"])["id"].to_pylist())


def test_rows_arrive_once(at):
    one = committer(at)
    one.commit([receipt_of(at, ["a", "b"], chunk="1"), receipt_of(at, ["c"], chunk="2")])
    assert ids_in(at) == ["a", "b", "c"]
    assert (one.counts.written, one.counts.replaced, one.counts.commits) == (3, 0, 1)


def test_a_receipt_committed_twice_adds_nothing(at):
    receipt = receipt_of(at, ["a", "b"])
    committer(at).commit([receipt])
    again = committer(at)
    again.commit([receipt])
    assert ids_in(at) == ["a", "b"]
    assert (again.counts.written, again.counts.unchanged) == (0, 2)


def test_what_another_job_wrote_meanwhile_is_not_written_again(at):
    mine, theirs = committer(at), committer(at)
    theirs.commit([receipt_of(at, ["b", "c"], chunk="theirs")])
    mine.commit([receipt_of(at, ["a", "b"], chunk="mine")])
    assert ids_in(at) == ["a", "b", "c"]
    assert (mine.counts.written, mine.counts.overtaken) == (1, 1)
    assert mine.alone(at.require().version)


def test_who_is_alone_is_told_by_the_versions_since_the_first_commit(at):
    """Another run's delete after our last commit was not noticed, and made a false alarm of lost rows."""
    mine = committer(at)
    assert mine.alone(at.require().version)
    mine.commit([receipt_of(at, ["a"], chunk="1")])
    mine.commit([receipt_of(at, ["b"], chunk="2")])
    assert mine.delete(["nobody"]) == 0
    assert mine.alone(at.require().version)
    committer(at).delete(["a"])
    assert not mine.alone(at.require().version)
    mine.commit([receipt_of(at, ["c"], chunk="3")])
    assert not mine.alone(at.require().version)


def test_a_changed_row_takes_the_place_of_the_old_one(at):
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    before = at.require().version
    second = committer(at)
    second.commit([receipt_of(at, ["a", "n"], version="2", chunk="2", changed=["a"])])
    assert ids_in(at) == ["a", "b", "n"]
    assert at.require().version == before + 2  # one for the new item, one in which the changed one takes its old row's place
    assert at.require().to_table(filter="id = 'a'")["_version"].to_pylist() == ["2"]
    assert (second.counts.written, second.counts.replaced) == (1, 1)


def test_two_jobs_that_replace_the_same_row_leave_one(at):
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    first, second = committer(at), committer(at)
    first.commit([receipt_of(at, ["a"], version="2", chunk="2", changed=["a"])])
    second.commit([receipt_of(at, ["a"], version="2", chunk="3", changed=["a"])])
    assert ids_in(at) == ["a", "b"]
    assert second.counts.unchanged == 1


def test_compaction_between_plan_and_commit_does_not_hide_a_change(at):
    committer(at).commit([receipt_of(at, ["a"], chunk="1"), receipt_of(at, ["b"], chunk="2")])
    late = committer(at)
    at.require().optimize.compact_files()
    late.commit([receipt_of(at, ["a"], version="2", chunk="3", changed=["a"])])
    assert at.require().to_table(filter="id = 'a'")["_version"].to_pylist() == ["2"]
    assert ids_in(at) == ["a", "b"]


def test_a_fragment_whose_rows_are_all_replaced_goes(at):
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    committer(at).commit([receipt_of(at, ["a", "b"], version="2", chunk="2", changed=["a", "b"])])
    assert ids_in(at) == ["a", "b"]
    assert len(at.require().get_fragments()) == 1


def test_rows_that_replace_several_whole_fragments_can_be_committed(at):
    """Lance refuses a Merge that leaves fewer fragments than before."""
    first = committer(at)
    for i in range(4):
        first.commit([receipt_of(at, [f"a{i}", f"b{i}"], chunk=str(i))])
    everything = ids_in(at)
    second = committer(at)
    second.commit([receipt_of(at, everything, version="2", chunk="all", changed=everything)])
    assert ids_in(at) == everything
    assert set(at.require().to_table()["_version"].to_pylist()) == {"2"}
    assert (second.counts.replaced, second.counts.written) == (8, 0)


def test_deleting_every_row_leaves_an_empty_table(at):
    one = committer(at)
    one.commit([receipt_of(at, ["a", "b"], chunk="1"), receipt_of(at, ["c"], chunk="2")])
    assert one.delete(["a", "b", "c"]) == 3
    assert ids_in(at) == []
    committer(at).commit([receipt_of(at, ["a"], chunk="3")])
    assert ids_in(at) == ["a"]


def test_an_id_twice_in_one_run_is_a_reject(at):
    one = committer(at)
    one.commit([receipt_of(at, ["a", "b"], chunk="1")])
    one.commit([receipt_of(at, ["b", "c"], version="2", chunk="2", changed=["b"])])
    assert ids_in(at) == ["a", "b", "c"]
    assert at.require().to_table(filter="id = 'b'")["_version"].to_pylist() == ["1"]
    assert one.reasons == {"duplicate_id": 1}
    assert at.open(".rejects").to_table().select(["id", "reason"]).to_pylist() == [{"id": "b", "reason": "duplicate_id"}]


def test_an_id_of_another_source_is_a_reject_unless_it_is_the_same_item(at):
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    other = Committer(at, Staging(at), read_contents(at, at.require(), source="elsewhere"))
    a_again, b_other = receipt_of(at, ["a"], chunk="2"), receipt_of(at, ["b"], version="9", chunk="3")
    other.commit([a_again, b_other])
    assert ids_in(at) == ["a", "b"]
    assert (other.counts.unchanged, other.counts.rejected) == (1, 1)


@pytest.fixture
def twins(monkeypatch):
    """`twin` has the hash of `a`."""
    real = hash64

    def clashing(values):
        return real(pa.array(["a" if value == "twin" else value for value in values.to_pylist()], pa.string()))

    for module in ("pipeline.plan", "pipeline.table.commit", "pipeline.table.contents", "tests.table.test_commit"):
        monkeypatch.setattr(f"{module}.hash64", clashing)


class Listed:
    source, metadata = "s", None

    def __init__(self, *items):
        self.items = items

    def list(self):
        ids, versions = zip(*self.items, strict=True)
        return pa.table([ids, versions, [1] * len(ids), ids], schema=LISTING)


def planned(at, *items):
    contents = read_contents(at, at.require(), source="s")
    return plan(Listed(*items), contents, fingerprint="test", notes={}, chunk_rows=None, retry_rejects=False)


def test_an_id_with_the_hash_of_another_comes_in_and_neither_takes_the_place_of_the_other(at, twins):
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    todo = planned(at, ("a", "1"), ("b", "1"), ("twin", "2"))
    assert (todo.unchanged, todo.changed, len(todo.vanished_ids)) == (2, 1, 0), "it looks changed"
    one = committer(at)
    one.commit([receipt_of(at, ["twin"], version="2", chunk="2", changed=["twin"])])
    rows = at.require().to_table(columns=["id", "_version"]).to_pylist()
    assert {row["id"]: row["_version"] for row in rows} == {"a": "1", "b": "1", "twin": "2"} and len(rows) == 3
    again = planned(at, ("a", "1"), ("b", "1"), ("twin", "2"))
    assert (again.unchanged, again.changed) == (2, 1), "one of the two is embedded on every run"
    committer(at).delete(["twin"])
    assert ids_in(at) == ["a", "b"]


def test_of_two_new_ids_with_one_hash_one_is_a_reject_and_the_counts_add_up(at, twins):
    one = committer(at)
    one.commit([receipt_of(at, ["a"], chunk="1"), receipt_of(at, ["twin"], version="2", chunk="2")])
    assert ids_in(at) == ["a"]
    assert (one.counts.written, one.counts.rejected) == (1, 1)
    assert [(row["id"], row["reason"]) for row in at.open(".rejects").to_table().to_pylist()] == [("twin", "duplicate_id")]


def test_an_item_that_is_there_is_never_taken_for_vanished_because_its_twin_is_gone(at, twins):
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    committer(at).commit([receipt_of(at, ["twin"], version="2", chunk="2", changed=["twin"])])
    assert len(planned(at, ("twin", "2"), ("b", "1")).vanished_ids) == 0


def test_many_threads_with_overlapping_work_leave_each_row_once(at):
    def work(seed):
        rng = np.random.default_rng(seed)
        mine = committer(at)
        for step in range(4):
            ids = sorted({f"i{n}" for n in rng.integers(0, 60, size=20)})
            mine.commit([receipt_of(at, ids, chunk=f"{seed}-{step}")])
        return mine.counts.written

    with ThreadPoolExecutor(6) as pool:
        written = sum(pool.map(work, range(6)))
    ids = ids_in(at)
    assert len(ids) == len(set(ids)) == written


def _commit_range(uri, start):
    at = TableAt(uri=uri, name="t")
    mine = committer(at)
    for step in range(start, start + 5):
        mine.commit([receipt_of(at, [f"i{n}" for n in range(step * 10, step * 10 + 10)], chunk=str(step))])


def test_processes_that_commit_at_once_lose_and_repeat_nothing(at):
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_commit_range, args=(at.uri, start)) for start in (0, 3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert ids_in(at) == sorted(f"i{n}" for n in range(80))


def test_rejects_are_kept_one_an_id(at):
    def reject(version, reason):
        row = {"id": "a", "uri": "u", "source": "s", "_version": version, "stage": "decode", "reason": reason, "_chunk": "c", "_run": "r"}
        return pa.Table.from_pylist([row], schema=REJECT)

    record_rejects(at, [reject("1", "empty"), reject("1", "empty")])
    version = at.open(".rejects").version
    record_rejects(at, [reject("1", "empty")])
    assert at.open(".rejects").version == version
    record_rejects(at, [reject("2", "corrupt_image")])
    assert [(r["_version"], r["reason"]) for r in at.open(".rejects").to_table().to_pylist()] == [("2", "corrupt_image")]


def test_a_store_that_gives_back_other_bytes_is_found_out(at, monkeypatch):
    monkeypatch.setattr("pipeline.table.stage.read_staged", lambda *arguments: read_staged(*arguments).slice(1))
    with pytest.raises(Unproved, match="read back"):
        stage_rows(rows_of(["a", "b"]), at, at.require())


def test_an_engine_that_accepts_a_stale_commit_is_refused(at, monkeypatch):
    real = swap.insert
    monkeypatch.setattr(swap, "insert", lambda dataset, fragments, options: real(lance.dataset(dataset.uri), fragments, options))
    with pytest.raises(EngineRefused, match="stale commit"):
        self_test(at)


def test_the_installed_engine_passes_and_leaves_nothing_behind(at, tmp_path):
    self_test(at)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.lance"]


def test_a_receipt_survives_its_bytes(at):
    receipt = receipt_of(at, ["a", "b"], changed=["a"])
    receipt.seen = np.array([7], np.uint64)
    copy = Receipt.from_bytes(receipt.to_bytes())
    for name in receipt.__dataclass_fields__:
        mine, theirs = getattr(receipt, name), getattr(copy, name)
        assert mine.equals(theirs) if isinstance(mine, pa.Table) else repr(mine) == repr(theirs), name


def test_contents_tell_sources_apart(at):
    committer(at).commit([receipt_of(at, ["a"])])
    mine = read_contents(at, at.require(), source="s")
    theirs = read_contents(at, at.require(), source="other")
    assert (len(mine.own), len(mine.others)) == (1, 0)
    assert (len(theirs.own), len(theirs.others)) == (0, 1)
    empty = dataclasses.replace(mine, own=Known())
    assert isinstance(empty, Contents)
