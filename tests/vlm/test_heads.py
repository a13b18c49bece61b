import math

import pytest
import torch

from pipeline.vlm.heads import HeadShape, LatentAttention, MultiLayerPooling, head_of, num_parameters

DIM, TOKENS, LAYERS = 12, 7, 3
PADDINGS = ["left", "right"]


@pytest.fixture
def latent():
    torch.manual_seed(0)
    return LatentAttention(DIM, latents=5, heads=3, head_dim=4).double()


@pytest.fixture
def multi():
    torch.manual_seed(0)
    return MultiLayerPooling(DIM, layers=LAYERS, latents=5, heads=3, head_dim=4).double()


def states(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(row, layer):
    centred = row - row.mean()
    return centred / (centred.pow(2).mean() + layer.eps).sqrt() * layer.weight + layer.bias


def slow_attention(attention, row, context):
    """One state over a context, one head at a time."""
    width = attention.query.weight.shape[0] // attention.heads
    query = attention.query.weight @ norm(row, attention.norm)
    both = [attention.key_value.weight @ norm(entry, attention.norm_context) for entry in context]
    mixed = []
    for head in range(attention.heads):
        here = slice(head * width, (head + 1) * width)
        keys = [entry[: len(query)][here] for entry in both]
        values = [entry[len(query) :][here] for entry in both]
        scores = [math.exp((query[here] @ key).item() / math.sqrt(width)) for key in keys]
        mixed.append(sum(score * value for score, value in zip(scores, values, strict=True)) / sum(scores))
    return attention.out.weight @ torch.cat(mixed)


def slow_feed_forward(layer, row):
    wide = layer.wide.weight @ norm(row, layer.norm) + layer.wide.bias
    value, gate = wide[: len(wide) // 2], wide[len(wide) // 2 :]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return layer.narrow.weight @ (value * gelu) + layer.narrow.bias


def slow_latent(head, row_TD):
    out = []
    for state in row_TD:
        mixed = state + slow_attention(head.attention, state, head.latents)
        out.append(mixed + slow_feed_forward(head.feed_forward, mixed))
    return sum(out) / len(out)


def slow_multi(head, vectors_LD):
    context = [vector + embedding for vector, embedding in zip(vectors_LD, head.layer_embeddings, strict=True)]
    out = []
    for latent in head.latents:
        mixed = latent + slow_attention(head.attention, latent, context)
        out.append(mixed + slow_feed_forward(head.feed_forward, mixed))
    return sum(out) / len(out)


def padded(row_TD, side, width, filling):
    """The row and its mask, padded to `width` with whatever `filling` is."""
    filler = torch.full((width - len(row_TD), row_TD.shape[1]), filling, dtype=row_TD.dtype)
    parts = [row_TD, filler] if side == "right" else [filler, row_TD]
    mask = [torch.ones(len(row_TD)), torch.zeros(len(filler))]
    return torch.cat(parts), torch.cat(mask if side == "right" else mask[::-1]).long()


def test_latent_attention_is_what_one_token_and_one_head_at_a_time_give(latent):
    rows = states(2, TOKENS, DIM)
    found = latent(rows, torch.ones(2, TOKENS))
    torch.testing.assert_close(found, torch.stack([slow_latent(latent, row) for row in rows]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("vectors", ["last", "mean"])
def test_multi_layer_pooling_is_what_one_latent_and_one_head_at_a_time_give(multi, vectors):
    multi.vectors = vectors
    layers = states(LAYERS, 2, TOKENS, DIM)
    taken = layers[:, :, -1] if vectors == "last" else layers.mean(dim=2)
    found = multi(list(layers), torch.ones(2, TOKENS))
    torch.testing.assert_close(found, torch.stack([slow_multi(multi, taken[:, row]) for row in range(2)]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("filling", [0.0, 1e6, float("nan"), float("inf")])
def test_padding_changes_no_vector_whatever_it_holds(latent, multi, side, filling):
    row = states(TOKENS, DIM)
    wide, mask = padded(row, side, TOKENS + 4, filling)
    torch.testing.assert_close(latent(wide[None], mask[None]), latent(row[None], torch.ones(1, TOKENS)), rtol=0, atol=1e-12)
    for vectors in ("last", "mean"):
        multi.vectors = vectors
        short = multi([row[None] + layer for layer in range(LAYERS)], torch.ones(1, TOKENS))
        torch.testing.assert_close(multi([wide[None] + layer for layer in range(LAYERS)], mask[None]), short, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", PADDINGS)
def test_tokens_of_a_prompt_are_left_out_of_the_mean(latent, multi, side):
    rows = [states(TOKENS, DIM), states(TOKENS - 2, DIM, seed=2)]
    prompts = torch.tensor([2, 3])
    wide, masks = (torch.stack(parts) for parts in zip(*(padded(row, side, TOKENS, 9.0) for row in rows), strict=True))
    expected = torch.stack([slow_latent(latent, row[skip:]) for row, skip in zip(rows, prompts, strict=True)])
    torch.testing.assert_close(latent(wide, masks, prompts), expected, rtol=0, atol=1e-12)
    multi.vectors = "mean"
    means = [row[skip:].mean(dim=0).expand(LAYERS, -1) for row, skip in zip(rows, prompts, strict=True)]
    torch.testing.assert_close(multi([wide] * LAYERS, masks, prompts), torch.stack([slow_multi(multi, mean) for mean in means]), rtol=0, atol=1e-12)


def test_a_row_that_is_all_prompt_gives_zeros_and_harms_no_gradient(latent):
    rows = states(2, TOKENS, DIM).requires_grad_()
    found = latent(rows, torch.ones(2, TOKENS), torch.tensor([0, TOKENS]))
    assert found[1].abs().max() == 0
    found.sum().backward()
    assert torch.isfinite(rows.grad).all()


def test_gradients_of_latent_attention_are_exact():
    torch.manual_seed(0)
    latent = LatentAttention(4, latents=2, heads=2, head_dim=2).double()
    rows, mask = states(2, 3, 4).requires_grad_(), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: latent(x, mask, torch.tensor([1, 0])), rows, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x: torch.func.functional_call(latent, {"latents": x}, (rows.detach(), mask)), latent.latents, fast_mode=True
    )


@pytest.mark.parametrize("vectors", ["last", "mean"])
def test_gradients_of_multi_layer_pooling_are_exact(vectors):
    torch.manual_seed(0)
    multi = MultiLayerPooling(4, layers=2, latents=2, heads=2, head_dim=2, vectors=vectors).double()
    layers, mask = states(2, 2, 3, 4).requires_grad_(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: multi(list(x), mask), layers, fast_mode=True)
    for name, values in (("latents", multi.latents), ("layer_embeddings", multi.layer_embeddings)):

        def of_values(x, name=name):
            return torch.func.functional_call(multi, {name: x}, (list(layers.detach()), mask))

        assert torch.autograd.gradcheck(of_values, values, fast_mode=True)


def test_published_shapes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        nv_embed = LatentAttention(4096, heads=8, head_dim=4096)
        pooling_and_attn = MultiLayerPooling(4096, layers=32, heads=32, head_dim=2048)
        small = LatentAttention(2048)
    assert round(num_parameters(nv_embed) / 1e9, 2) == 0.74
    assert round(num_parameters(pooling_and_attn) / 1e9, 2) == 1.28
    assert round(num_parameters(small.attention) / 1e6) == 17
    assert round(num_parameters(small.feed_forward) / 1e6) == 50
    assert small.latents.numel() == 512 * 2048


def test_a_shape_that_says_only_its_kind_is_small():
    with torch.device("meta"):
        latent = head_of(HeadShape(kind="latent-attention"), 4096, layers=32)
        multi = head_of(HeadShape(kind="multi-layer", vectors="mean"), 4096, layers=32)
    assert latent.latents.shape == (512, 4096)
    assert multi.latents.shape == (768, 4096) and multi.vectors == "mean"
    assert latent.attention.query.weight.shape == multi.attention.query.weight.shape == (8 * 256, 4096)
    assert num_parameters(multi) < 0.25e9


def test_another_number_of_layers_is_refused(multi):
    with pytest.raises(ValueError, match="made for 3 layers and is given 2"):
        multi([states(1, 2, DIM)] * 2, torch.ones(1, 2))


def test_states_of_another_number_format_are_taken(latent):
    rows = states(2, TOKENS, DIM)
    found = latent.float()(rows.bfloat16(), torch.ones(2, TOKENS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, latent(rows.bfloat16().float(), torch.ones(2, TOKENS)))
