"""Containers over several runs of the embed job: what cannot be read, changes its settings, or holds an id that another one holds too.

The workers run in this process: what is tested is what a run plans, commits and notes, not Ray.
"""

import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embed import EmbedJob
from pipeline.fill import Filling
from pipeline.prepare import prepare
from pipeline.report import EmbedReport
from pipeline.table.at import TableAt
from pipeline.work import ChunkWorker

READERS = {"Parquet": "pipeline.readers.parquet:Parquet", "WebDataset": "pipeline.readers.webdataset:WebDataset", "Lines": "tests.sources:Lines"}


def job_of(tmp_path, source, *, name="Parquet", sync=None, encoder="pipeline.encoders.hashing:Hashing", **args):
    """`vanished` rows are deleted, however many they are."""
    columns = {"id": "id", "text": "text"} if name == "Parquet" else {}
    return EmbedJob.model_validate(
        {
            "source": {"target": READERS[name], "args": {"uri": str(source), **columns, **args}},
            "encoder": {"target": encoder, "args": {"dim": 16}},
            "table": {"uri": str(tmp_path / "db"), "name": "t"},
            "limits": {"max_rejects": 1.0},
            "sync": {"vanished": "delete", "max_vanished": 1.0, **(sync or {})},
        }
    )


def planned(job):
    return prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=None)


def embed(tmp_path, source, *, order=list, **settings):
    """A run's report. `order`: of the chunks."""
    job = job_of(tmp_path, source, **settings)
    prepared = planned(job)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    filling.adopt(filling.take_over(None))
    if prepared.plan.chunks:
        worker = ChunkWorker(filling.task(batch_size=16, threads=1))
        filling.take((worker(chunk.id, chunk.work) for chunk in order(prepared.plan.chunks)), workers=1)
    filling.finish()
    report = filling.close()
    assert report.listed == report.unchanged + report.written + report.replaced + report.rejected + report.failed
    assert not report.errors
    return report


def reads(tmp_path, source, **settings):
    """The containers that a further run would read."""
    return sorted(unit.rpartition("/")[2] for unit in planned(job_of(tmp_path, source, **settings)).plan.units)


def parquet(path, texts):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": list(texts), "text": list(texts.values())}), path)


def texts(tmp_path):
    rows = TableAt(uri=str(tmp_path / "db"), name="t").require().to_table(columns=["id", "text"]).to_pylist()
    assert len(rows) == len({row["id"] for row in rows}), "an id stands twice"
    return {row["id"]: row["text"] for row in rows}


def rejects(tmp_path):
    dataset = TableAt(uri=str(tmp_path / "db"), name="t").open(".rejects")
    return {row["id"]: row["reason"] for row in dataset.to_table().to_pylist()} if dataset else {}


def reasons(tmp_path):
    return sorted(rejects(tmp_path).values())


def test_a_container_that_cannot_be_opened_for_a_moment_keeps_its_rows(tmp_path):
    """They used to be deleted as vanished; and as its version was noted, it was not read again when it could be."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {f"a{i}": f"text {i}" for i in range(10)})
    parquet(source / "b.parquet", {"b0": "another"})
    assert embed(tmp_path, source).written == 11
    parquet(source / "a.parquet", {f"a{i}": f"text {i}" for i in range(1, 12)})
    content, times = (source / "a.parquet").read_bytes(), (source / "a.parquet").stat()
    (source / "a.parquet").write_bytes(bytes(len(content)))
    os.utime(source / "a.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        report = embed(tmp_path, source)
        assert (report.rejected, report.deleted, report.unread) == (1, 0, 1)
        assert reasons(tmp_path) == ["unreadable"] and len(texts(tmp_path)) == 11
    (source / "a.parquet").write_bytes(content)
    os.utime(source / "a.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    report = embed(tmp_path, source)
    assert (report.written, report.unchanged, report.deleted, report.unread) == (2, 10, 1, 0)
    assert set(texts(tmp_path)) == {f"a{i}" for i in range(1, 12)} | {"b0"} and rejects(tmp_path) == {}
    assert reads(tmp_path, source) == []


def test_a_container_that_can_be_opened_only_after_the_plan_is_not_taken_for_one_row(tmp_path):
    """Its first row was embedded, the others were left out for good, without a word."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {f"a{i}": f"text {i}" for i in range(10)})
    content, times = (source / "a.parquet").read_bytes(), (source / "a.parquet").stat()
    (source / "a.parquet").write_bytes(bytes(len(content)))
    os.utime(source / "a.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    prepared = planned(job_of(tmp_path, source))
    (source / "a.parquet").write_bytes(content)
    os.utime(source / "a.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    [chunk] = prepared.plan.chunks
    [found] = prepared.reader.read(chunk.work)
    assert found["reject_reason"].to_pylist() == ["unreadable"]


def test_a_tar_that_is_cut_in_the_middle_keeps_the_rest_of_its_rows(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w") as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"{number:03}.txt")
            info.size = 6
            tar.addfile(info, io.BytesIO(b"text%02d" % number))
    whole = (source / "a.tar").read_bytes()
    assert embed(tmp_path, source, name="WebDataset").written == 20
    (source / "a.tar").write_bytes(whole[: 10 * 1024 + 100])
    report = embed(tmp_path, source, name="WebDataset")
    assert (report.unchanged, report.rejected, report.deleted, report.unread) == (9, 1, 0, 1)  # the last one may lack a member
    assert len(texts(tmp_path)) == 20 and reasons(tmp_path) == ["unreadable"]
    (source / "a.tar").write_bytes(whole)
    report = embed(tmp_path, source, name="WebDataset")
    assert (report.unchanged, report.written, report.rejected, report.unread) == (20, 0, 0, 0)
    assert rejects(tmp_path) == {}


def test_while_a_container_cannot_be_read_rows_of_one_that_is_gone_may_have_moved_into_it(tmp_path):
    source = tmp_path / "source"
    parquet(source / "a.parquet", {"a0": "nought", "a1": "one"})
    assert embed(tmp_path, source).written == 2
    (source / "a.parquet").unlink()
    (source / "b.parquet").write_bytes(b"upload still under way")
    assert embed(tmp_path, source).deleted == 0
    parquet(source / "b.parquet", {"a1": "one"})
    report = embed(tmp_path, source)
    assert (report.unchanged, report.deleted, texts(tmp_path)) == (1, 1, {"a1": "one"})


def test_an_item_that_is_still_listed_and_now_bad_keeps_its_row(tmp_path):
    """It was not among the items that were met, and its row was deleted as vanished."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {"a0": "nought", "a1": "one"})
    assert embed(tmp_path, source).written == 2
    parquet(source / "a.parquet", {"a0": "nought", "a1": " "})
    for _ in range(2):
        report = embed(tmp_path, source)
        assert (report.unchanged, report.rejected, report.deleted) == (1, 1, 0)
        assert texts(tmp_path) == {"a0": "nought", "a1": "one"} and rejects(tmp_path) == {"a1": "empty"}
    parquet(source / "a.parquet", {"a0": "nought"})
    assert (embed(tmp_path, source).deleted, rejects(tmp_path)) == (1, {})


def test_another_column_is_read_again_and_only_what_has_changed_is_embedded(tmp_path):
    """Containers passed for complete: every vector stayed that of the old column."""
    source = tmp_path / "source"
    source.mkdir()
    rows = {"id": ["a", "b"], "title": ["same", "title"], "caption": ["same", "caption"], "v": [1, 1]}
    pq.write_table(pa.table(rows), source / "a.parquet")
    assert embed(tmp_path, source, text="title").written == 2
    assert reads(tmp_path, source, text="title", storage_options={"anon": True}) == []
    report = embed(tmp_path, source, text="caption")
    assert (report.unchanged, report.replaced, texts(tmp_path)) == (1, 1, {"a": "same", "b": "caption"})
    embed(tmp_path, source, text="caption", version="v")
    assert embed(tmp_path, source, text="title", version="v").replaced == 2 and texts(tmp_path) == {"a": "same", "b": "title"}


def test_what_was_staged_for_other_settings_is_not_adopted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table({"id": ["a"], "title": ["title"], "caption": ["caption"]}), source / "a.parquet")
    job = job_of(tmp_path, source, text="title")
    prepared = planned(job)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    [chunk] = prepared.plan.chunks
    assert ChunkWorker(filling.task(batch_size=16, threads=1))(chunk.id, chunk.work).error is None
    report = embed(tmp_path, source, text="caption")
    assert (report.adopted, report.written, texts(tmp_path)) == (0, 1, {"a": "caption"})


def test_of_an_id_in_two_containers_the_first_stays_whichever_is_touched(tmp_path):
    """When the second was written anew, its item replaced the first one's row; the next run replaced it back, and so on."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {"x": "first", "a": "one"})
    parquet(source / "b.parquet", {"x": "second", "b": "two", "y": "three"})
    parquet(source / "c.parquet", {"y": "three"})
    first = {"x": "first", "a": "one", "b": "two", "y": "three"}
    report = embed(tmp_path, source)
    assert (report.written, report.rejected, texts(tmp_path), reads(tmp_path, source)) == (4, 2, first, [])
    for name in ("b", "c", "a", "b"):
        os.utime(source / f"{name}.parquet", ns=(1, 1 + int(os.stat(source / f"{name}.parquet").st_mtime_ns)))
        report = embed(tmp_path, source)
        assert (report.written, report.replaced, report.rejected, report.deleted) == (0, 0, 2, 0)
        assert (texts(tmp_path), reads(tmp_path, source)) == (first, [])
    parquet(source / "a.parquet", {"a": "one"})
    assert embed(tmp_path, source).replaced == 1  # by the second one's, which is now the first
    assert (texts(tmp_path), reads(tmp_path, source)) == (first | {"x": "second"}, [])
    assert rejects(tmp_path) == {"y": "duplicate_id"}


def test_of_an_id_in_two_containers_the_first_stays_whichever_is_read_first(tmp_path):
    """With a commit between the two, the second one's item replaced the first one's row: all containers written anew were enough."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {"x": "first", "a": "one"})
    parquet(source / "b.parquet", {"x": "second", "b": "two"})
    expected = {"x": "first", "a": "one", "b": "two"}
    for order in (list, lambda chunks: chunks[::-1]):
        for name in ("a", "b"):
            os.utime(source / f"{name}.parquet", ns=(1, 1 + int(os.stat(source / f"{name}.parquet").st_mtime_ns)))
        report = embed(tmp_path, source, order=order, sync={"commit_every_s": 0})
        assert (report.replaced, report.rejected, texts(tmp_path)) == (0, 1, expected)
    parquet(source / "a.parquet", {"a": "changed"})
    report = embed(tmp_path, source, sync={"commit_every_s": 0})
    assert (report.replaced, texts(tmp_path), rejects(tmp_path)) == (2, {"x": "second", "a": "changed", "b": "two"}, {})


def test_rows_that_have_moved_to_another_container_are_read_once(tmp_path):
    """No container added up any more, so that every run read all of them again."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {f"a{i}": f"text {i}" for i in range(10)})
    parquet(source / "b.parquet", {"b": "two", "bad": " "})
    embed(tmp_path, source)
    (source / "a.parquet").unlink()
    parquet(source / "c.parquet", {f"a{i}": f"text {i}" for i in range(5)})
    parquet(source / "d.parquet", {f"a{i}": f"text {i}" for i in range(5, 10)})
    report = embed(tmp_path, source)
    assert (report.unchanged, report.rejected, report.deleted) == (11, 1, 0)
    assert reads(tmp_path, source) == []
    report = embed(tmp_path, source)
    assert (report.listed, report.unchanged, report.rejected, report.vanished, len(texts(tmp_path))) == (12, 11, 1, 0, 11)
    (source / "b.parquet").unlink()
    assert (embed(tmp_path, source).deleted, reads(tmp_path, source)) == (1, [])
    parquet(source / "e.parquet", {"e": "new"})
    assert reads(tmp_path, source) == ["c.parquet", "d.parquet", "e.parquet"]
    report = embed(tmp_path, source)
    assert (report.written, report.unchanged, report.deleted, reads(tmp_path, source)) == (1, 10, 0, [])
    TableAt(uri=str(tmp_path / "db"), name="t").require().delete("id = 'a3'")
    assert (embed(tmp_path, source).written, len(texts(tmp_path))) == (1, 11)


def test_a_container_is_not_taken_for_complete_because_it_has_as_many_rows(tmp_path):
    """Where rows changed places between containers, the counts added up: those of the next one that went were deleted, and not read again."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {"a": "one", "x": "two"})
    parquet(source / "b.parquet", {"b": "three", "y": "four"})
    embed(tmp_path, source)
    parquet(source / "a.parquet", {"a": "one", "y": "four"})
    parquet(source / "b.parquet", {"b": "three", "x": "two"})
    assert (embed(tmp_path, source).unchanged, reads(tmp_path, source)) == (4, [])
    (source / "b.parquet").unlink()
    assert embed(tmp_path, source).deleted == 2
    assert texts(tmp_path) == {"a": "one", "y": "four"}


def test_an_item_that_two_containers_have_alike_stays_as_long_as_one_has_it(tmp_path):
    """It went with the container that its row named: the other one was noted as complete, and not read."""
    source = tmp_path / "source"
    parquet(source / "a.parquet", {"a": "one", "x": "two"})
    parquet(source / "b.parquet", {"b": "three"})
    parquet(source / "c.parquet", {"bad": " "})
    embed(tmp_path, source)
    parquet(source / "a.parquet", {"x": "two", "a": "one"})
    parquet(source / "b.parquet", {"b": "three", "x": "two"})
    report = embed(tmp_path, source)
    assert (report.unchanged, report.rejected, reads(tmp_path, source)) == (3, 2, [])
    (source / "a.parquet").unlink()
    assert embed(tmp_path, source).deleted == 1
    assert texts(tmp_path) == {"x": "two", "b": "three"}


def test_of_an_id_in_three_containers_the_last_one_has_its_row(tmp_path):
    """Only one of the duplicates was on record, and the other was not read when its turn had come; another source's took its record, too."""
    source, other = tmp_path / "source", tmp_path / "other"
    for name in ("a", "b", "c"):
        parquet(source / f"{name}.parquet", {"x": f"{name}'s", name: name})
    parquet(other / "d.parquet", {"d": "d"})
    embed(tmp_path, source)
    embed(tmp_path, other)
    parquet(other / "d.parquet", {"x": "d's", "d": "d"})
    embed(tmp_path, other)
    for text in ("a's", "b's", "c's"):
        assert texts(tmp_path)["x"] == text
        parquet(source / f"{text[0]}.parquet", {text[0]: text[0]})
        embed(tmp_path, source)
    embed(tmp_path, other)
    assert texts(tmp_path) == {"a": "a", "b": "b", "c": "c", "d": "d", "x": "d's"} and rejects(tmp_path) == {}
    assert (reads(tmp_path, source), reads(tmp_path, other)) == ([], [])


def test_an_id_of_another_source_is_a_duplicate_before_it_is_embedded(tmp_path):
    """It was encoded on every run, to be rejected at the commit."""
    for name, text in (("one", "first"), ("two", "second")):
        parquet(tmp_path / name / "a.parquet", {"x": text, name: name})
    embed(tmp_path, tmp_path / "one")
    report = embed(tmp_path, tmp_path / "two")
    assert (report.written, report.rejected, rejects(tmp_path)) == (1, 1, {"x": "duplicate_id"})
    assert reads(tmp_path, tmp_path / "two") == []
    assert texts(tmp_path) == {"x": "first", "one": "one", "two": "two"}


def test_a_file_whose_id_another_source_has_is_a_reject_that_costs_nothing(tmp_path):
    """Every run started the workers for it, and encoded it."""
    for name, text in (("one", "first"), ("two", "second raise")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
    embed(tmp_path, tmp_path / "one", name="Lines")
    report = embed(tmp_path, tmp_path / "two", name="Lines", encoder="tests.sources:Faulty")
    assert (report.written, report.rejected, rejects(tmp_path)) == (0, 1, {"x": "duplicate_id"})
    again = planned(job_of(tmp_path, tmp_path / "two", name="Lines"))
    assert (again.plan.chunks, again.plan.rejected, again.plan.listed) == ([], 1, 1)
    (tmp_path / "two/y.txt").write_text("another")
    report = embed(tmp_path, tmp_path / "two", name="Lines")
    assert (report.written, report.rejected, texts(tmp_path)) == (1, 1, {"x": "first", "y": "another"})
    (tmp_path / "one/x.txt").unlink()
    (tmp_path / "one/z.txt").write_text("so that it is not empty")
    embed(tmp_path, tmp_path / "one", name="Lines")
    report = embed(tmp_path, tmp_path / "two", name="Lines")
    assert (report.written, report.unchanged, texts(tmp_path)["x"]) == (1, 1, "second raise")
