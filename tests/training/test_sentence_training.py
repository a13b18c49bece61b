"""TrainSentence on a small random BERT: what a step does, what is saved, and that a run goes on."""

import json

import numpy as np
import pytest
import torch

from jobs.train import TrainJob, _task
from pipeline.config import ConfigError
from pipeline.encoders.saved import open_encoder
from pipeline.encoders.sentence import Sentence
from pipeline.testing import check_encoder
from pipeline.training.batches import Told
from pipeline.training.chunks import Rows
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE
from pipeline.training.loop import train
from pipeline.training.sentence import TrainSentence
from pipeline.vlm.card import Card, DataSource
from pipeline.vlm.message import Message
from tests.encoders.models import items_of, save_bert, save_sentence_transformer
from tests.training.pairs import Folder, Stopped, losses

CPU = torch.device("cpu")
CARD = Card(name="words-1", base="tiny", data=(DataSource(name="words"),))
TEXTS = ["a cat", "the dog sleeps on the red house . " * 5, "x", "blue house", "a query", "runs", "", "the"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def folder(bert, tmp_path_factory):
    """A folder of sentence-transformers' with two poolings, a dense layer, and prompts that are left out of the pooling."""
    place = tmp_path_factory.mktemp("st") / "model"
    prompts = {"query": "search for : ", "document": "the document : "}
    save_sentence_transformer(place, bert, ["mean", "cls"], dense=(24,), include_prompt=False, prompts=prompts, normalise=True)
    return place


def loaded(name, **settings):
    model = TrainSentence(str(name), **settings)
    model.load(CPU)
    return model


def without_dropout(model):
    for part in model.modules:
        part.eval()
    return model


def rows(model):
    sides = (TEXTS[:4], True), (TEXTS[4:], False)
    return [[model.prepare(Told(Message(text), ""), query=query) for text in texts] for texts, query in sides]


def theirs(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def test_a_step_is_that_of_plain_torch(folder):
    model = without_dropout(loaded(folder, gradient_checkpointing=True))
    loss = GradCache(model.embed, InfoNCE(0.1), model.modules, Rows(3)).step(*rows(model))
    reference = theirs(folder).eval()
    sides = []
    for prompt, texts in (("search for : ", TEXTS[:4]), ("the document : ", TEXTS[4:])):
        features = reference.preprocess(texts, prompt=prompt)
        sides.append(torch.nn.functional.normalize(reference(features)["sentence_embedding"], dim=1))
    wanted = torch.nn.functional.cross_entropy(sides[0] @ sides[1].T / 0.1, torch.arange(4))
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    expected = dict(reference[0].auto_model.named_parameters())
    found = {name: value for name, value in model.modules[0].named_parameters() if value.grad is not None}
    assert len(found) > 20
    for name, value in found.items():
        torch.testing.assert_close(value.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")
    torch.testing.assert_close(model.modules[1][0][0].weight.grad, reference[2].linear.weight.grad, rtol=1e-3, atol=1e-6)


def test_a_rows_own_instruction_comes_before_the_models_prompt(folder):
    model = loaded(folder)
    own = model.prepare(Told(Message("a cat"), "passage : "), query=True)
    assert own.tokens == {name: values[0] for name, values in model._loaded().tokenise(["passage : a cat"]).items()}
    assert own.skipped == model._loaded().prompt_tokens("passage : ") != 0
    mixed = [own, *rows(model)[0]]
    with torch.no_grad():
        together = without_dropout(model).embed(mixed)
        alone = torch.cat([model.embed([row]) for row in mixed])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 2, "modules": ["query", "value"]}}], ids=["whole", "lora"])
def test_the_saved_folder_is_an_encoder_and_sentence_transformers_loads_it(folder, settings, tmp_path):
    torch.manual_seed(0)
    model = loaded(folder, query_prompt="a query : ", max_tokens=12, **settings)
    for part in model.modules:
        with torch.no_grad():
            for weights in part.parameters():
                weights.add_(0.05 * torch.randn_like(weights) * weights.requires_grad)
    fingerprint = model.save(tmp_path / "encoder", CARD)
    encoder = open_encoder(str(tmp_path / "encoder"))
    assert encoder.fingerprint == fingerprint == Sentence(str(tmp_path / "encoder")).fingerprint != Sentence(str(folder)).fingerprint
    assert encoder.training["run"] == "words-1"
    check_encoder(encoder, items_of(TEXTS))
    other = theirs(tmp_path / "encoder")
    queries = encoder.for_queries().encode(items_of(TEXTS))
    np.testing.assert_allclose(queries, other.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(items_of(TEXTS)), other.encode_document(TEXTS), atol=1e-5)
    with torch.no_grad():
        ours = without_dropout(model).embed([model.prepare(Told(Message(text), ""), query=True) for text in TEXTS])
    np.testing.assert_allclose(torch.nn.functional.normalize(ours, dim=1).numpy(), queries, atol=1e-5)
    assert np.abs(queries - Sentence(str(folder), query_prompt="a query : ").for_queries().encode(items_of(TEXTS))).max() > 1e-3


def test_the_instruction_that_all_rows_were_trained_under_is_saved_as_the_prompt(folder, tmp_path):
    """The encoder was trained and measured with the rows' instruction, and opened without it."""
    model = loaded(folder, query_prompt="a query : ")
    told = {"query": ("passage : ",), "document": ("the document : ", "")}
    model.save(tmp_path / "encoder", CARD.model_copy(update={"instructions": told}))
    encoder = open_encoder(str(tmp_path / "encoder"))
    with torch.no_grad():
        ours = without_dropout(model).embed([model.prepare(Told(Message(text), "passage : "), query=True) for text in TEXTS])
    vectors = torch.nn.functional.normalize(ours, dim=1).numpy()
    np.testing.assert_allclose(vectors, encoder.for_queries().encode(items_of(TEXTS)), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(items_of(TEXTS)), Sentence(str(folder)).encode(items_of(TEXTS)), atol=1e-5)
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "| document | the document :  |" in card and "| document | the encoder's own |" in card and "| query | passage" not in card


def test_a_plain_transformers_folder_becomes_one_of_sentence_transformers(bert, tmp_path):
    model = loaded(bert, query_prompt="query : ")
    model.save(tmp_path / "encoder", CARD)
    encoder, other = open_encoder(str(tmp_path / "encoder")), theirs(tmp_path / "encoder")
    np.testing.assert_allclose(encoder.for_queries().encode(items_of(TEXTS)), other.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(items_of(TEXTS)), Sentence(str(bert)).encode(items_of(TEXTS)), atol=1e-5)


def test_parts_are_trained_and_wrong_settings_are_told(folder):
    model = loaded(folder, parts=[r"^dense", r"layer\.1\."])
    trained = {name for part in model.modules for name, value in part.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith(("0.0.", "encoder.layer.1.")) for name in trained)
    with pytest.raises(ConfigError, match=r"found in no weight's name; the model's begin with transformer.embeddings, .*dense"):
        loaded(folder, parts=["nowhere"])
    with pytest.raises(ConfigError, match=r"lora\.modules=.*nowhere"):
        loaded(folder, lora={"modules": ["nowhere"]})
    with pytest.raises(ConfigError, match=r"lora\.rnak"):
        TrainSentence(str(folder), lora={"rnak": 2})
    with pytest.raises(ConfigError, match="give one of the two"):
        TrainSentence(str(folder), lora={}, parts=["x"])
    with pytest.raises(ConfigError, match="max_tokens=999 must lie between"):
        TrainSentence(str(folder), max_tokens=999)
    with pytest.raises(ConfigError, match=r"x\.jsonl#7: .*this row has an image"):
        model.prepare(Told(Message("", (np.zeros((2, 2, 3), np.uint8),)), "", "x.jsonl#7"), query=True)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(folder, tmp_path):
    words = ["a cat", "the dog", "red house", "blue house", "a query", "passage", "runs", "sleeps"]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"a": word, "b": word.upper()}) + "\n" for word in words * 2))
    reader = {"target": "pipeline.pairs.sentence_transformers:SentenceTransformers", "args": {"uri": str(tmp_path / "words.jsonl")}}

    def task(name):
        values = {
            "run": {"name": name, "folder": str(tmp_path / "runs"), "prepared": str(tmp_path / "prepared")},
            "model": {"target": "pipeline.training.sentence:TrainSentence", "args": {"model": str(folder)}},
            "data": [{"name": "words", "reader": reader}],
            "mixture": {"batch_size": 4},
            "optimisation": {"steps": 4, "chunk": 3},
            "watching": {"log_every": 1, "checkpoint_every": 2},
        }
        (tmp_path / "runs" / name).mkdir(parents=True)
        return _task(TrainJob.model_validate(values))

    whole, stopped = task("whole"), task("stopped")
    train(whole, Folder(f"{whole.folder}/checkpoints"), CPU)
    with pytest.raises(Stopped):
        train(stopped, Folder(f"{stopped.folder}/checkpoints", stop_after=2), CPU)
    train(stopped, Folder(f"{stopped.folder}/checkpoints"), CPU)
    ours, theirs = losses(stopped.folder), losses(whole.folder)
    np.testing.assert_allclose([ours[step] for step in range(4)], [theirs[step] for step in range(4)], rtol=1e-5)
