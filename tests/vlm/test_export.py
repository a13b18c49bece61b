import json

import numpy as np
import peft
import pytest
import torch
import transformers as hf
import yaml
from PIL import Image, ImageFont
from sentence_transformers import SentenceTransformer

from pipeline.config import ConfigError, Ref
from pipeline.encoders.saved import open_encoder as open_any
from pipeline.vlm.backbone import load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.card import Card, DataSource, card_text
from pipeline.vlm.causality import make_bidirectional
from pipeline.vlm.export import save_encoder
from pipeline.vlm.heads import HeadShape, head_of
from pipeline.vlm.merged import merged
from pipeline.vlm.message import Message
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.reading import read
from pipeline.vlm.saved import open_vlm
from pipeline.vlm.settings import Prompt, Reading, Sizes
from pipeline.vlm.spec import HEAD, EncoderSpec, Origin, load_spec
from pipeline.vlm.templates import template_of
from pipeline.vlm.textimage import Page, draw
from tests.vlm.models import WIDTH, picture

PROMPT = Prompt(template="plain", instruction="Represent it.", query_instruction='Find "it":\n')
CARD = Card(name="tiny", base="example/tiny", base_licence="apache-2.0")
TEXTS = ["a cat", "a longer text about a cat, é, and <|im_end|> or </s>", 'quotes " and {braces} \\']
IMAGES = [picture(1), picture(2, 40, 24)]


def wrapped(folder, sizes, *, rank=None):
    """A backbone's model and preparer, the model with a LoRA adapter of some weight if a rank is given."""
    base = base_of(str(folder))
    preparer = Preparer(base, sizes)
    model = load_backbone(base, preparer, dtype="float32", device="cpu").model
    if rank is None:
        return model, preparer
    torch.manual_seed(3)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return lora.eval(), preparer


def saved(folder_of, tmp_path, family="qwen2_vl", *, rank=None, **settings):
    spec = EncoderSpec(**{"prompt": PROMPT, **settings})
    model, preparer = wrapped(folder_of(family), spec.sizes, rank=rank)
    if spec.reading.bidirectional:
        make_bidirectional(model)
    head = None if spec.head is None else head_of(spec.head, WIDTH, layers=3)
    save_encoder(tmp_path / "encoder", model, preparer=preparer, spec=spec, card=CARD, head=head)
    return tmp_path / "encoder"


def both_give_the_same(folder, *, dim=WIDTH):
    """Compare sentence-transformers with our own encoder: texts, images, both, alone and mixed, documents and queries."""
    assert (folder / "modules.json").exists()
    ours, theirs = open_vlm(str(folder)), SentenceTransformer(str(folder), device="cpu")
    pictures = [Image.fromarray(image) for image in IMAGES]
    cases = {
        "texts": (TEXTS, [Message(text) for text in TEXTS]),
        "images": (pictures, [Message("", (image,)) for image in IMAGES]),
        "both": (
            [{"image": pictures[0], "text": TEXTS[0]}, {"text": TEXTS[1], "image": pictures[1]}],
            [Message(TEXTS[0], (IMAGES[0],)), Message(TEXTS[1], (IMAGES[1],))],
        ),
        "two images": ([{"image": pictures, "text": TEXTS[2]}], [Message(TEXTS[2], tuple(IMAGES))]),
        "mixed": ([TEXTS[0], pictures[0]], [Message(TEXTS[0]), Message("", (IMAGES[0],))]),
    }
    for name, (inputs, messages) in cases.items():
        expected = ours.encode_messages(messages)
        assert expected.shape == (len(messages), dim)
        np.testing.assert_allclose(theirs.encode_document(inputs), expected, rtol=0, atol=1e-5, err_msg=name)
        queries = ours.for_queries().encode_messages(messages)
        np.testing.assert_allclose(theirs.encode_query(inputs), queries, rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(queries - expected).max() > 1e-3
    np.testing.assert_array_equal(theirs.encode(TEXTS), theirs.encode_document(TEXTS))


@pytest.mark.parametrize(
    ("family", "reading", "template"),
    [
        ("qwen2_vl", Reading(layer=3), "prompt-eol"),
        ("qwen3_vl", Reading(pooling="cls", width=16, bidirectional=True), "plain"),
        ("idefics3", Reading(pooling="mean"), "vlm2vec-v1"),
        ("llava", Reading(pooling="mean", bidirectional=True), "{instruction}\n{input} in short:"),
        ("llava_onevision", Reading(pooling="weightedmean", width=12), "qwen3-vl-embedding"),
    ],
)
def test_sentence_transformers_makes_the_same_vectors(folder_of, tmp_path, family, reading, template):
    folder = saved(folder_of, tmp_path, family, reading=reading, prompt=PROMPT.model_copy(update={"template": template}))
    both_give_the_same(folder, dim=reading.width or WIDTH)


def test_pixel_limits_are_saved_for_sentence_transformers_too(folder_of, tmp_path):
    folder = saved(folder_of, tmp_path, sizes=Sizes(max_pixels=16 * 16))
    both_give_the_same(folder)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs[0].processor.image_processor.size["longest_edge"] == 16 * 16


def test_merged_weights_load_everywhere_and_the_adapter_is_kept(folder_of, tmp_path):
    folder = saved(folder_of, tmp_path, rank=2)
    both_give_the_same(folder)
    lora, preparer = wrapped(folder_of("qwen2_vl"), Sizes(), rank=2)
    batch = preparer.collate([preparer.prepare("a cat")])
    with torch.no_grad():
        expected = lora(**batch).last_hidden_state
        plain = hf.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        base = hf.AutoModel.from_pretrained(folder_of("qwen2_vl")).eval()
        without = base(**batch).last_hidden_state
        kept = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()(**batch).last_hidden_state
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)
    assert (without - expected).abs().max() > 1e-2
    hf.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(("dtype", "told"), [(torch.float32, False), (torch.bfloat16, True)])
def test_what_rounding_takes_of_a_merged_adapter_is_told(folder_of, caplog, dtype, told):
    """An adapter of small values was merged into bfloat16 weights, and nothing said that much of it was rounded away."""
    model, _ = wrapped(folder_of("qwen2_vl"), Sizes(), rank=2)
    for name, values in model.named_parameters():
        values.data = values.data * 0.01 if "lora_B" in name else values.data if "lora_" in name else values.data.to(dtype)
    whole = merged(model)
    assert ("rounding to the weights' number format changed the adapter by" in caplog.text) == told
    assert not any("lora" in name for name, _ in whole.named_parameters())
    layer = next(layer for layer in model.modules() if hasattr(layer, "get_delta_weight"))
    name = next(name for name, each in model.base_model.model.named_modules() if each is layer)
    wanted = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    assert torch.equal(whole.get_submodule(name).weight, wanted.to(dtype))


def test_saving_leaves_the_model_that_is_trained_as_it_was(folder_of, tmp_path):
    model, preparer = wrapped(folder_of("qwen2_vl"), Sizes(), rank=2)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    template = preparer.processor.chat_template
    save_encoder(tmp_path / "encoder", model, preparer=preparer, spec=EncoderSpec(), card=CARD)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert preparer.processor.chat_template == template and preparer.tokenizer.padding_side == "left"


def test_a_saved_encoder_knows_the_run_that_made_it_and_its_vectors_do_not(folder_of, tmp_path):
    model, preparer = wrapped(folder_of("qwen2_vl"), Sizes())
    trained = CARD.model_copy(update={"data": (DataSource(name="pairs", rows=7),)})
    first = save_encoder(tmp_path / "one", model, preparer=preparer, spec=EncoderSpec(), card=trained)
    second = save_encoder(tmp_path / "two", model, preparer=preparer, spec=EncoderSpec(), card=CARD.model_copy(update={"data": ()}))
    assert first.fingerprint == second.fingerprint
    encoder = open_any(str(tmp_path / "one"))
    assert (encoder.training["run"], encoder.training["data"][0]["rows"]) == (CARD.name, 7)
    assert open_any(str(tmp_path / "two")).training == {}


def test_an_adapter_alone_loads_everywhere_on_its_base(folder_of, tmp_path):
    base = folder_of("qwen2_vl")
    folder = saved(folder_of, tmp_path, rank=2, adapter=".", base=Origin(model=str(base)))
    assert not (folder / "model.safetensors").exists()
    both_give_the_same(folder)
    lora, preparer = wrapped(base, Sizes(), rank=2)
    batch = preparer.collate([preparer.prepare("a cat")])
    with torch.no_grad():
        expected = lora(**batch).last_hidden_state
        by_peft = peft.PeftModel.from_pretrained(hf.AutoModel.from_pretrained(base), folder).eval()(**batch).last_hidden_state
        by_transformers = hf.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    torch.testing.assert_close(by_peft, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(by_transformers, expected, rtol=0, atol=1e-6)


def test_an_adapter_names_its_base_as_others_find_it(folder_of, tmp_path):
    model, preparer = wrapped(folder_of("qwen2_vl"), Sizes(), rank=2)
    spec = EncoderSpec(adapter=".", base=Origin(model=str(folder_of("qwen2_vl"))))
    model.peft_config["default"].base_model_name_or_path = "/cache/of/this/machine"
    save_encoder(tmp_path / "encoder", model, preparer=preparer, spec=spec, card=CARD)
    assert json.loads((tmp_path / "encoder" / "adapter_config.json").read_text())["base_model_name_or_path"] == spec.base.model
    assert model.peft_config["default"].base_model_name_or_path == "/cache/of/this/machine"


@pytest.mark.parametrize(
    ("settings", "family", "reason"),
    [
        ({"head": HeadShape(kind="latent-attention", latents=4, heads=2)}, "qwen2_vl", "it has a trained head of its own"),
        ({"page": Page()}, "qwen2_vl", "texts are drawn as pixels"),
        ({"reading": Reading(layer=2)}, "qwen2_vl", "it is read at a layer before the last"),
        ({"reading": Reading(prepending=(1, 2))}, "qwen2_vl", "Token Prepending is switched on"),
        ({"prompt": Prompt(template="vlm2vec-v1")}, "qwen2_vl", "its template counts images as text"),
        ({"prompt": Prompt(template="{input} and {input}")}, "qwen2_vl", "its template does not put images before the text, each once"),
        ({}, "paligemma", "PaliGemma's texts have a frame"),
    ],
)
def test_what_sentence_transformers_cannot_do_is_said_in_the_card_and_not_written(folder_of, tmp_path, settings, family, reason):
    folder = saved(folder_of, tmp_path, family, **settings)
    card = (folder / "README.md").read_text()
    assert f"sentence-transformers cannot make these vectors: {reason}" in card
    assert not (folder / "modules.json").exists() and "library_name: transformers" in card
    load_spec(folder)
    hf.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["latent-attention", "multi-layer"])
def test_a_trained_head_is_saved_and_gives_its_vectors_again(folder_of, tmp_path, kind):
    spec = EncoderSpec(head=HeadShape(kind=kind, latents=4, heads=2, vectors="mean"))
    base = base_of(str(folder_of("qwen2_vl")))
    preparer = Preparer(base, spec.sizes)
    backbone = load_backbone(base, preparer, dtype="float32", device="cpu")
    torch.manual_seed(5)
    head = head_of(spec.head, WIDTH, layers=3)
    save_encoder(tmp_path / "encoder", backbone.model, preparer=preparer, spec=spec, card=CARD, head=head)
    assert HEAD in load_spec(tmp_path / "encoder").files
    encoder = open_vlm(str(tmp_path / "encoder"))
    messages = [Message("a cat"), Message("a longer text", (IMAGES[0],))]
    rows = [preparer.read(message, template_of("plain")) for message in messages]
    with torch.no_grad():
        expected = read(backbone, rows, spec.reading, head)
    np.testing.assert_allclose(encoder.encode_messages(messages), expected, rtol=0, atol=1e-6)


def test_drawn_texts_are_saved_with_their_font(folder_of, tmp_path):
    font = ImageFont.load_default(20).path
    font.seek(0)
    (tmp_path / "mine.ttf").write_bytes(font.read())
    page = Page(width_px=64, font=str(tmp_path / "mine.ttf"))
    folder = saved(folder_of, tmp_path, page=page)
    (tmp_path / "mine.ttf").unlink()
    encoder, plain = open_vlm(str(folder)), open_vlm(str(saved(folder_of, tmp_path / "plain")))
    assert load_spec(folder).page.font == "font.ttf"
    drawn = draw("a cat", Page(width_px=64)).image
    np.testing.assert_allclose(encoder.encode_messages([Message("a cat")]), plain.encode_messages([Message("", (drawn,))]), rtol=0, atol=1e-6)


def test_a_job_file_names_a_saved_encoder_as_its_card_says(folder_of, tmp_path):
    folder = saved(folder_of, tmp_path)
    named = yaml.safe_load((folder / "README.md").read_text().split("```yaml\n")[1].split("```")[0])["encoder"]
    encoder = Ref(target=named["target"], args={"folder": str(folder)}).build()
    assert encoder.fingerprint == load_spec(folder).fingerprint


def test_texts_are_refused_or_neutralised_where_they_would_be_read_otherwise(folder_of, tmp_path):
    theirs = SentenceTransformer(str(saved(folder_of, tmp_path)), device="cpu")
    with pytest.raises(Exception, match="give no prompt"):
        theirs.encode(["a cat"], prompt="Another instruction")
    with pytest.raises(Exception, match="image markers in a text"):
        theirs.encode(["a <|image|> cat"])


def test_a_folder_that_is_not_empty_is_refused_and_a_failure_leaves_nothing(folder_of, tmp_path):
    folder = saved(folder_of, tmp_path)
    model, preparer = wrapped(folder_of("qwen2_vl"), Sizes())
    with pytest.raises(ConfigError, match="is not empty; an encoder is saved into a new folder"):
        save_encoder(folder, model, preparer=preparer, spec=EncoderSpec(), card=CARD)
    with pytest.raises(ConfigError, match="must lie between 1 and 32"):
        save_encoder(tmp_path / "other", model, preparer=preparer, spec=EncoderSpec(reading=Reading(width=99)), card=CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_spec_model_and_head_that_contradict_each_other_are_refused(folder_of, tmp_path):
    model, preparer = wrapped(folder_of("qwen2_vl"), Sizes())
    for spec, message in (
        (EncoderSpec(head=HeadShape(kind="latent-attention")), "needs its weights"),
        (EncoderSpec(base=Origin(model="org/name")), "base.model must be '.'"),
        (EncoderSpec(adapter=".", base=Origin(model="org/name")), "a model that PEFT wrapped"),
    ):
        with pytest.raises(ConfigError, match=message):
            save_encoder(tmp_path / "encoder", model, preparer=preparer, spec=spec, card=CARD)


def test_a_card_says_what_is_known_and_what_is_not():
    card = Card(
        name="cats",
        base="org/base-2b",
        data=(DataSource(name="cats | dogs", rows=12_345, digest="sha256:ab", licence="cc-by-4.0"), DataSource(name="more")),
        settings={"loss": {"temperature": 0.02}},
        metrics={"flickr30k recall@1": 0.81234},
        curves=("curves/loss.png",),
    )
    text = card_text(card, EncoderSpec(fingerprint="f" * 32), sentence_transformers=None)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "license": "unknown",
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["tessera", "multimodal-embedding", "sentence-transformers"],
        "base_model": "org/base-2b",
        "base_model_relation": "finetune",
    }
    for expected in (
        "org/base-2b, licence: unknown.",
        "| cats \\| dogs | 12,345 | sha256:ab | cc-by-4.0 |",
        "| more | unknown | unknown | unknown |",
        "| loss.temperature | 0.02 |",
        "| flickr30k recall@1 | 0.8123 |",
        "![loss](curves/loss.png)",
        "f" * 32,
        "SentenceTransformer(",
    ):
        assert expected in text
    job = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert job["encoder"]["target"] == "pipeline.encoders.saved:open_encoder"
    assert "trained" in card_text(CARD, EncoderSpec(), sentence_transformers="why")
