"""Sentence: the vectors of sentence-transformers, for every pooling it has, whatever the batch."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.encoders.sentence import Sentence, batches
from pipeline.testing import check_encoder
from tests.encoders.models import items_of, save_bert, save_llama, save_sentence_transformer

TEXTS = ["a cat", "", "  ", "the dog sleeps on the red house. " * 20, "The QUICK brown fox", "[MASK] a token", "日本語", "cat " * 300]


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def minilm(assets):
    return assets / "encoder" / "sentence"


@pytest.fixture(scope="module")
def plain(bert, tmp_path_factory):
    """A folder of sentence-transformers' with mean pooling, and the model that it has of it."""
    folder = tmp_path_factory.mktemp("st") / "model"
    return folder, save_sentence_transformer(folder, bert, "mean", prompts={"query": "search for: ", "document": "the document: "})


def test_real_weights_give_the_vectors_of_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    rng = random.Random(0)
    texts = TEXTS + [" ".join(rng.choices(["real", "weights", "and", "texts", "mixed"], k=rng.randint(1, 120))) for _ in range(8)]
    theirs = SentenceTransformer(str(minilm), device="cpu")
    ours = Sentence(str(minilm))
    vectors = ours.encode_texts(texts)
    assert np.abs(vectors - unit(theirs.encode(texts))).max() < 1e-5
    assert np.abs(vectors - unit(theirs.encode_document(texts))).max() < 1e-5
    alone = np.concatenate([ours.encode_texts([text]) for text in texts[:12]])
    assert np.abs(alone - vectors[:12]).max() < 1e-5


def test_sentence_keeps_the_contract(minilm):
    items = items_of(["a cat", "two words " * 20, "", "x", "Ünïcode: 日本語 🙂"])
    check_encoder(Sentence(str(minilm), device="cpu"), items, again=Sentence(str(minilm), device="cpu"))


def test_bfloat16_stays_near_and_within_its_tolerance(minilm):
    """Measured on a CPU: cosine to float32 at least 0.99988."""
    half = Sentence(str(minilm), dtype="bfloat16", device="cpu")
    items = items_of(["a cat", "two words " * 20, "", "x"])
    check_encoder(half, items)
    assert (half.encode(items) * Sentence(str(minilm), device="cpu").encode(items)).sum(axis=1).min() > 0.9995


def test_float16_stays_near_and_within_its_tolerance(plain):
    half, full = (Sentence(str(plain[0]), dtype=dtype, device="cpu") for dtype in ("float16", "float32"))
    items = items_of(["a cat", "the dog sleeps", "", "x"])
    check_encoder(half, items)
    assert (half.encode(items) * full.encode(items)).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("modes", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("cls", "max", "weightedmean")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_pooling_is_that_of_sentence_transformers(tmp_path, bert, modes, side):
    base = save_bert(tmp_path / "left", padding_side="left") if side == "left" else bert
    theirs = save_sentence_transformer(tmp_path / "model", base, modes)
    ours = Sentence(str(tmp_path / "model"), device="cpu")
    wanted = unit(theirs.encode_document(TEXTS))
    assert ours.dim == wanted.shape[1]
    assert np.abs(ours.encode_texts(TEXTS) - wanted).max() < 1e-5


def test_a_decoder_pooled_at_its_last_token(tmp_path):
    theirs = save_sentence_transformer(tmp_path / "model", save_llama(tmp_path / "llama"), "lasttoken", normalise=True)
    ours = Sentence(str(tmp_path / "model"), device="cpu")
    assert np.abs(ours.encode_texts(TEXTS) - unit(theirs.encode_document(TEXTS))).max() < 1e-5


@pytest.mark.parametrize("modes", ["mean", "cls", "weightedmean", "lasttoken", "max"])
def test_a_prompt_can_be_left_out_of_the_pooling(tmp_path, bert, modes):
    prompts = {"query": "search for: ", "document": "the document: "}
    theirs = save_sentence_transformer(tmp_path / "model", bert, modes, include_prompt=False, prompts=prompts)
    ours = Sentence(str(tmp_path / "model"), device="cpu")
    texts = ["a cat", "the dog sleeps on the red house", "x y z"]
    assert np.abs(ours.encode_texts(texts) - unit(theirs.encode_document(texts))).max() < 1e-5
    assert np.abs(ours.for_queries().encode_texts(texts) - unit(theirs.encode_query(texts))).max() < 1e-5


def test_dense_layers_follow_the_pooling(tmp_path, bert):
    theirs = save_sentence_transformer(tmp_path / "model", bert, "mean", dense=(24, 8), normalise=True)
    ours = Sentence(str(tmp_path / "model"), device="cpu")
    assert ours.dim == 8
    assert np.abs(ours.encode_texts(TEXTS) - unit(theirs.encode_document(TEXTS))).max() < 1e-5


def test_documents_and_queries_get_their_prompts(plain):
    folder, theirs = plain
    ours = Sentence(str(folder), device="cpu")
    assert np.abs(ours.encode_texts(TEXTS) - unit(theirs.encode_document(TEXTS))).max() < 1e-5
    assert np.abs(ours.for_queries().encode_texts(TEXTS) - unit(theirs.encode_query(TEXTS))).max() < 1e-5
    assert np.abs(ours.encode_texts(TEXTS) - ours.for_queries().encode_texts(TEXTS)).max() > 0.01
    own = Sentence(str(folder), prompt="this is: ", query_prompt="", device="cpu")
    assert np.abs(own.encode_texts(TEXTS) - unit(theirs.encode(TEXTS, prompt="this is: "))).max() < 1e-5
    assert np.abs(own.for_queries().encode_texts(TEXTS) - unit(theirs.encode(TEXTS, prompt=""))).max() < 1e-5


def test_a_passage_prompt_is_a_documents_prompt(tmp_path, bert):
    """sentence-transformers 6.2 documents this for encode_document, but finds the empty document prompt that it adds itself."""
    theirs = save_sentence_transformer(tmp_path / "model", bert, "mean", prompts={"query": "query: ", "passage": "passage: "})
    ours = Sentence(str(tmp_path / "model"), device="cpu")
    assert np.abs(ours.encode_texts(TEXTS) - unit(theirs.encode(TEXTS, prompt_name="passage"))).max() < 1e-5


def test_texts_are_cut_and_lowered_as_the_folder_says(tmp_path, bert):
    base = save_bert(tmp_path / "cased", lower_case=False)
    theirs = save_sentence_transformer(tmp_path / "model", base, "mean")
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10, "do_lower_case": True}))
    theirs = type(theirs)(str(tmp_path / "model"), device="cpu")
    ours = Sentence(str(tmp_path / "model"), device="cpu")
    assert np.abs(ours.encode_texts(TEXTS) - unit(theirs.encode(TEXTS))).max() < 1e-5
    upper, lower = ours.encode_texts(["A CAT", "a cat"])
    assert np.allclose(upper, lower)
    shorter = Sentence(str(tmp_path / "model"), max_tokens=4, device="cpu")
    theirs.max_seq_length = 4
    assert np.abs(shorter.encode_texts(TEXTS) - unit(theirs.encode(TEXTS))).max() < 1e-5


def test_a_plain_folder_is_pooled_by_the_mean(bert):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        for text in ("a cat", "the dog sleeps on the red house"):
            tokens_TD = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].numpy()
            assert np.abs(Sentence(str(bert), device="cpu").encode_texts([text]) - unit([tokens_TD.mean(axis=0)])).max() < 1e-5


def test_batches_fit_the_budget_and_waste_little():
    rng = random.Random(0)
    lengths = [min(256, int(rng.lognormvariate(3.8, 0.9)) + 3) for _ in range(3000)]
    found = batches(lengths, 1024)
    assert sorted(row for rows in found for row in rows) == list(range(3000))
    computed = [len(rows) * max(lengths[row] for row in rows) for rows in found]
    assert max(computed) <= 1024
    assert sum(computed) / sum(lengths) <= 1.10
    assert batches([5000], 1024) == [[0]]


def test_the_budget_does_not_change_vectors(plain):
    folder, _ = plain
    small, large = (Sentence(str(folder), token_budget=budget, device="cpu") for budget in (1, 100_000))
    assert small.fingerprint == large.fingerprint
    assert np.abs(small.encode_texts(TEXTS) - large.encode_texts(TEXTS)).max() < 1e-5


def test_many_threads_load_the_weights_once(plain, monkeypatch):
    import pipeline.encoders.sentence_model as module

    loads, real = [], module._tokenizer
    monkeypatch.setattr(module, "_tokenizer", lambda *args, **kwargs: loads.append(1) or real(*args, **kwargs))
    ours = Sentence(str(plain[0]), device="cpu")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ours.encode_texts, [TEXTS] * 8))
    assert len(loads) == 1
    assert all(np.abs(vectors - found[0]).max() < 1e-6 for vectors in found)


def test_dim_and_fingerprint_are_known_before_weights_load(plain, tmp_path):
    folder = shutil.copytree(plain[0], tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    ours = Sentence(str(folder), device="cpu")
    assert ours.dim == 32 and len(ours.fingerprint) == 32
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        ours.load()


def test_the_fingerprint_changes_with_what_changes_vectors_and_with_nothing_else(plain, tmp_path):
    folder, _ = plain
    first = Sentence(str(folder)).fingerprint
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (elsewhere / "README.md").write_text("another text")
    assert Sentence(str(elsewhere)).fingerprint == first
    for same in ({"device": "cpu"}, {"token_budget": 7}, {"dtype": "float32"}, {"prompt": "the document: "}):
        assert Sentence(str(folder), **same).fingerprint == first, same
    others = [
        Sentence(str(folder), **other).fingerprint for other in ({"dtype": "bfloat16"}, {"prompt": ""}, {"query_prompt": ""}, {"max_tokens": 9})
    ]
    for name, change in (("1_Pooling/config.json", ("mean", "cls")), ("tokenizer.json", ("house", "horse")), ("config.json", ("gelu", "relu"))):
        changed = shutil.copytree(folder, tmp_path / name.replace("/", "-"))
        text = (changed / name).read_text()
        assert change[0] in text
        (changed / name).write_text(text.replace(*change))
        others.append(Sentence(str(changed)).fingerprint)
    other_weights = save_bert(tmp_path / "other", seed=1)
    changed = shutil.copytree(folder, tmp_path / "weights")
    shutil.copyfile(other_weights / "model.safetensors", changed / "model.safetensors")
    others.append(Sentence(str(changed)).fingerprint)
    assert len({first, *others}) == len(others) + 1


def test_what_is_not_implemented_is_refused_by_name(plain, tmp_path):
    folder, _ = plain

    def changed(number, name, edit):
        copy = shutil.copytree(folder, tmp_path / str(number))
        found = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        edit(found)
        (copy / name).write_text(json.dumps(found))
        return str(copy)

    cases = [
        ("modules.json", lambda m: m.append({"idx": 2, "name": "2", "path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}), "LSTM"),
        ("modules.json", lambda m: m[1].update(type="my_package.Pooling"), "my_package.Pooling"),
        ("modules.json", lambda m: m.pop(1), "Transformer"),
        ("1_Pooling/config.json", lambda m: m.update(pooling_mode="meen"), "did you mean 'mean'"),
        ("config_sentence_transformers.json", lambda m: m.update(truncate_dim=8), "truncate_dim"),
        ("sentence_bert_config.json", lambda m: m.update(query_expansion={"length": 32}), "query_expansion"),
        ("adapter_config.json", lambda _: None, "adapter"),
        ("config.json", lambda m: m.update(is_encoder_decoder=True, model_type="bart"), "bart"),
    ]
    for number, (name, edit, message) in enumerate(cases):
        with pytest.raises(ConfigError, match=message):
            Sentence(changed(number, name, edit))


def test_wrong_arguments_are_refused_with_the_right_ones(plain, tmp_path):
    folder, _ = plain
    shutil.copytree(folder, tmp_path / "minilm")
    for arguments, message in [
        ({"model": str(tmp_path / "minilmm")}, "did you mean 'minilm'"),
        ({"model": str(folder), "dtype": "float61"}, "did you mean 'float16'"),
        ({"model": str(folder), "max_tokens": 65}, "between 1 and 64"),
        ({"model": str(folder), "token_budget": 0}, "at least 1"),
        ({"model": str(folder), "revision": "main"}, "is a folder"),
        ({"model": str(tmp_path)}, "no text encoder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Sentence(**arguments)


def test_an_item_without_a_text_is_named(plain):
    with pytest.raises(ValueError, match="item-1"):
        Sentence(str(plain[0]), device="cpu").encode(items_of(["a", None]))
