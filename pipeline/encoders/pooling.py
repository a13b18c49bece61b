"""Token vectors to one vector a text: the pooling modes of sentence-transformers."""

from typing import Literal, get_args

import torch

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
MODES: tuple[str, ...] = get_args(Mode)


def pool(tokens_BTD: torch.Tensor, mask_BT: torch.Tensor, modes: tuple[Mode, ...], *, prompt_tokens: int = 0) -> torch.Tensor:
    """One vector a text: (B, D x number of modes), float32; several modes are joined end to end.

    `mask_BT`: 1 at tokens, 0 at padding on either side. `prompt_tokens`: how many tokens at the start are left out.
    """
    tokens_BTD = tokens_BTD.float()
    # Counted from the first token that is not padding.
    place_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) - mask_BT.int().argmax(dim=1, keepdim=True)
    kept_BT = mask_BT.bool() & (place_BT >= prompt_tokens)
    return torch.cat([_pool(tokens_BTD, kept_BT, place_BT, mode) for mode in modes], dim=1)


def _pool(tokens_BTD: torch.Tensor, kept_BT: torch.Tensor, place_BT: torch.Tensor, mode: Mode) -> torch.Tensor:
    if mode in ("cls", "lasttoken"):
        last = kept_BT.shape[1] - 1
        index_B = kept_BT.int().argmax(dim=1) if mode == "cls" else last - kept_BT.flip(1).int().argmax(dim=1)
        return tokens_BTD[torch.arange(len(tokens_BTD), device=tokens_BTD.device), index_B]
    if mode == "max":
        return tokens_BTD.masked_fill(~kept_BT[..., None], float("-inf")).amax(dim=1)
    weights_BT1 = (kept_BT * (place_BT + 1 if mode == "weightedmean" else 1))[..., None].float()
    sums_BD = (tokens_BTD * weights_BT1).sum(dim=1)
    total_B1 = weights_BT1.sum(dim=1).clamp(min=1e-9)
    return sums_BD / (total_B1.sqrt() if mode == "mean_sqrt_len_tokens" else total_B1)
