"""What is seen of the data before weights are loaded."""

import pydantic
import pytest

from jobs.train import TrainJob, _task
from pipeline.config import ConfigError, Ref
from pipeline.pairs.prepare import Dataset, prepare
from pipeline.training.batches import Choice
from pipeline.training.scan import check_negatives, overlaps
from pipeline.training.sentence import TrainSentence
from tests.encoders.models import save_bert
from tests.pairs.writing import jsonl, picture
from tests.training.pairs import job_values, write_pairs

MMEB = "pipeline.pairs.mmeb:Mmeb"


def prepared(folder, name, rows, **given):
    reader = Ref(target=MMEB, args={"uri": jsonl(folder / f"{name}.jsonl", rows)})
    return prepare(Dataset(name=name, reader=reader, **given), str(folder / "cache"))


def test_a_row_that_the_model_cannot_take_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    """A text encoder met an image at the step that drew its row, which may be the last; where bad images are dropped, so were such rows."""
    write_pairs(tmp_path, num=0)
    texts = [{"qry": f"word {row}", "pos_text": "WORD"} for row in range(40)]
    (tmp_path / "0.png").write_bytes(picture())
    jsonl(tmp_path / "train.jsonl", [*texts, {"qry": "<|image_1|> what?", "qry_image_path": "0.png", "pos_text": "A CAT"}])
    model = {"target": "pipeline.training.sentence:TrainSentence", "args": {"model": str(save_bert(tmp_path / "bert")), "query_prompt": None}}
    values = job_values(tmp_path, "", model=model) | {"held_out": []}
    monkeypatch.setattr(TrainSentence, "load", None)
    with pytest.raises(ConfigError, match=r"train.jsonl#40: a sentence encoder takes texts, and this row has an image"):
        _task(TrainJob.model_validate(values | {"choice": {"bad_image": "drop"}}))
    jsonl(tmp_path / "train.jsonl", texts)
    _task(TrainJob.model_validate(values))


def test_kinds_are_those_of_all_messages_with_the_first_row_of_each(tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    image = {"qry": "<|image_1|>", "qry_image_path": "0.png", "pos_text": "a", "neg_text": "b"}
    rows = [{"qry": "a", "pos_text": "<|image_1|> b", "pos_image_path": "0.png"}, image, image]
    data = prepared(tmp_path, "x", rows, instruction_q="Find.")
    uri = f"{tmp_path}/x.jsonl#"
    assert data.kinds() == {
        "query told text": f"{uri}0",
        "document text image": f"{uri}0",
        "query told image": f"{uri}1",
        "document text": f"{uri}1",
    }


def test_held_out_rows_that_are_trained_on_are_counted_over_all_data_sets(tmp_path, caplog):
    one = prepared(tmp_path, "one", [{"qry": f"q{row}", "pos_text": f"d{row}"} for row in range(4)])
    two = prepared(tmp_path, "two", [{"qry": f"d{row}", "pos_text": f"q{row}"} for row in range(4, 6)])
    held = prepared(tmp_path, "held", [{"qry": f"q{row}", "pos_text": f"d{row % 2}"} for row in (0, 5, 6)])
    clean = prepared(tmp_path, "clean", [{"qry": "new", "pos_text": "NEW"}])
    assert overlaps([one, two], [held, clean]) == {"held": {"queries": 2, "documents": 2}}
    assert "2 of 3 held-out queries of held are trained on too" in caplog.text and "clean" not in caplog.text
    assert overlaps([one], []) == {}


def test_rows_that_would_have_nothing_to_be_compared_with_are_refused_before_work_starts(tmp_path):
    data = prepared(tmp_path, "x", [{"qry": "q", "pos_text": "d", "neg_text": "n"}], in_batch_negatives=False)
    check_negatives(Choice(max_negatives=1), [data])
    with pytest.raises(ConfigError, match="max_negatives=0 leaves 1 rows of 'x' nothing"):
        check_negatives(Choice(max_negatives=0), [data])
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 0"):
        Choice(max_negatives=-1)
