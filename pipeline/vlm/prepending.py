"""Token Prepending (arXiv 2412.11556, ACL 2025): the sentence's state stands before the sentence, without training.

A prompt has a placeholder token before the text. Before each layer a <= l < b the placeholder's state is replaced by the last
token's, which is what the layer before made of the whole sentence: so tokens that attend causally see what comes after them.
The vector is read at an intermediate layer, at the last token.

The paper's ranges, counted from 0 as here, with the layer that is read: Llama-2-7B 1 to 7, layer 27; Llama-2-13B 1 to 7,
Llama-3-8B 1 to 3, Qwen2-7B and Gemma2-9B 1 to 6, each the last but one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.config import ConfigError


@contextlib.contextmanager
def prepending(layers: Sequence[nn.Module], span: tuple[int, int], *, place_B: torch.Tensor, last_B: torch.Tensor) -> Iterator[None]:
    """Within it, each forward of the decoder `layers` has the state of row b's token `last_B[b]` at `place_B[b]` too.

    `span`: before the layers from the first to below the second number. The forward must be without a key-value cache, over
    as many rows as places. Gradients flow through. Raises ConfigError if there are no such layers.
    """
    check_span(span, len(layers))
    if not bool((place_B < last_B).all()):
        raise ValueError(f"a placeholder must stand before the last token; places {place_B.tolist()}, last tokens {last_B.tolist()}")

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs["hidden_states"]
        states_BTD = prepended(given, place_B=place_B.to(given.device), last_B=last_B.to(given.device))
        return ((states_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states_BTD})

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers[span[0] : span[1]]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prepended(states_BTD: torch.Tensor, *, place_B: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
    """The states with those of `last_B` at `place_B` too: equation 2 of the paper. What was given stays as it is."""
    if len(states_BTD) != len(place_B):
        raise ValueError(f"{len(place_B)} placeholders for {len(states_BTD)} rows")
    rows_B = torch.arange(len(states_BTD), device=states_BTD.device)
    here_BT1 = (torch.arange(states_BTD.shape[1], device=states_BTD.device) == place_B[:, None])[..., None]
    return torch.where(here_BT1, states_BTD[rows_B, last_B][:, None], states_BTD)


def places_of(input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row has its first token `token_id`, and its last token that is not padding: `place_B` and `last_B`.

    Raises ValueError naming the first row that has no such token.
    """
    found_BT = (input_ids_BT == token_id) & mask_BT.bool()
    without = (~found_BT.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"row {without[0]} has no placeholder (token {token_id}): its template must put one before the text")
    return found_BT.int().argmax(dim=1), mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1)


def check_span(span: tuple[int, int], num_layers: int) -> None:
    """Raises ConfigError unless there are layers from the first to below the second number, the first one excepted.

    Before layer 0 the last token's state is its embedding, the same in every row.
    """
    if not 1 <= span[0] < span[1] <= num_layers:
        raise ConfigError(
            f"prepending={list(span)} must be two layers, 1 <= first < second <= {num_layers}; the paper has [1, {min(7, num_layers)}] for Llama-2"
        )
