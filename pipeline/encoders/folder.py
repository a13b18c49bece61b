"""A saved folder of a two-tower or a sentence encoder: what its own package loads, and beside it tessera.json, which makes it an encoder.

Of a vision-language model the same file says more: `pipeline.vlm.spec`.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pydantic

from pipeline.config import ConfigError, Model, Ref
from pipeline.encoders.new_folder import appearing, check_new
from pipeline.vlm.card import Card, folder_card_text
from pipeline.vlm.spec import FILE, check_files, digests, read_spec, write_spec

log = logging.getLogger(__name__)

FORMAT = 1
"""Rises whenever an older release would read a file wrongly."""

Kind = Literal["openclip", "sentence"]


class FolderSpec(Model):
    """What tessera.json says of a folder of one of these kinds."""

    format: int = FORMAT
    """Of this file."""
    encoder: Kind
    """Which encoder reads the folder."""
    args: dict[str, Any] = {}
    """Its arguments, but for the folder itself."""
    training: dict[str, Any] = {}
    """The run that made it: its name, what it began with, data, settings. No vector depends on it."""
    files: dict[str, str] = {}
    """sha256 of every file of the folder that is read, by its path."""
    fingerprint: str = ""
    """That of the encoder."""

    def ref(self, folder: Path, device: str | None = None) -> Ref:
        """The encoder of `folder`, as a job file names it."""
        where = {"openclip": f"local-dir:{folder}", "sentence": str(folder)}[self.encoder]
        target = {"openclip": "pipeline.encoders.openclip:OpenClip", "sentence": "pipeline.encoders.sentence:Sentence"}[self.encoder]
        return Ref(target=target, args={"model": where, "device": device, **self.args})


def load_folder_spec(folder: Path) -> FolderSpec:
    """The spec of a folder, every file of which is as it was saved. Raises ConfigError naming the file or key that is not."""
    path = folder / FILE
    values = read_spec(folder)
    if values.get("format", 0) > FORMAT:
        raise ConfigError(f"{path} is of format {values['format']}, and this release reads up to {FORMAT}: upgrade (pip install -U tessera)")
    try:
        spec = FolderSpec.model_validate(values)
    except pydantic.ValidationError as error:
        problems = (f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})" for problem in error.errors())
        raise ConfigError("\n".join(problems)) from None
    check_files(spec.files, folder)
    return spec


def save_folder(folder: Path, write: Callable[[Path], None], *, spec: FolderSpec, card: Card) -> FolderSpec:
    """Save an encoder: `write` puts the files of its own package into a folder, which appears whole or not at all. The spec with its fingerprint.

    Raises ConfigError if the folder is not empty.
    """
    check_new(folder)
    with appearing(folder) as part:
        write(part)
        fingerprint = spec.ref(part).build().fingerprint
        spec = spec.model_copy(update={"files": digests(part), "training": card.training(), "fingerprint": fingerprint})
        (part / "README.md").write_text(folder_card_text(card, spec.encoder, {**spec.args, "fingerprint": fingerprint}), encoding="utf-8")
        write_spec(spec, part)
    log.info("saved encoder %s with fingerprint %s", folder, spec.fingerprint)
    return spec
