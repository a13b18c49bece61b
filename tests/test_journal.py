"""Who is accused of a hang, and who is not: each case in a process of its own, which the watchdog may end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.journal import Journal, Watchdog
from pipeline.table.at import TableAt
from pipeline.table.stage import Staging

BEGIN = """
import sys, threading, time
import pyarrow as pa
from pipeline.journal import Journal, Watchdog
from pipeline.table.at import TableAt
from pipeline.table.stage import Staging
staging, watchdog = Staging(TableAt(uri=sys.argv[1], name="t")), Watchdog()
journal = Journal(staging, "chunk", watchdog)
journal.begin()
print("begun", flush=True)
"""


def process(tmp_path, code):
    """A process that has begun a chunk and then runs `code`."""
    command = [sys.executable, "-c", BEGIN + code, str(tmp_path)]
    started = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "begun\n"
    return started


def journal_of(tmp_path):
    return Journal(Staging(TableAt(uri=str(tmp_path), name="t")), "chunk", Watchdog())


def in_flight(tmp_path):
    return json.loads(Staging(TableAt(uri=str(tmp_path), name="t")).get("attempts/chunk"))["in_flight"]


def test_an_item_is_dead_after_two_hangs_and_not_after_one(tmp_path):
    """One hang was enough: a machine that stood still for a minute made a reject for ever."""
    journal = journal_of(tmp_path)
    journal.begin()
    journal.accuse(["a"])
    journal = journal_of(tmp_path)
    journal.begin()
    assert (journal.suspects, journal.dead) == ({"a"}, frozenset())
    journal.accuse(["a"])
    journal = journal_of(tmp_path)
    journal.begin()
    assert (journal.suspects, journal.dead) == (frozenset(), {"a"})


def test_a_hang_that_is_no_items_accuses_nobody_and_its_chunk_is_given_up(tmp_path):
    for _ in range(9):
        journal = journal_of(tmp_path)
        journal.begin()
        assert not journal.suspects
        journal.accuse([])
    assert journal.hopeless


def test_a_process_that_is_stopped_for_a_while_is_not_taken_for_a_hang(tmp_path):
    """`docker pause`, a debugger or a stalled machine made the item in hand a suspect, or a reject."""
    running = process(tmp_path, "with journal.watch(['a'], 2.0): time.sleep(1.5)")
    running.send_signal(signal.SIGSTOP)
    time.sleep(4)
    running.send_signal(signal.SIGCONT)
    assert running.wait(30) == 0
    assert in_flight(tmp_path) == []


def test_work_whose_progress_is_seen_may_take_longer(tmp_path):
    """A slide that was copied slowly from a store was taken for a tile that hangs."""
    code = """
with journal.watch(['a'], 1.0) as alive:
    for _ in range(8):
        time.sleep(0.5)
        alive()
    print("copied", flush=True)
    time.sleep(3600)
"""
    running = process(tmp_path, code)
    assert running.wait(60) == 1
    assert running.stdout.read() == "copied\n"
    assert in_flight(tmp_path) == [["a"]]


def test_a_call_that_waits_for_others_has_its_time_when_its_turn_comes(tmp_path):
    """An item behind the batches of fifteen other threads was accused of the time that those took."""
    code = """
turn = threading.Lock()
def call(number):
    with journal.watch([str(number)], 1.0, shared=True), turn:
        time.sleep(3600 if number == 3 else 0.9)
threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(5)]
for thread in threads:
    thread.start()
    time.sleep(0.05)
threads[-1].join()
"""
    started = time.monotonic()
    assert process(tmp_path, code).wait(60) == 1
    assert in_flight(tmp_path) == [["3"]]
    assert 3 * 0.9 + 1.0 < time.monotonic() - started < 20


@pytest.mark.parametrize("where", ["read", "stage"])
def test_a_source_or_a_store_that_hangs_ends_the_worker_and_accuses_nobody(tmp_path, where):
    """Nobody watched them: such a run stood still for ever."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    code = f"""
import pipeline.work as work
from jobs.embed import EmbedJob
from pipeline.fill import Filling
from pipeline.prepare import prepare
from pipeline.report import EmbedReport
from tests.sources import Lines
hang = lambda *arguments: time.sleep(3600)
job = EmbedJob.model_validate({{
    "source": {{"target": "tests.sources:Lines", "args": {{"uri": sys.argv[1] + "/texts"}}}},
    "encoder": {{"target": "pipeline.encoders.hashing:Hashing", "args": {{"dim": 16}}}},
    "table": {{"uri": sys.argv[1], "name": "t"}},
    "limits": {{"item_timeout_s": 0.05}},
}})
prepared = prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=None)
filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
filling.open()
worker = work.ChunkWorker(filling.task(batch_size=16, threads=1))
if "{where}" == "read":
    Lines.read = hang
else:
    work.stage_rows = hang
chunk = prepared.plan.chunks[0]
print(prepared.run + "-" + chunk.id, flush=True)
worker(chunk.id, chunk.work)
"""
    running = process(tmp_path, code)
    name = running.stdout.readline().strip()
    assert running.wait(60) == 1
    state = json.loads(Staging(TableAt(uri=str(tmp_path), name="t")).get(f"attempts/{name}"))
    assert (state["tries"], state["in_flight"]) == (1, [[]])
