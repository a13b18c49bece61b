"""A two-tower model by the train job on Ray Train, a worker killed on the way; then its pictures in a table, found by words."""

import json

import lance
import numpy as np
import pytest
import torch

from jobs.embed import EmbedJob
from jobs.embed import run as embed
from jobs.search import SearchJob
from jobs.search import run as search
from jobs.train import TrainJob, _task, run
from pipeline.search import Query
from pipeline.table.at import TableAt
from pipeline.training.loop import train
from tests.encoders.models import TINY_CLIP, save_open_clip
from tests.training.pairs import Folder, deadly, losses, picture_values, rows, write_pictures

STEPS = 60
BOTH = {"directions": ["query-document", "document-query"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures of two colours with words, and a small CLIP."""
    folder = tmp_path_factory.mktemp("towers")
    write_pictures(folder)
    save_open_clip(folder / "model", TINY_CLIP)
    return folder


def job(place, name, **sections):
    model = {"target": "pipeline.training.openclip:TrainOpenClip", "args": {"model": f"local-dir:{place}/model"}}
    rates, watching = {"learning_rate": 3e-3, "warmup": 0.1}, {"checkpoint_every": 4, "evaluate_every": 20, "notice_every": 10}
    return TrainJob.model_validate(picture_values(place, model, name=name, steps=STEPS, optimisation=rates, watching=watching, **sections))


@pytest.fixture(scope="module")
def killed(place, cluster):
    """A run on 2 workers, one of which is killed at step 5, once."""
    loss = deadly(5, place / "killed")
    report = run(job(place, "killed", workers={"num": 2, "max_failures": 1}, loss={**loss, "args": {**loss["args"], **BOTH}}))
    assert (place / "killed").exists()
    return report


def test_a_killed_worker_changes_nothing(place, killed):
    """The reference: the same run in this process, on one worker, uninterrupted."""
    task = _task(job(place, "whole"))
    (place / "runs" / "whole").mkdir(parents=True)
    outcome = train(task, Folder(f"{task.folder}/checkpoints"), torch.device("cpu"))
    ours, theirs = place / "runs" / "killed", place / "runs" / "whole"
    assert rows(ours) == rows(theirs)
    # Sums over another number of workers differ in their last bits, and each step of Adam makes that more.
    found = [[losses(folder)[step] for step in range(20)] for folder in (ours, theirs)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    assert killed.before == pytest.approx(outcome.before, abs=1e-6)


def test_both_directions_are_learned(killed):
    assert killed.steps == STEPS
    for name in ("words", "pictures"):
        assert killed.after[f"{name}/recall@3"] >= killed.before[f"{name}/recall@3"] + 0.25


def test_the_saved_folder_fills_a_table_that_words_search(place, killed):
    source = {"target": "pipeline.readers.jsonl:JsonLines", "args": {"uri": str(place / "held.jsonl"), "image_uri": "image", "text": "text"}}
    encoder = {"target": "pipeline.encoders.saved:open_encoder", "args": {"folder": killed.encoder}}
    table = TableAt(uri=str(place / "vectors"), name="pictures")
    report = embed(EmbedJob.model_validate({"source": source, "encoder": encoder, "table": table.model_dump(), "compute": {"cpus": 1}}))
    assert (report.written, report.rejected, report.fingerprint) == (12, 0, killed.fingerprint)
    wanted = [json.loads(line)["text"] for line in (place / "held.jsonl").read_text().splitlines()]
    hits = search(SearchJob(table=table, queries=[Query(text=text, k=3) for text in wanted])).hits
    found = np.mean([any(hit["_query"] == number and hit["text"] == text for hit in hits) for number, text in enumerate(wanted)])
    assert found == pytest.approx(killed.after["words/recall@3"])
    (model,) = lance.dataset(table.models_path).to_table().to_pylist()
    training = json.loads(model["lineage"])["training"]
    assert (training["run"], training["data"][0]["name"], training["data"][0]["rows"]) == ("killed", "train", 24)
    assert training["settings"]["model"]["target"] == "pipeline.training.openclip:TrainOpenClip"
    assert training["base"].endswith("model")
