"""An open_clip model and its tokenizer in memory, for the encoder and for training alike."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.config import ConfigError
from pipeline.encoders.openclip_weights import Resolved
from pipeline.encoders.sentence_model import without_progress_bars


def load_open_clip(found: Resolved, cache_dir: str | None) -> tuple[Any, Any]:
    """The model, on the CPU in float32, and its tokenizer. Downloads the weights where they are not here yet.

    Raises ConfigError if they cannot be fetched.
    """
    import open_clip

    name = found.complete()
    with without_progress_bars(), _without_root_messages():
        try:
            model = open_clip.create_model(name, found.pretrained, cache_dir=cache_dir, weights_only=True, require_pretrained=True, **found.moved())
        except RuntimeError as error:
            if not str(error).startswith("Failed to download"):
                raise
            raise ConfigError(
                f"the weights {found.pretrained!r} of {name} cannot be fetched ({' '.join(str(error).split())}); go online once with this machine, "
                "or name a checkpoint file that every worker can read: pretrained=weights.pt"
            ) from error
        tokenizer = open_clip.get_tokenizer(found.tokenizer_name(name), cache_dir=cache_dir)
    actual = {**model.visual.preprocess_cfg}
    assert _plain(actual) == _plain(found.preprocess), f"the model prepares images by {actual}, planned was {found.preprocess}"
    return model, tokenizer


@contextlib.contextmanager
def _without_root_messages() -> Iterator[None]:
    """open_clip tells each step of loading, on the root logger; warnings stay."""

    def is_warning(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logging.getLogger().addFilter(is_warning)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_warning)


def padding_of(model: Any) -> int | None:
    """The token that fills up texts, where the text tower takes texts shorter than its context: those of Hugging Face do, CLIP's own does not."""
    from open_clip.hf_model import HFTextEncoder

    text = getattr(model, "text", None)
    return int(text.config.pad_token_id) if isinstance(text, HFTextEncoder) else None


def lengths_of(tokens_NT: torch.Tensor, padding: int | None) -> torch.Tensor:
    """Number of tokens up to the last that is not padding, at least 1; without a padding token all of them."""
    if padding is None:
        return torch.full((len(tokens_NT),), tokens_NT.shape[1])
    place_T = torch.arange(1, tokens_NT.shape[1] + 1)
    lengths_N: torch.Tensor = ((tokens_NT != padding) * place_T).amax(dim=1).clamp(min=1)
    return lengths_N


def _plain(preprocess: dict[str, Any]) -> dict[str, Any]:
    size = preprocess["size"]
    values = {**preprocess, "size": (size, size) if isinstance(size, int) else size}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
