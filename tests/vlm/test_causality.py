import pytest
import torch
import transformers as hf

from pipeline.config import ConfigError
from pipeline.vlm import causality
from pipeline.vlm.causality import check_bidirectional, check_causal, make_bidirectional, saved_with_model
from tests.vlm.models import picture, save_model

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
SMALL = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
DECODERS = {
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**SMALL)),
    "llama-eager": lambda: hf.LlamaModel._from_config(hf.LlamaConfig(**SMALL), attn_implementation="eager"),
    "qwen2-some-windows": lambda: hf.Qwen2Model(hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "mistral-window": lambda: hf.MistralModel(hf.MistralConfig(**SMALL, sliding_window=4, head_dim=8)),
    "gemma": lambda: hf.GemmaModel(hf.GemmaConfig(**SMALL, head_dim=8)),
    "gemma2": lambda: hf.Gemma2Model(hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=4)),
    "gemma3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4)),
    "phi3": lambda: hf.Phi3Model(hf.Phi3Config(**SMALL)),
    "smolvlm": lambda: hf.SmolVLMModel(hf.SmolVLMConfig(text_config={**SMALL, "model_type": "llama"}, vision_config=VISION, pad_token_id=0)),
    "opt": lambda: hf.OPTModel(
        hf.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, word_embed_proj_dim=32)
    ),
}


class Stubborn(hf.LlamaModel):
    """Makes a causal mask whatever the configuration says, unless it is given a finished one: as classes from the hub do."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if attention_mask is None or attention_mask.ndim == 2:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
            future = torch.ones(length, length).triu(1).bool()[None, None]
            if attention_mask is not None:
                future = future | ~attention_mask.bool()[:, None, None]
            attention_mask = torch.zeros(future.shape).masked_fill(future, torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class Deaf(hf.LlamaModel):
    """Throws every mask away and is causal."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        mask = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, inputs_embeds=inputs_embeds, **kwargs)


def built(make):
    torch.manual_seed(0)
    return make().eval()


def changed_places(model, tokens, other, mask=None):
    """The places at which the last states differ between two rows of tokens, by running the whole model."""
    mask = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        first, second = (model(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0] for ids in (tokens, other))
    return {place for place in range(len(tokens)) if mask[place] and not torch.allclose(first[place], second[place], rtol=0, atol=1e-6)}


def with_last(tokens, value):
    return torch.cat([tokens[:-1], torch.tensor([value])])


@pytest.mark.parametrize("name", DECODERS)
def test_every_token_sees_later_ones_once_a_decoder_is_bidirectional_and_none_before(name):
    model, tokens = built(DECODERS[name]), torch.arange(10, 16)
    check_causal(model)
    assert changed_places(model, tokens, with_last(tokens, 40)) == {5}
    make_bidirectional(model)
    # Three layers with a window of four reach over nine tokens.
    assert changed_places(model, tokens, with_last(tokens, 40)) == set(range(6))
    assert saved_with_model(model)
    with pytest.raises(ConfigError, match="not causal in every layer"):
        check_causal(model)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_unseen_by_a_bidirectional_decoder(name, side):
    model = make_bidirectional(built(DECODERS[name]))
    tokens, padding = torch.arange(10, 15), torch.full((3,), 7)
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(padding)
    row, mask = (torch.cat(pair if side == "right" else pair[::-1]) for pair in ((tokens, padding), (ones, zeros)))
    other = torch.where(mask == 1, row, 50)
    assert changed_places(model, row, other, mask) == set()


def test_a_class_that_makes_its_own_mask_is_given_a_finished_one():
    model, tokens = built(lambda: Stubborn(hf.LlamaConfig(**SMALL))), torch.arange(10, 16)
    make_bidirectional(model)
    assert changed_places(model, tokens, with_last(tokens, 40)) == set(range(6))
    assert not saved_with_model(model)
    reference = make_bidirectional(built(lambda: hf.LlamaModel(hf.LlamaConfig(**SMALL))))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    ids = tokens.expand(2, -1)
    with torch.no_grad():
        first, second = (each(input_ids=ids, attention_mask=mask).last_hidden_state[mask == 1] for each in (model, reference))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_class_that_honours_nothing_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"Deaf stays causal in 3 of its 3 layers .* Set bidirectional to false"):
        make_bidirectional(built(lambda: Deaf(hf.LlamaConfig(**SMALL))))
    with pytest.raises(ConfigError, match="MambaModel stays causal"):
        make_bidirectional(built(lambda: hf.MambaModel(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99))))
    with pytest.raises(ConfigError, match="no text decoder with layers"):
        make_bidirectional(built(lambda: hf.CLIPTextModel(hf.CLIPTextConfig(hidden_size=32, num_hidden_layers=1, vocab_size=99))))


def test_one_causal_layer_among_bidirectional_ones_is_found():
    """Black-box runs cannot: the other layers let every token see every other one."""
    model, tokens = make_bidirectional(built(DECODERS["llama"])), torch.arange(10, 16)

    def make_causal(_, args, kwargs):
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e30)}

    model.layers[1].register_forward_pre_hook(make_causal, with_kwargs=True)
    assert changed_places(model, tokens, with_last(tokens, 40)) == set(range(6))
    with pytest.raises(ConfigError, match=r"in 1 of its 3 layers \(the first is 1\)"):
        check_bidirectional(model)


def test_padding_that_is_seen_is_found():
    model = make_bidirectional(built(DECODERS["llama"]))
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True)
    with pytest.raises(ConfigError, match="see padding"):
        check_bidirectional(model)


def test_a_check_leaves_the_model_as_it_was():
    model = built(DECODERS["llama"]).train()
    model.layers[0].eval()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    hooks = causality.decoder_layers(model)[0]._forward_pre_hooks.copy()
    check_causal(model)
    assert model.training and not model.layers[0].training and model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert causality.decoder_layers(model)[0]._forward_pre_hooks == hooks


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "idefics3", "smolvlm", "paligemma"])
def test_vision_language_models_become_bidirectional_and_stay_so_when_saved(tmp_path, family):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    save_model(tmp_path / "base", family)
    model = hf.AutoModel.from_pretrained(tmp_path / "base").eval()
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "base")
    image = processor.image_token
    image = f"<|vision_start|>{image}<|vision_end|>" if family.startswith("qwen") else image
    batch = processor(text=[f"{image}abcd"], images=[[picture(0)]] if family in ("idefics3", "smolvlm") else [picture(0)], return_tensors="pt")
    place = int((batch["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    last = len(batch["input_ids"][0]) - 1
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, last] += 1

    def seen_from(loaded):
        with torch.no_grad():
            first, second = (loaded(**each).last_hidden_state[0] for each in (batch, other))
        return {name for name, at in {"image": place, "text": last - 1}.items() if not torch.equal(first[at], second[at])}

    if family != "paligemma":  # its images and its prompt see each other anyway
        assert seen_from(model) == set()
    make_bidirectional(model)
    assert seen_from(model) == {"image", "text"}
    model.save_pretrained(tmp_path / "saved")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert seen_from(loaded) == {"image", "text"}
    check_bidirectional(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=0, atol=1e-6)
