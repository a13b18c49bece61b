"""The table of models: what an encoder is, and the run that made it."""

import json

from pipeline.config import Ref
from pipeline.encoders.hashing import Hashing
from pipeline.table.at import TableAt, model_of
from pipeline.table.ledger import record_model
from pipeline.vlm.card import Card, DataSource

REF = Ref(target="pipeline.encoders.hashing:Hashing", args={"dim": 64})


def test_a_model_row_names_the_run_that_made_the_encoder_once_and_no_secrets(tmp_path):
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    encoder = Hashing(dim=64)
    settings = {"data": [{"storage_options": {"secret_key": "hidden"}}]}
    encoder.training = Card(name="run-3", base="org/base", data=(DataSource(name="pairs", rows=9),), settings=settings).training()
    record_model(at, encoder, REF, run="embed-1")
    record_model(at, Hashing(dim=64), REF, run="embed-2")
    row = model_of(at, encoder.fingerprint)
    lineage = json.loads(row["lineage"])
    training = lineage.pop("training")
    assert row["run"] == "embed-1" and lineage == encoder.lineage
    assert (training["run"], training["base"], training["data"][0]["rows"]) == ("run-3", "org/base", 9)
    assert "hidden" not in row["lineage"]


def test_an_encoder_that_nobody_trained_has_its_lineage_alone(tmp_path):
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    record_model(at, Hashing(dim=64), REF, run="embed-1")
    assert json.loads(model_of(at, Hashing(dim=64).fingerprint)["lineage"]) == Hashing(dim=64).lineage
    assert Card(name="x", base="y").training() == {}
