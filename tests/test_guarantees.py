"""docs/guarantees.md says what is so: its tests and faults exist, its table is what was kept, and the races come out so again."""

import ast
import datetime
import re
from pathlib import Path

import lance
import pytest

import pipeline.table.stage
from benchmarks.faults import races
from benchmarks.faults.__main__ import PROOFS
from benchmarks.faults.outcome import TESSERA
from benchmarks.faults.page import BEGIN, END, PACKAGES, PAGE, outcomes, section
from pipeline.config import Ref
from pipeline.encoders.hashing import Hashing
from pipeline.media import Limits
from pipeline.table.at import TableAt, create_dataset
from pipeline.work import ChunkWorker, Task
from schemas.vectors import vector_schema
from tests.sources import Lines
from tests.table.test_commit import at, committer, ids_in, receipt_of  # noqa: F401

ROOT = Path(__file__).parent.parent
RACES = [races.upserts, races.read_check_append, races.committed_twice, races.cleaned_up]


def test_every_row_of_the_page_names_a_test_that_exists():
    tables = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| fault ")]
    assert len(tables) > 30
    for row in tables:
        named = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", row)
        assert named, f"no test holds Tessera to this: {row[:100]}"
        for name, path in named:
            functions = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
            assert name in functions, f"{path} has no {name}"


def test_every_fault_that_the_page_names_exists():
    text = PAGE.read_text()
    commands = re.findall(r"python -m benchmarks\.faults +([a-z_]+(?: [a-z_]+)*)", text)
    named = {*re.findall(r"(?m)^\| `(\w+)`<br>", text), *(name for command in commands for name in command.split())}
    assert named == {fault.__name__ for fault in PROOFS}


def test_the_table_on_the_page_is_exactly_what_was_kept():
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == section(PROOFS), (
        "run `python -m benchmarks.faults NAME`; it writes the page"
    )


def test_every_fault_was_done_to_an_obvious_route_and_to_tessera_with_the_pinned_versions():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for fault in PROOFS:
        mine = [outcome for outcome in outcomes() if outcome["fault"] == fault.__name__]
        routes = {outcome["route"] for outcome in mine}
        assert TESSERA in routes and len(routes) > 1, f"run `python -m benchmarks.faults {fault.__name__}`"
        for outcome in mine:
            assert outcome["versions"] == {name: pinned[name] for name in PACKAGES}, f"run `python -m benchmarks.faults {fault.__name__}` again"


def test_tessera_loses_repeats_and_confuses_nothing_in_silence():
    for outcome in outcomes():
        if outcome["route"] == TESSERA and not outcome["reported_error"]:
            assert (outcome["lost"], outcome["duplicates"], outcome["wrong"]) == (0, 0, 0), outcome


@pytest.mark.parametrize("fault", RACES, ids=lambda fault: fault.__name__)
def test_races_come_out_as_the_page_says(tmp_path, fault):
    stated = [(outcome["route"], outcome["outcome"]) for outcome in outcomes() if outcome["fault"] == fault.__name__]
    assert [(outcome.route, outcome.outcome) for outcome in fault(tmp_path)] == stated


def test_the_proof_of_a_commit_outlives_the_cleanup_of_old_versions(at):  # noqa: F811
    committer(at).commit([receipt_of(at, ["a", "b"], chunk="1")])
    committer(at).commit([receipt_of(at, ["c"], chunk="2")])
    at.require().optimize.compact_files()
    at.require().cleanup_old_versions(older_than=datetime.timedelta(0))
    assert len(at.require().versions()) == 1
    again = committer(at)
    again.commit([receipt_of(at, ["a", "b"], chunk="1")])
    assert (again.counts.written, again.counts.unchanged) == (0, 2)
    assert ids_in(at) == ["a", "b", "c"]


def test_a_write_that_fails_is_told_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name}")
    reader, encoder, table = Lines(str(tmp_path / "texts")), Hashing(dim=8), TableAt(uri=str(tmp_path), name="t")
    create_dataset(table.path(), vector_schema(8, fingerprint=encoder.fingerprint), {})
    ref = Ref(target="pipeline.encoders.hashing:Hashing", args={"dim": 8})
    task = Task(reader, ref, encoder.fingerprint, table, 1, "run", Limits(), batch_size=2, threads=1, thumbnail_px=None)
    flags = [False] * 3
    worker, work = ChunkWorker(task), reader.list().append_column("changed", [flags]).append_column("duplicate", [flags])

    def full(*arguments, **settings):
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr(pipeline.table.stage, "write_fragments", full)
        failed = worker("chunk", work)
    assert "No space left" in failed.error
    assert (failed.rows, failed.listed) == (0, 3)
    committer(table).commit([failed])
    assert ids_in(table) == []
    committer(table).commit([worker("chunk", work)])
    assert ids_in(table) == ["a", "b", "c"]
    assert lance.dataset(table.path()).count_rows() == 3
