"""Rows that cannot be trained on, by the train job from the file to the report: told by file and row, or counted; never filled up with dummies."""

import json

import pytest

from jobs.train import TrainJob, run
from pipeline.config import ConfigError
from pipeline.training.journal import Journal
from tests.training.pairs import job_values, write_pairs
from tests.vlm.models import save_model

SHOWN = {"qry": "<|image_1|> what?", "qry_image_path": "0.png", "pos_text": "A CAT", "pos_image_path": ""}
BAD = {
    "empty": SHOWN | {"qry": "  ", "qry_image_path": ""},
    "markers": SHOWN | {"qry": "<|image_1|> or <|image_2|>?"},
    "missing": SHOWN | {"qry_image_path": "gone.png"},
    "no_positive": SHOWN | {"pos_text": ""},
    "bad_row": SHOWN | {"neg_text": "['a dog', 'a cow']", "neg_image_path": "['', '']"},
}
GOOD, DAMAGED = 40, "damaged.png"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One file with 40 good rows, a row of each kind of BAD, and one whose image is damaged; one whose rows must have negatives; a model."""
    folder = tmp_path_factory.mktemp("bad")
    write_pairs(folder, num=GOOD)
    (folder / DAMAGED).write_bytes((folder / "0.png").read_bytes()[:60])
    with (folder / "train.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in (*BAD.values(), SHOWN | {"qry_image_path": DAMAGED}))
    hard = [{"query": f"number {i}", "pos": [f"NUMBER {i}"], "neg": ["NONE"] if i != 5 else []} for i in range(9)]
    (folder / "hard.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in hard))
    save_model(folder / "model", "qwen2_vl")
    return folder


def job(place, name, *, max_rejects, **sections):
    values = job_values(place, place / "model", name=name, steps=12, **sections)
    words = values["data"][0] | {"max_rejects": max_rejects}
    hard = {"reader": {"target": "pipeline.pairs.flag:Flag", "args": {"uri": str(place / "hard.jsonl")}}, "negatives": "required"}
    hard |= {"name": "hard", "max_rejects": max_rejects}
    return TrainJob.model_validate(values | {"data": [words, hard], "held_out": []})


def test_bad_rows_are_counted_by_reason_and_no_row_stands_in_for_them(place, cluster):
    report = run(job(place, "counted", max_rejects=0.2, choice={"bad_image": "drop"}, workers={"num": 2}))
    assert report.status == "done"
    assert report.rejects == {"words": dict.fromkeys(BAD, 1), "hard": {"no_negative": 1}}
    # The damaged image is found when it is used: `images: exist` opens none before.
    assert report.data == {"words": GOOD + 1, "hard": 8}
    lines = [line for line in Journal(place / "runs" / "counted" / "metrics.jsonl").lines() if "loss" in line]
    drawn = {key for line in lines for key in line["rows"]}
    assert len(drawn) == GOOD + 1 + 8, "in 12 batches of 8 each good row comes, and the damaged one"
    assert lines[-1]["rejects"] == report.dropped >= 1
    assert report.rows == 12 * 8 - report.dropped


@pytest.mark.parametrize(("reason", "row"), [(reason, GOOD + number) for number, reason in enumerate(BAD)])
def test_without_a_policy_the_first_bad_row_ends_the_job_and_is_named(place, reason, row):
    lines = (place / "train.jsonl").read_text().splitlines()
    own = place / reason
    own.mkdir()
    for path in place.glob("*.png"):
        (own / path.name).symlink_to(path)
    (own / "train.jsonl").write_text("".join(f"{lines[number]}\n" for number in (*range(GOOD), row)))
    values = job_values(own, place / "model", name=reason) | {"held_out": []}
    with pytest.raises(ConfigError, match=rf"{reason}/train\.jsonl#{GOOD}: {reason}: .*max_rejects"):
        run(TrainJob.model_validate(values))
    assert not (own / "runs").exists()


def test_a_row_without_a_negative_where_one_is_required_ends_the_job(place):
    given = job(place, "hard", max_rejects=0)
    with pytest.raises(ConfigError, match=r"hard\.jsonl#5: no_negative: .*negatives: required"):
        run(given.model_copy(update={"data": given.data[1:]}))


def test_a_damaged_image_ends_the_run_naming_its_row_where_it_may_not_be_dropped(place, cluster):
    with pytest.raises(ConfigError, match=rf"train\.jsonl#{GOOD + len(BAD)}.*{DAMAGED}"):
        run(job(place, "damaged", max_rejects=0.2, workers={"max_failures": 0}))
