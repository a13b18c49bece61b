"""Vlm: the encoder contract with images and text, every setting in the fingerprint, and the embed job with it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.config import ConfigError, Ref
from pipeline.encoders.vlm import Vlm
from pipeline.testing import check_encoder
from pipeline.vlm.heads import HeadShape, head_of
from pipeline.vlm.message import MARKER, Message
from pipeline.vlm.saved import sealed
from pipeline.vlm.settings import Prompt, Reading
from pipeline.vlm.spec import HEAD, EncoderSpec
from pipeline.vlm.textimage import Page, draw
from tests.encoders.models import items_of
from tests.vlm.models import LAYERS, SPECIAL, WIDTH, picture, save_model

PICTURES = [picture(1, 40, 20), picture(2, 16, 50), picture(3, 64, 64)]
MESSAGES = [
    Message("a cat"),
    Message("", tuple(PICTURES[:1])),
    Message("what is this?", tuple(PICTURES[1:2])),
    Message(f"a {MARKER} b {MARKER}{MARKER} c", tuple(PICTURES)),
    Message("a much longer text than the others, " * 6),
]
ITEMS = items_of(
    ["a cat", "what is this?", None, "x", f"before {MARKER} after", "".join(SPECIAL["qwen"]), "long " * 40],
    [None, PICTURES[0], PICTURES[1], PICTURES[2], PICTURES[0], None, None],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("vlm") / "qwen", "qwen2_5_vl")


@pytest.fixture(scope="module")
def plain(folder):
    return Vlm(str(folder), device="cpu")


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3", "llava_next"])
def test_vlm_keeps_the_contract(family, tmp_path):
    arguments = {"device": "cpu", "prompt": {"instruction": "Say what it is.", "query_instruction": "Find it."}, "token_budget": 300}
    made = save_model(tmp_path / family, family)
    check_encoder(Vlm(str(made), **arguments), ITEMS, again=Vlm(str(made), **arguments))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bits_stay_near_and_within_their_tolerance(dtype, folder, plain):
    half = Vlm(str(folder), dtype=dtype, device="cpu")
    found, wanted = half.encode(ITEMS), plain.encode(ITEMS)
    assert (found * wanted).sum(axis=1).min() > 0.99
    alone = np.concatenate([half.encode(ITEMS.slice(row, 1)) for row in range(ITEMS.num_rows)])
    assert np.abs(found - alone).max() < half.tolerance
    assert half.fingerprint != plain.fingerprint


def test_messages_with_any_number_of_images_keep_their_order(plain):
    vectors = plain.encode_messages(MESSAGES)
    assert vectors.shape == (5, WIDTH) and vectors.dtype == np.float32
    alone = np.concatenate([plain.encode_messages([message]) for message in MESSAGES])
    assert np.abs(vectors - alone).max() < 1e-5
    assert plain.encode_messages([]).shape == (0, WIDTH)


def test_the_budget_of_tokens_does_not_change_vectors(folder, plain):
    for budget in (1, 100, 10_000):
        other = Vlm(str(folder), device="cpu", token_budget=budget)
        assert other.fingerprint == plain.fingerprint
        assert np.abs(other.encode_messages(MESSAGES) - plain.encode_messages(MESSAGES)).max() < 1e-5


def test_queries_go_under_their_own_instruction_with_the_same_weights(folder, plain):
    both = Vlm(str(folder), device="cpu", prompt={"instruction": "Say.", "query_instruction": "Find."})
    queries = both.for_queries()
    said, found = (Vlm(str(folder), device="cpu", prompt={"instruction": text}) for text in ("Say.", "Find."))
    assert np.abs(both.encode(ITEMS) - said.encode(ITEMS)).max() < 1e-6
    assert np.abs(queries.encode(ITEMS) - found.encode(ITEMS)).max() < 1e-6
    assert np.abs(queries.encode(ITEMS) - both.encode(ITEMS)).max() > 1e-2
    assert queries._backbone() is both._backbone()
    assert np.abs(plain.for_queries().encode(ITEMS) - plain.encode(ITEMS)).max() < 1e-6


def test_a_part_of_an_item_can_be_embedded_alone(folder):
    both, image, text = (Vlm(str(folder), device="cpu", of=of) for of in ("all", "image", "text"))
    item = items_of(["a cat"], [PICTURES[0]])
    assert np.abs(image.encode(item) - both.encode(items_of([None], [PICTURES[0]]))).max() < 1e-6
    assert np.abs(text.encode(item) - both.encode(items_of(["a cat"]))).max() < 1e-6
    assert np.abs(both.encode(item) - image.encode(item)).max() > 1e-2
    assert (both.inputs, image.inputs, text.inputs) == ({"image", "text"}, {"image"}, {"text"})
    for encoder, without in ((image, "no image"), (text, "no text"), (both, "neither an image nor a text")):
        with pytest.raises(ValueError, match=f"item 'item-1' has {without}"):
            encoder.encode(items_of(["a", None], [PICTURES[0], PICTURES[1] if encoder is text else None]))
    assert image.for_queries().encode(items_of(["a query in words"])).shape == (1, WIDTH)


def test_a_shallower_layer_and_a_smaller_width(folder, plain):
    shallow = Vlm(str(folder), device="cpu", reading={"layer": 2, "width": 12})
    backbone, ran = shallow._backbone(), []
    for layer in backbone.decoder_layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    found = shallow.encode_messages(MESSAGES[:1])
    assert (shallow.dim, found.shape, len(ran)) == (12, (1, 12), 2)
    cut = plain.encode_messages(MESSAGES)[:, :12]
    narrow = Vlm(str(folder), device="cpu", reading={"width": 12}).encode_messages(MESSAGES)
    assert np.abs(narrow - cut / np.linalg.norm(cut, axis=1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("pooling", ["last", "mean", "cls", "weightedmean"])
def test_with_both_directions_every_pooling_is_a_rows_own(pooling, folder, plain):
    both = Vlm(str(folder), device="cpu", reading={"bidirectional": True, "pooling": pooling})
    check_encoder(both, ITEMS)
    first = [Message("a cat"), Message("a dog")]
    apart = np.abs(np.subtract(*both.encode_messages(first))).max()
    causal = Vlm(str(folder), device="cpu", reading={"pooling": "cls"}).encode_messages(first)
    assert apart > 1e-3 and np.abs(np.subtract(*causal)).max() < 1e-6, "causally the first token sees no other"
    assert both.fingerprint != plain.fingerprint


def test_token_prepending_is_a_rows_own_in_many_threads(folder):
    prepended = Vlm(str(folder), device="cpu", prompt={"template": "prompt-eol"}, reading={"prepending": [1, 2], "layer": 2})
    without = Vlm(str(folder), device="cpu", prompt={"template": "prompt-eol"}, reading={"layer": 2})
    check_encoder(prepended, ITEMS)
    assert np.abs(prepended.encode(ITEMS) - without.encode(ITEMS)).max() > 1e-2


def test_an_adapter_changes_vectors_and_fingerprint(folder, plain, tmp_path):
    from tests.vlm.test_adapter import save_adapter

    save_adapter(tmp_path, folder, "AutoModel")
    adapted = Vlm(str(folder), device="cpu", adapter=str(tmp_path))
    assert np.abs(adapted.encode(ITEMS) - plain.encode(ITEMS)).max() > 1e-2
    assert adapted.fingerprint != plain.fingerprint
    with pytest.raises(ConfigError, match="holds no adapter"):
        Vlm(str(folder), adapter=str(folder))


@pytest.mark.parametrize("kind", ["latent-attention", "multi-layer"])
def test_a_trained_head_takes_the_place_of_the_pooling(kind, folder, plain, tmp_path):
    shape, encoders = {"kind": kind, "latents": 8, "heads": 2}, []
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights = str(tmp_path / f"{seed}.safetensors")
        save_file(head_of(HeadShape(**shape), WIDTH, layers=2).state_dict(), weights)
        encoders.append(Vlm(str(folder), device="cpu", reading={"layer": 2}, head={"shape": shape, "weights": weights}))
    check_encoder(encoders[0], ITEMS)
    assert np.abs(encoders[0].encode(ITEMS) - encoders[1].encode(ITEMS)).max() > 1e-2
    assert len({plain.fingerprint, *(encoder.fingerprint for encoder in encoders)}) == 3
    with pytest.raises(ConfigError, match="does not fit"):
        Vlm(str(folder), device="cpu", reading={"layer": 2}, head={"shape": {**shape, "latents": 9}, "weights": weights}).load()
    with pytest.raises(ConfigError, match="are not there"):
        Vlm(str(folder), head={"shape": shape, "weights": "nowhere"})


def test_drawn_texts_reach_the_model_as_images(folder, plain):
    page = {"width_px": 32, "line_px": 16, "font_px": 12}
    encoder = Vlm(str(folder), device="cpu", page=page)
    check_encoder(encoder, items_of(["a cat", "dogs", f"1 {MARKER} 2"], [None, None, PICTURES[0]]))
    sheets = [draw(text, Page(**page)).image for text in ("one ", " two")]
    drawn, wanted = Message(f"one {MARKER} two", (PICTURES[0],)), Message("", (sheets[0], PICTURES[0], sheets[1]))
    assert np.abs(encoder.encode_messages([drawn]) - plain.encode_messages([wanted])).max() < 1e-6
    picture_alone = MESSAGES[1:2]
    assert np.abs(encoder.encode_messages(picture_alone) - plain.encode_messages(picture_alone)).max() < 1e-6
    assert encoder.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="none of the letters '日本'"):
        encoder.encode_messages([Message("日本")])


def test_a_saved_encoder_is_opened_with_everything(folder, tmp_path):
    saved = shutil.copytree(folder, tmp_path / "saved")
    torch.manual_seed(0)
    shape, page = HeadShape(kind="latent-attention", latents=8, heads=2), Page(width_px=32, line_px=16, font_px=12)
    save_file(head_of(shape, WIDTH, layers=2).state_dict(), saved / HEAD)
    reading, prompt = Reading(layer=2, width=16), Prompt(instruction="Say.", query_instruction="Find.")
    sealed(EncoderSpec(head=shape, page=page, reading=reading, prompt=prompt, dtype="bfloat16"), saved).save(saved)
    trained = {"shape": shape, "weights": str(saved / HEAD)}
    wanted = Vlm(str(folder), device="cpu", head=trained, page=page, reading=reading, prompt=prompt, dtype="bfloat16")
    found = Ref(target="pipeline.vlm.saved:open_vlm", args={"folder": str(saved), "device": "cpu"}).build()
    assert (found.fingerprint, found.dim) == (wanted.fingerprint, 16)
    for ours, theirs in ((found, wanted), (found.for_queries(), wanted.for_queries())):
        assert np.abs(ours.encode_messages(MESSAGES[:3]) - theirs.encode_messages(MESSAGES[:3])).max() < 1e-6


def test_dim_and_fingerprint_are_known_before_weights_load(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "model.safetensors").write_bytes(b"no weights at all")
    encoder = Vlm(str(copy), device="cpu")
    assert encoder.dim == WIDTH and len(encoder.fingerprint) == 32
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        encoder.load()


def test_the_fingerprint_changes_with_what_changes_vectors_and_with_nothing_else(folder, plain, tmp_path):
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (elsewhere / "README.md").write_text("another text")
    assert Vlm(str(elsewhere)).fingerprint == plain.fingerprint
    for same in (
        {"device": "cpu"},
        {"token_budget": 7},
        {"reading": {"layer": LAYERS, "width": WIDTH}},
        {"prompt": {"template": "plain", "instruction": "", "query_instruction": ""}},
        {"sizes": {"min_pixels": 64, "max_pixels": 1024}},
    ):
        assert Vlm(str(folder), **same).fingerprint == plain.fingerprint, same
    others = [
        {"dtype": "bfloat16"},
        {"of": "image"},
        {"prompt": {"instruction": "Say."}},
        {"prompt": {"query_instruction": "Say."}},
        {"prompt": {"template": "vlm2vec-v1"}},
        {"prompt": {"template": "vlm2vec-v1-visdial"}},
        {"prompt": {"template": "vlm2vec-v2"}},
        {"prompt": {"template": "{instruction} {input}"}},
        {"prompt": {"template": "{instruction}  {input}"}},
        {"reading": {"pooling": "mean"}},
        {"reading": {"layer": 2}},
        {"reading": {"width": 16}},
        {"reading": {"bidirectional": True}},
        {"reading": {"prepending": [1, 2]}},
        {"sizes": {"max_pixels": 512}},
        {"sizes": {"min_pixels": 512}},
        {"sizes": {"max_tokens": 99}},
    ]
    fingerprints = [plain.fingerprint, *(Vlm(str(folder), **other).fingerprint for other in others)]
    for name, change in (("config.json", ('"silu"', '"gelu"')), ("tokenizer.json", ('"Ġ"', '"Ġ "'))):
        changed = shutil.copytree(folder, tmp_path / name)
        text = (changed / name).read_text()
        assert change[0] in text
        (changed / name).write_text(text.replace(*change))
        fingerprints.append(Vlm(str(changed)).fingerprint)
    changed = shutil.copytree(folder, tmp_path / "weights")
    weights = load_file(changed / "model.safetensors")
    save_file({name: values + (name.endswith("norm.weight")) for name, values in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    fingerprints.append(Vlm(str(changed)).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def test_wrong_arguments_are_refused_with_the_right_ones(folder, tmp_path):
    for arguments, message in [
        ({"of": "picture"}, "of='picture' must be 'all'"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"token_budget": 0}, "at least 1"),
        ({"revision": "main"}, "is a folder"),
        ({"reading": {"poolin": "mean"}}, r"reading.poolin: unknown key; did you mean 'pooling'"),
        ({"reading": {"pooling": "max"}}, r"reading.pooling: .*'last', 'mean', 'cls' or 'weightedmean'.*got 'max'"),
        ({"reading": {"layer": 9}}, f"between 1 and {LAYERS}"),
        ({"reading": {"width": 99}}, f"between 1 and {WIDTH}"),
        ({"reading": {"prepending": [0, 2]}}, "prepending"),
        ({"prompt": {"template": "vlm2vec"}}, "neither one of"),
        ({"sizes": {"max_pixel": 9}}, "did you mean 'max_pixels'"),
        ({"sizes": {"tiles": True}}, "tiles is for idefics3, smolvlm"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Vlm(str(folder), **arguments)
    with pytest.raises(ConfigError, match="there is no folder"):
        Vlm(str(tmp_path / "nowhere"))


def test_a_text_beyond_the_limit_is_cut_and_an_image_is_not(folder):
    short = Vlm(str(folder), device="cpu", sizes={"max_tokens": 40})
    twice = short.encode_messages([Message("word " * 40), Message("word " * 80)])
    assert np.abs(twice[0] - twice[1]).max() < 1e-6
    with pytest.raises(ValueError, match=r"of 3 images.*an image is never cut; raise max_tokens, or lower max_pixels"):
        Vlm(str(folder), device="cpu", sizes={"max_tokens": 20}).encode_messages(MESSAGES[3:4])


@pytest.mark.usefixtures("cluster")
def test_the_embed_job_takes_it_and_search_finds_by_text_and_by_image(folder, plain, tmp_path):
    from jobs.embed import EmbedJob, run
    from pipeline.search import Query, search
    from pipeline.table.at import TableAt

    lines = []
    for number, image in enumerate([*PICTURES, None, None]):
        if image is not None:
            Image.fromarray(image).save(tmp_path / f"{number}.png")
        uri = str(tmp_path / f"{number}.png") if image is not None else None
        lines.append({"id": str(number), "text": f"caption {number}", "uri": uri})
    lines.append({"id": "bad", "text": f"one image too few {MARKER}", "uri": None})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = {
        "source": {
            "target": "pipeline.readers.jsonl:JsonLines",
            "args": {"uri": str(tmp_path / "items.jsonl"), "id": "id", "text": "text", "image_uri": "uri"},
        },
        "encoder": {"target": "pipeline.encoders.vlm:Vlm", "args": {"model": str(folder), "device": "cpu", "reading": {"pooling": "mean"}}},
        "table": {"uri": str(tmp_path / "db"), "name": "t"},
        "compute": {"cpus": 1},
        "limits": {"max_rejects": 0.5},
    }
    report = run(EmbedJob.model_validate(job))
    assert (report.written, report.rejected) == (5, 1)
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    [reject] = at.open(".rejects").to_table().to_pylist()
    assert "1 image markers" in reject["detail"] and "0 images" in reject["detail"]

    encoder = Ref.model_validate(job["encoder"]).build()
    wanted = encoder.encode_messages([*(Message(f"caption {n}", (image,)) for n, image in enumerate(PICTURES)), Message("caption 3")])
    stored = {row["id"]: row["vector"] for row in at.require().to_table(columns=["id", "vector"]).to_pylist()}
    assert np.abs(np.array([stored[str(n)] for n in range(4)]) - wanted).max() < 1e-4
    hits = search(at, Query(text="caption 3", k=1)).to_pylist()
    assert (hits[0]["id"], round(hits[0]["similarity"], 4)) == ("3", 1.0)
    asked = encoder.for_queries().encode(items_of([None], [PICTURES[1]]))[0]
    best = max(stored, key=lambda id: float(np.dot(stored[id], asked)))
    assert search(at, Query(image=str(tmp_path / "1.png"), k=1)).to_pylist()[0]["id"] == best
    assert run(EmbedJob.model_validate(job)).written == 0


def test_gradients_are_not_kept(plain):
    assert all(not values.requires_grad for values in plain._backbone().model.parameters())
    assert torch.is_grad_enabled()
