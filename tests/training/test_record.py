"""What a run tells while it goes: the journal, TensorBoard's curves, report.html, progress on stderr."""

import logging
import re
import time

import pytest

from pipeline.config import ConfigError
from pipeline.training.charts import Curve, curves, histogram, scale, smoothed, thinned
from pipeline.training.curves import FOLDER, check_tensorboard
from pipeline.training.follow import Tail, followed
from pipeline.training.journal import Journal
from pipeline.training.page import DataFacts, Facts, html_of
from pipeline.training.record import Record

SIGNS = {"cosine_positive": 0.8, "cosine_negative": 0.1, "cosine_documents": 0.2, "effective_rank": 20.0}
FACTS = Facts("a <run>", 10, 8, (DataFacts("words", 40, {"no_positive": 2}, 1.0), DataFacts("held", 12, {}, None)), {"loss": {"target": "x:Y"}})


def line(step, loss=None, **signs):
    similarities = {"positive": [0] * 35 + [4, 4, 0, 0, 0], "negative": [0] * 20 + [56] + [0] * 19}
    times = {"seconds": 0.5, "waited": 0.1, "rejects": 0}
    loss = 1 / (1 + step) if loss is None else loss
    return {"step": step, "loss": loss, "learning_rate": 0.001, "gradient_norm": 1.0, **SIGNS, **signs, "similarities": similarities, **times}


def record(folder, tensorboard=True):
    return Record(folder / "metrics.jsonl", FACTS, tensorboard=tensorboard)


@pytest.fixture
def interrupted(tmp_path):
    """A run that got to step 6, and went on at 4 with one worker instead of two."""
    first = record(tmp_path)
    first.begin(0, workers=2)
    first.held_out(0, {"recall@3": 0.1, "held/recall@3": 0.1})
    for step in range(6):
        first.step(line(step))
        if step == 3:
            first.held_out(4, {"recall@3": 0.5, "held/recall@3": 0.5})
    # The event files are left open, as a kill leaves them.
    second = record(tmp_path)
    second.begin(4, workers=1)
    for step in range(4, 10):
        second.step(line(step, 0.125))
    second.held_out(10, {"recall@3": 0.75, "held/recall@3": 0.75})
    second.close()
    return tmp_path


def test_tensorboard_shows_each_step_once_after_a_resume(interrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(interrupted / FOLDER), size_guidance={"histograms": 0, "scalars": 0})
    found.Reload()
    loss = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert loss == [(step, pytest.approx(1 / (1 + step) if step < 4 else 0.125)) for step in range(10)]
    assert [(event.step, event.value) for event in found.Scalars("held_out/recall@3")] == [(0, pytest.approx(0.1)), (4, 0.5), (10, 0.75)]
    counts = found.Histograms("similarities/negative")
    assert [event.step for event in counts] == list(range(10)) and counts[0].histogram_value.num == 56
    assert {"train/learning_rate", "train/gradient_norm", "collapse/effective_rank", "collapse/cosine_documents"} <= set(found.Tags()["scalars"])


def test_the_journal_keeps_what_happened_and_each_step_once(interrupted):
    lines = Journal(interrupted / "metrics.jsonl").lines()
    assert [each["step"] for each in lines if "loss" in each] == list(range(10))
    events = [{name: value for name, value in each.items() if name != "time"} for each in lines if "event" in each]
    assert events == [
        {"step": 0, "event": "begun", "workers": 2, "again": 0},
        {"step": 4, "event": "resumed", "workers": 1, "again": 2},
    ]


def test_the_page_shows_curves_data_and_restarts_and_loads_nothing(interrupted):
    page = (interrupted / "report.html").read_text()
    assert page.count("<svg") == 8 and "a &lt;run&gt;" in page
    assert "went on from the last checkpoint with 1 worker; 2 logged steps were done again" in page
    assert "2 no_positive" in page and "loss.target" in page and 'class="warning"' not in page
    assert "0.100 → 0.750" in page and "1.000 → 0.125" in page
    assert not re.search(r"(src|href)=|https?:(?!//www\.w3)|<script", page)


def test_the_page_says_that_vectors_collapse():
    page = html_of(FACTS, [line(0), line(1, cosine_documents=0.99, effective_rank=1.2)], status="running")
    assert page.count('class="warning"') == 2 and "effective rank is 1.2, and was 20.0" in page
    assert "No step is done yet" in html_of(FACTS, [], status="running")


def test_a_collapse_is_logged_once(tmp_path, caplog):
    run = record(tmp_path, tensorboard=False)
    run.begin(0, workers=1)
    for step, alike in enumerate((0.99, 0.95, 0.99)):
        run.step(line(step, cosine_documents=alike))
    assert [entry.getMessage().partition(":")[0] for entry in caplog.records if entry.levelno == logging.WARNING] == ["step 1"]


def test_curves_without_the_package_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tessera\[tensorboard\]'"):
        check_tensorboard()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.31, 0.87), (1e-6, 2.3e-5), (5, 5), (0, 0), (123_456, 9_876_543), (-3, -2.99)])
def test_an_axis_holds_its_values_with_a_few_round_numbers(low, high):
    first, last, ticks = scale(low, high)
    assert first <= low and last >= high and 3 <= len(ticks) <= 7
    assert max(high - low, abs(high) * 0.02) * 4 > last - first or low == high


def test_a_curve_of_many_points_keeps_its_ends_and_a_constant_stays_one_when_smoothed():
    points = [(float(step), 3.0) for step in range(5000)]
    few = thinned(points)
    assert len(few) == 400 and few[0] == points[0] and few[-1] == points[-1]
    assert all(value == pytest.approx(3.0) for _, value in smoothed(few))
    assert curves("Nothing", [Curve("none", [(0, float("nan"))])], steps=5) == ""
    drawn = curves("Loss", [Curve("a & b", points)], steps=5000, marks=(100,))
    assert "a &amp; b" in drawn and 'class="mark"' in drawn
    assert 'class="c1"' in histogram("H", [("x", [1, 2]), ("y", [2, 1])], low=-1, high=1)


def test_a_journal_is_read_as_it_grows_and_anew_once_it_is_another(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    tail = Tail(tmp_path / "metrics.jsonl", end=True)
    assert tail.lines() == []
    journal.add(line(0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    assert [each["step"] for each in tail.lines()] == [0]
    assert tail.lines() == []
    journal.begin(1)
    journal.add(line(1))
    assert [each["step"] for each in tail.lines()] == [0, 1]
    assert Tail(tmp_path / "metrics.jsonl", end=True).lines() == []


def test_progress_tells_step_loss_and_speed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.progress.LINE_EVERY_S", 0.0)
    monkeypatch.setattr("pipeline.training.follow.LOOK_EVERY_S", 0.01)
    caplog.set_level(logging.INFO, "pipeline.progress")
    with followed(tmp_path / "metrics.jsonl", steps=10, batch_size=8):
        run = record(tmp_path, tensorboard=False)
        run.begin(0, workers=1)
        run.step(line(0))
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.records[-1].getMessage().startswith("training, rows: 8 of 80, ")
    assert caplog.records[-1].getMessage().endswith("s left, step 1, loss 1.0000")
