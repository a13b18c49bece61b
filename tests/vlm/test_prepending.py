import pytest
import torch
import transformers as hf

from pipeline.config import ConfigError
from pipeline.vlm.prepending import places_of, prepended, prepending

PLACEHOLDER, LAYERS, SPAN, READ = 9, 5, (1, 4), 4
CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    torch.manual_seed(0)
    config = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}[request.param](**CONFIG, **IDS, initializer_range=0.2)
    return hf.AutoModel.from_config(config).double().eval()


def by_hand(model, tokens, span, read):
    """One row without padding: the layers run one after the other, the placeholder's state set before those of `span`."""
    states = model.embed_tokens(tokens[None])
    positions = torch.arange(len(tokens))[None]
    rotary = model.rotary_emb(states, positions)
    length = len(tokens)
    mask = torch.zeros(1, 1, length, length, dtype=states.dtype).masked_fill(torch.ones(length, length).triu(1).bool(), -1e30)
    for index, layer in enumerate(model.layers[:read]):
        if span[0] <= index < span[1]:
            states = states.clone()
            states[0, tokens.tolist().index(PLACEHOLDER)] = states[0, -1]
        states = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return states[0, -1]


def rows():
    generator = torch.Generator().manual_seed(1)
    lengths, before = [4, 7, 5], [1, 2, 0]
    texts = [torch.randint(10, 99, (length,), generator=generator) for length in lengths]
    return [torch.cat([text[:place], torch.tensor([PLACEHOLDER]), text[place:]]) for text, place in zip(texts, before, strict=True)]


def padded(tokens, side, width):
    filler = torch.zeros(width - len(tokens), dtype=torch.long)
    parts, masks = [tokens, filler], [torch.ones_like(tokens), filler]
    return torch.cat(parts if side == "right" else parts[::-1]), torch.cat(masks if side == "right" else masks[::-1])


def read_at(model, tokens, side, width):
    """The last tokens' states after layer READ, before any final norm."""
    ids, mask = (torch.stack(parts) for parts in zip(*(padded(row, side, width) for row in tokens), strict=True))
    place, last = places_of(ids, mask, PLACEHOLDER)
    with prepending(model.layers, SPAN, place_B=place, last_B=last):
        states = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states[READ]
    return states[torch.arange(len(ids)), last]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [8, 12])
def test_it_is_what_layers_run_by_hand_give_at_an_intermediate_layer(model, side, width):
    with torch.no_grad():
        found = read_at(model, rows(), side, width)
        expected = torch.stack([by_hand(model, row, SPAN, READ) for row in rows()])
        without = torch.stack([by_hand(model, row, (0, 0), READ) for row in rows()])
    # Behind padding the same text has other positions, and transformers takes their angles in float32 whatever the model is.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if side == "right" else 1e-5)
    assert (found - without).abs().max() > 0.01


def test_earlier_tokens_learn_of_later_ones(model):
    ids = rows()[1][None]
    other = torch.cat([ids[:, :-2], ids[:, -2:].flip(1)], dim=1)

    def early(tokens):
        place, last = places_of(tokens, torch.ones_like(tokens), PLACEHOLDER)
        with torch.no_grad(), prepending(model.layers, SPAN, place_B=place, last_B=last):
            return model(input_ids=tokens, use_cache=False).last_hidden_state[:, 3]

    with torch.no_grad():
        plain = [model(input_ids=tokens, use_cache=False).last_hidden_state[:, 3] for tokens in (ids, other)]
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=1e-12)
    assert (early(ids) - early(other)).abs().max() > 1e-3


def test_hooks_are_gone_afterwards_also_after_an_error(model):
    ids = rows()[1][None]
    place, last = places_of(ids, torch.ones_like(ids), PLACEHOLDER)
    with pytest.raises(RuntimeError, match="meant"), prepending(model.layers, SPAN, place_B=place, last_B=last):
        raise RuntimeError("meant")
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_gradients_flow_into_the_last_token_through_the_placeholder():
    states = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    place, last = torch.tensor([0, 1]), torch.tensor([3, 2])
    assert torch.autograd.gradcheck(lambda x: prepended(x, place_B=place, last_B=last), states)
    prepended(states, place_B=place, last_B=last)[0, 0].sum().backward()
    assert states.grad[0, 3].tolist() == [1, 1, 1] and states.grad[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("span", [(0, 3), (3, 3), (4, 2), (1, LAYERS + 1)])
def test_layers_that_are_not_there_are_refused(model, span):
    ones = torch.ones(1, dtype=torch.long)
    with (
        pytest.raises(ConfigError, match=rf"prepending=\[{span[0]}, {span[1]}\] must be two layers, 1 <= first < second <= {LAYERS}"),
        prepending(model.layers, span, place_B=ones, last_B=ones * 2),
    ):
        pass


def test_a_row_without_a_placeholder_is_named():
    ids = torch.tensor([[PLACEHOLDER, 11, 12], [PLACEHOLDER, 11, 12], [10, 11, 12]])
    with pytest.raises(ValueError, match="row 1 has no placeholder"):
        places_of(ids, torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]]), PLACEHOLDER)
