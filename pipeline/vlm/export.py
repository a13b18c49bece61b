"""Save an encoder: weights, processor, head, settings and card, in a folder that other packages load too.

The folder appears whole or not at all. Beside tessera.json it has what transformers and PEFT read; and what
sentence-transformers reads, where that gives the same vectors.
"""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ConfigError
from pipeline.encoders.new_folder import appearing, check_new
from pipeline.vlm.card import Card, card_text
from pipeline.vlm.heads import num_parameters
from pipeline.vlm.merged import merged
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.saved import inside, sealed
from pipeline.vlm.sentence_files import chat_template, obstacle, write_sentence_files
from pipeline.vlm.spec import HEAD, EncoderSpec

log = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Where the adapter of merged weights is kept, for whoever wants it apart."""


def save_encoder(
    folder: Path, model: torch.nn.Module, *, preparer: Preparer, spec: EncoderSpec, card: Card, head: torch.nn.Module | None = None
) -> EncoderSpec:
    """Save a model, wrapped by PEFT or not, as an encoder; the spec with its fingerprint.

    `spec.adapter` None saves whole weights, an adapter merged into them (in a copy on the CPU) and kept in
    `adapter/` too; `.` saves the adapter alone, on the base that `spec.base` names. Raises ConfigError if the folder
    is not empty, or if spec, model and head contradict each other.
    """
    _check(folder, model, spec, head)
    with appearing(folder) as part:
        spec = _write(part, model, preparer=preparer, spec=spec, card=card, head=head)
    log.info("saved encoder %s with fingerprint %s", folder, spec.fingerprint)
    return spec


def _check(folder: Path, model: torch.nn.Module, spec: EncoderSpec, head: torch.nn.Module | None) -> None:
    check_new(folder)
    if (head is None) != (spec.head is None):
        raise ConfigError("a spec with a head needs its weights (head=), and weights of a head a spec that says their shape (spec.head)")
    if spec.adapter is None and spec.base.model != ".":
        raise ConfigError(f"whole weights are saved in the folder itself: base.model must be '.', not {spec.base.model!r}; or set adapter to '.'")
    if spec.adapter is not None and (spec.adapter != "." or inside(spec.base.model) or not hasattr(model, "peft_config")):
        raise ConfigError("an adapter alone is saved with adapter: '.', the base model's name or folder in base.model, and a model that PEFT wrapped")


def _write(part: Path, model: torch.nn.Module, *, preparer: Preparer, spec: EncoderSpec, card: Card, head: torch.nn.Module | None) -> EncoderSpec:
    reason = obstacle(spec, model, preparer)
    _write_weights(part, model, spec)
    _write_processor(part, preparer, None if reason else chat_template(spec, preparer))
    if head is not None:
        from safetensors.torch import save_file

        save_file({name: values.detach().cpu().contiguous() for name, values in head.state_dict().items()}, part / HEAD)
        log.info("head of %s with %d parameters", spec.head.kind if spec.head else "", num_parameters(head))
    if spec.page is not None and spec.page.font is not None:
        font = Path(spec.page.font).expanduser()
        shutil.copyfile(font, part / f"font{font.suffix}")
        spec = spec.model_copy(update={"page": spec.page.model_copy(update={"font": f"font{font.suffix}"})})
    if reason is None:
        write_sentence_files(part, spec, int(_unwrapped(model).config.get_text_config().hidden_size))
    else:
        log.info("no files for sentence-transformers: %s", reason)
    spec = sealed(spec.model_copy(update={"training": card.training()}), part)
    (part / "README.md").write_text(card_text(card, spec, sentence_transformers=reason), encoding="utf-8")
    spec.save(part)
    return spec


def _write_weights(part: Path, model: Any, spec: EncoderSpec) -> None:
    if not hasattr(model, "peft_config"):
        model.save_pretrained(part)
    elif spec.adapter is None:
        _write_adapter(part / ADAPTER, model, None, None)
        merged(model).save_pretrained(part)
    else:
        _write_adapter(part, model, spec.base.model, spec.base.revision)


def _write_adapter(folder: Path, model: Any, base: str | None, revision: str | None) -> None:
    """PEFT's files of the adapter. What it was loaded from may be a path of this machine's cache; `base` is what others find."""
    config = model.peft_config[model.active_adapter]
    before = config.base_model_name_or_path, config.revision
    config.base_model_name_or_path, config.revision = base or before[0], revision
    try:
        model.save_pretrained(folder)
    finally:
        config.base_model_name_or_path, config.revision = before
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card says nothing yet


def _write_processor(part: Path, preparer: Preparer, template: str | None) -> None:
    processor = copy.deepcopy(preparer.processor)
    # The side that `Preparer.collate` pads: the first token is then at place 0, which other packages take for granted.
    processor.tokenizer.padding_side = "right"
    if template is not None:
        processor.chat_template = processor.tokenizer.chat_template = template
    processor.save_pretrained(part)


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
