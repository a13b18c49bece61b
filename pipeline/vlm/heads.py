"""Trainable heads: hidden states of a backbone to one vector a row, where a plain pooling mode is not enough.

* `LatentAttention`: NV-Embed (arXiv 2405.17428, section 3.1). Every token attends to trained latents; mean over tokens.
* `MultiLayerPooling`: PoolingAndAttn (arXiv 2409.02727). Trained latents attend to one vector of each layer; mean over latents.

Both formulas are reconstructed: the papers give the attention, the residuals and the mean; the layer norms before attention
and feed-forward, the bias-free projections and the GEGLU of four times the width are from memory of the authors' code.
Their published shapes are large (0.74 and 1.28 billion parameters at width 4096); the defaults here are the small ones.
"""

import math
from collections.abc import Sequence
from typing import Literal

import pydantic
import torch
from torch import nn
from torch.nn import functional

from pipeline.config import Model

HEADS = 8
LARGEST_HEAD_DIM = 256
LATENTS = {"latent-attention": 512, "multi-layer": 768}
"""As published, both."""
FEED_FORWARD = 4
"""Width of the feed-forward layers, in widths of the model."""


class HeadShape(Model):
    """A head as a job file and a saved encoder name it."""

    kind: Literal["latent-attention", "multi-layer"]
    """One vector of all tokens of the last layer, or of one vector a layer."""
    latents: pydantic.PositiveInt | None = None
    """Null for 512 (latent-attention) or 768 (multi-layer), as published."""
    heads: pydantic.PositiveInt = HEADS
    """Heads of the attention."""
    head_dim: pydantic.PositiveInt | None = None
    """Width of a head; null for the model's width over the heads, 256 at most."""
    vectors: Literal["last", "mean"] = "last"
    """multi-layer: what stands for a layer, its last token (causal models) or the mean of its tokens (bidirectional ones)."""


class LatentAttention(nn.Module):
    """NV-Embed's head: softmax(Q K^T / sqrt(head_dim)) V with Q of the tokens, K and V of the latents; residual, GEGLU, residual, mean."""

    def __init__(self, dim: int, *, latents: int = LATENTS["latent-attention"], heads: int = HEADS, head_dim: int | None = None) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.attention = CrossAttention(dim, heads=heads, head_dim=head_dim)
        self.feed_forward = FeedForward(dim)

    def forward(self, states_BTD: torch.Tensor, mask_BT: torch.Tensor, prompt_tokens_B: torch.Tensor | None = None) -> torch.Tensor:
        """One vector a row: (B, D), in the number format of the weights.

        `mask_BT`: 1 at tokens, 0 at padding on either side. `prompt_tokens_B`: so many tokens at the start of each row are
        left out of the mean. A row with nothing left gives zeros.
        """
        kept_BT = kept_tokens(mask_BT, prompt_tokens_B)
        # Whatever padding holds, infinities too, must not get into a sum.
        states_BTD = states_BTD.to(self.latents.dtype).masked_fill(~kept_BT[..., None], 0.0)
        states_BTD = states_BTD + self.attention(states_BTD, self.latents[None])
        states_BTD = states_BTD + self.feed_forward(states_BTD)
        return _mean(states_BTD, kept_BT)


class MultiLayerPooling(nn.Module):
    """PoolingAndAttn's head: latents attend to one vector a layer, which carries an embedding of its layer; residual, GEGLU, residual, mean."""

    def __init__(
        self,
        dim: int,
        *,
        layers: int,
        latents: int = LATENTS["multi-layer"],
        heads: int = HEADS,
        head_dim: int | None = None,
        vectors: Literal["last", "mean"] = "last",
    ) -> None:
        super().__init__()
        self.vectors = vectors
        self.layer_embeddings = nn.Parameter(torch.randn(layers, dim) * 0.02)
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.attention = CrossAttention(dim, heads=heads, head_dim=head_dim)
        self.feed_forward = FeedForward(dim)

    def forward(self, layers_BTD: Sequence[torch.Tensor], mask_BT: torch.Tensor, prompt_tokens_B: torch.Tensor | None = None) -> torch.Tensor:
        """One vector a row: (B, D), in the number format of the weights.

        `layers_BTD`: the states after each layer, the first one's first, without the embeddings before it. Mask and prompt
        as in `LatentAttention`. Raises ValueError if there are not as many layers as embeddings of layers.
        """
        if len(layers_BTD) != len(self.layer_embeddings):
            raise ValueError(f"the head was made for {len(self.layer_embeddings)} layers and is given {len(layers_BTD)}")
        kept_BT = kept_tokens(mask_BT, prompt_tokens_B)
        return self.attend(torch.stack([self._vector(states_BTD, kept_BT) for states_BTD in layers_BTD], dim=1))

    def attend(self, vectors_BLD: torch.Tensor) -> torch.Tensor:
        """The same of one vector a layer: (B, layers, D) to (B, D). For who pools each layer as it comes, to keep no other state."""
        vectors_BLD = vectors_BLD.to(self.latents.dtype) + self.layer_embeddings
        latents_BRD: torch.Tensor = self.latents + self.attention(self.latents[None], vectors_BLD)
        latents_BRD = latents_BRD + self.feed_forward(latents_BRD)
        return latents_BRD.mean(dim=1)

    def _vector(self, states_BTD: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
        states_BTD = states_BTD.to(self.latents.dtype)
        if self.vectors == "mean":
            return _mean(states_BTD.masked_fill(~kept_BT[..., None], 0.0), kept_BT)
        last_B = kept_BT.shape[1] - 1 - kept_BT.flip(1).int().argmax(dim=1)
        return states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), last_B]


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence over another one, both normalised before. `head_dim` None: D / heads, 256 at most."""

    def __init__(self, dim: int, *, heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * (head_dim or max(1, min(dim // heads, LARGEST_HEAD_DIM)))
        self.norm, self.norm_context = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, states_BTD: torch.Tensor, context_BCD: torch.Tensor) -> torch.Tensor:
        """What each of T states takes from C of the context: (B, T, D). Either may be one for the whole batch, (1, ...)."""
        rows = max(len(states_BTD), len(context_BCD))
        query = self._split(self.query(self.norm(states_BTD)), rows)
        key, value = (self._split(half, rows) for half in self.key_value(self.norm_context(context_BCD)).chunk(2, dim=-1))
        mixed_BHTE = functional.scaled_dot_product_attention(query, key, value, scale=1 / math.sqrt(query.shape[-1]))
        out_BTD: torch.Tensor = self.out(mixed_BHTE.transpose(1, 2).flatten(2))
        return out_BTD

    def _split(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        # Expanded after its projection, so that what the whole batch shares is computed once.
        one, length, inner = values.shape
        return values.view(one, length, self.heads, inner // self.heads).transpose(1, 2).expand(rows, -1, -1, -1)


class FeedForward(nn.Module):
    """GEGLU (arXiv 2002.05202): half of a projection times the GELU of the other half."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.wide = nn.Linear(dim, 2 * FEED_FORWARD * dim)
        self.narrow = nn.Linear(FEED_FORWARD * dim, dim)

    def forward(self, states_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        value, gate = self.wide(self.norm(states_BTD)).chunk(2, dim=-1)
        out_BTD: torch.Tensor = self.narrow(value * functional.gelu(gate))
        return out_BTD


def head_of(shape: HeadShape, dim: int, *, layers: int) -> LatentAttention | MultiLayerPooling:
    """The head of a shape for a backbone of width `dim` with so many layers, its weights random."""
    latents = shape.latents or LATENTS[shape.kind]
    if shape.kind == "latent-attention":
        return LatentAttention(dim, latents=latents, heads=shape.heads, head_dim=shape.head_dim)
    return MultiLayerPooling(dim, layers=layers, latents=latents, heads=shape.heads, head_dim=shape.head_dim, vectors=shape.vectors)


def num_parameters(module: nn.Module) -> int:
    """How many numbers a module holds. Works on the meta device: nothing needs to be in memory."""
    return sum(parameter.numel() for parameter in module.parameters())


def kept_tokens(mask_BT: torch.Tensor, prompt_tokens_B: torch.Tensor | None) -> torch.Tensor:
    """Which tokens count: no padding, and not the first `prompt_tokens_B` of each row. Boolean, (B, T)."""
    kept_BT = mask_BT.bool()
    if prompt_tokens_B is None:
        return kept_BT
    # Counted from the first token that is not padding.
    place_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) - mask_BT.int().argmax(dim=1, keepdim=True)
    return kept_BT & (place_BT >= prompt_tokens_B[:, None])


def _mean(states_BTD: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
    weights_BT1 = kept_BT[..., None].to(states_BTD.dtype)
    return (states_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1).clamp(min=1)
