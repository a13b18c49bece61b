"""The search job: its file is valid, its report is one JSON line, a terminal gets a table, sheets are written."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.search import SearchJob, main, run
from pipeline import config
from pipeline.config import ConfigError, Ref
from pipeline.media import to_pixels
from pipeline.search import Query
from schemas.items import encoder_schema
from tests.tables import rows_of, write, write_model

HASHING = Ref(target="pipeline.encoders.hashing:Hashing", args={"dim": 64})
TEXTS = ["a red fox in the snow", "two owls on a branch", "a fox and a hen", "a very long text " * 30]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    encoder = HASHING.build()
    items = pa.Table.from_arrays([pa.array(list("abcd")), pa.array(TEXTS), to_pixels([None] * 4)], schema=encoder_schema())
    at = write(
        tmp_path_factory.mktemp("db"), rows_of(encoder.encode(items), fingerprint=encoder.fingerprint, texts=TEXTS, thumbnails=[b"\xff\xd8"] * 4)
    )
    write_model(at, HASHING)
    return at


def arguments_of(at, *arguments):
    return ["search", f"table.uri={at.uri}", f"table.name={at.name}", *arguments]


def tessera(at, monkeypatch, *arguments):
    """Exit status of the command, run in this process: starting Python takes longer than all of it."""
    monkeypatch.setattr(sys, "argv", arguments_of(at, *arguments))
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_job_file_is_valid():
    assert config.load(SearchJob, Path("jobs/search.yaml")).query.text == "exactly once after a crash"


def test_the_command_prints_one_line_of_json_without_bytes(at):
    result = subprocess.run(
        [sys.executable, "-m", "jobs", *arguments_of(at, "query.text=a red fox in the snow", "query.k=2")], check=True, capture_output=True
    )
    report = json.loads(result.stdout)
    assert report["job"] == "search"
    assert report["queries"] == [{"text": "a red fox in the snow", "k": 2}]
    assert [hit["id"] for hit in report["hits"]] == ["item-0", "item-2"]
    assert report["hits"][0]["similarity"] == 1.0
    assert "thumbnail" not in report["hits"][0]


def test_hits_say_which_of_several_queries_they_answer(at):
    report = run(SearchJob(table=at, query=Query(id="item-0", k=1), queries=[Query(text="owls", k=1), Query(id="item-2", k=2)]))
    assert [(hit["_query"], hit["id"]) for hit in report.hits[:3]] == [(0, "item-2"), (1, "item-1"), (2, "item-0")]
    assert len(report.hits) == 4


def test_a_terminal_gets_a_table_with_long_texts_cut(at):
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments_of(at, "query.text=fox")],
        stdout=child,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        shown += data
        if not data:
            break
    assert process.wait() == 0
    os.close(parent)
    process.stderr.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).splitlines()
    assert lines[0].strip() == "text: fox"
    assert lines[1].split()[:2] == ["id", "similarity"]
    assert max(len(line) for line in lines) <= 100
    assert any("…" in line and "item-3" in line for line in lines)
    assert sum("item-" in line for line in lines) == 4


@pytest.mark.parametrize(("name", "start"), [("hits.html", b"<!doctype html>"), ("hits.png", b"\x89PNG")])
def test_a_contact_sheet_is_written(tmp_path, name, start):
    encoder = HASHING.build()
    items = pa.Table.from_arrays([pa.array(["a"]), pa.array(TEXTS[:1]), to_pixels([None])], schema=encoder_schema())
    at = write(tmp_path, rows_of(encoder.encode(items), fingerprint=encoder.fingerprint, texts=TEXTS[:1]))
    write_model(at, HASHING)
    report = run(SearchJob(table=at, queries=[Query(text="fox"), Query(id="item-0", itself=True)], sheet=str(tmp_path / name)))
    assert report.sheet == str(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query.text=fox", "query.where=lable = 1"], "No field named lable"),
        (["query.text=fox", "query.id=item-1"], "exactly one of"),
        ([], "nothing is looked for"),
        (["query.text=fox", "sheet=hits.pdf"], "must end in .html or .png"),
        (["query.text=fox", "sheet=/none/hits.html"], "there is no folder /none"),
        (["query.id=item-99"], "no such row"),
        (["query.txt=fox"], "did you mean 'text'?"),
    ],
)
def test_what_the_query_can_mend_exits_2(at, arguments, message, monkeypatch, capsys):
    assert tessera(at, monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err


def test_a_foreign_encoder_is_refused(at):
    with pytest.raises(ConfigError, match="dim was 64, is 32"):
        run(SearchJob(table=at, query=Query(text="fox"), encoder=Ref(target=HASHING.target, args={"dim": 32})))
