"""TwoTower: an open_clip model while it is trained: which parts of it stay as they are, and vectors of images and texts in one chunk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import ConfigError, nearest
from pipeline.encoders.openclip_model import lengths_of, padding_of
from pipeline.encoders.pixels import Pixels
from pipeline.training.remembered import Remembered

TOWERS = ("image", "text")


@dataclass(frozen=True)
class Row:
    """One image or one text, as the model takes it; `key`: a hash of it."""

    key: bytes
    pixels: np.ndarray | None = None
    """uint8 (h, w, 3), at the model's size."""
    tokens: Tensor | None = None
    """int64 (T,), padded to the model's context."""


@dataclass(frozen=True)
class _Tower:
    """A tower in two parts, one after the other."""

    frozen: Callable[[Tensor], Tensor] | None
    """Its beginning, if nothing in there is trained."""
    rest: Callable[[Tensor], Tensor]
    """What comes after that: the whole tower if there is no such beginning."""


class TwoTower(nn.Module):
    """Both towers of an open_clip model, some of its weights frozen.

    Frozen parts stay in eval mode, and batch norms everywhere keep their statistics: a row's vector must not depend on its batch, and a part
    that is locked must not move. What a frozen tower gives (of timm's and of Hugging Face's: without its head) is remembered, `remember_mib` a tower.
    """

    def __init__(self, model: Any, pixels: Pixels, *, locked: Mapping[str, int], remember_mib: int) -> None:
        super().__init__()
        self.model = model
        self._pixels, self._padding = pixels, padding_of(model)
        _lock(model, locked)
        self._remembered = {tower: Remembered(remember_mib) for tower in TOWERS}
        self.train()

    def train(self, mode: bool = True) -> "TwoTower":
        """Training mode for what is trained."""
        super().train(mode)
        for part in self.model.modules():
            weights = list(part.parameters())
            if isinstance(part, _BatchNorm) or (weights and not any(each.requires_grad for each in weights)):
                part.eval()
        return self

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Vectors (N, D), not normalised."""
        device = next(self.model.parameters()).device
        images = [place for place, row in enumerate(rows) if row.pixels is not None]
        texts = [place for place, row in enumerate(rows) if row.pixels is None]
        found = []
        if images:
            found.append(self._vectors("image", [rows[place] for place in images], self._batch_of_images, device))
        if texts:
            found.append(self._vectors("text", [rows[place] for place in texts], self._batch_of_texts, device))
        return torch.cat(found)[torch.tensor([*images, *texts]).argsort().to(device)]

    def _vectors(self, name: str, rows: list[Row], batch: Callable[[Sequence[Row], torch.device], Tensor], device: torch.device) -> Tensor:
        tower = self._image_tower() if name == "image" else self._text_tower()
        frozen = tower.frozen
        if frozen is None:
            return tower.rest(batch(rows, device))
        outputs = self._remembered[name].get([row.key for row in rows], lambda places: frozen(batch([rows[place] for place in places], device)))
        return tower.rest(outputs.to(device))

    def _image_tower(self) -> _Tower:
        from open_clip.timm_model import TimmModel

        visual = self.model.visual
        if isinstance(visual, TimmModel) and _is_frozen(visual.trunk):
            return _Tower(visual.trunk, visual.head)
        return _Tower(self.model.encode_image, nn.Identity()) if _is_frozen(visual) else _Tower(None, self.model.encode_image)

    def _text_tower(self) -> _Tower:
        text: Any = getattr(self.model, "text", None)
        if self._padding is not None and _is_frozen(text.transformer):
            return _Tower(lambda tokens: _pooled(text, tokens), text.proj)
        frozen = not any(each.requires_grad for each in _text_weights(self.model))
        return _Tower(self.model.encode_text, nn.Identity()) if frozen else _Tower(None, self.model.encode_text)

    def _batch_of_images(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        return self._pixels.batch([row.pixels for row in rows if row.pixels is not None], device, next(self.model.parameters()).dtype)

    def _batch_of_texts(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        tokens = torch.stack([row.tokens for row in rows if row.tokens is not None])
        return tokens[:, : int(lengths_of(tokens, self._padding).max())].to(device)


def _pooled(text: Any, tokens: Tensor) -> Tensor:
    """What open_clip's HFTextEncoder.forward has before its projection."""
    mask = (tokens != text.config.pad_token_id).long()
    pooled: Tensor = text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)
    return pooled


def check_towers(locked: Mapping[str, int]) -> None:
    """Raises ConfigError unless each key is a tower, and each number a number of groups."""
    for name, groups in locked.items():
        if name not in TOWERS:
            raise ConfigError(f"locked.{name}: there is no such tower{nearest(name, TOWERS)}; the towers are {' and '.join(TOWERS)}")
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 0:
            raise ConfigError(f"locked.{name}={groups!r} must be how many of its last groups of layers are trained all the same: 0, 1, 2, ...")


def _lock(model: Any, locked: Mapping[str, int]) -> None:
    """As open_clip locks towers. The logit scale belongs to open_clip's loss: no vector depends on it.

    Raises ConfigError if the model has no such groups, or nothing would be trained.
    """
    model.requires_grad_(True)
    for name in ("logit_scale", "logit_bias"):
        if getattr(model, name, None) is not None:
            getattr(model, name).requires_grad_(False)
    try:
        if "image" in locked:
            model.lock_image_tower(unlocked_groups=locked["image"])
        if "text" in locked:
            model.lock_text_tower(locked["text"])
    except (RuntimeError, NotImplementedError, KeyError, IndexError, AssertionError) as error:
        raise ConfigError(f"locked={dict(locked)} is not possible for this model: {type(error).__name__}: {error}") from error
    if all(_is_frozen(part) for part in (model.visual, nn.ParameterList(_text_weights(model)))):
        raise ConfigError(f"locked={dict(locked)} leaves nothing to train: unlock a tower, or give one of them a number of groups above 0")


def _text_weights(model: Any) -> list[nn.Parameter]:
    """Those of the text tower, which CLIP's own class has beside the image tower, without a module of its own."""
    return [weights for name, weights in model.named_parameters() if not name.startswith(("visual.", "logit_"))]


def _is_frozen(part: nn.Module) -> bool:
    return not any(weights.requires_grad for weights in part.parameters())
