"""Saved: the encoder of any folder that has a tessera.json, whatever kind it is. What a job file names as

encoder: {target: pipeline.encoders.saved:open_encoder, args: {folder: runs/mine/encoder}}
"""

from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.encoders import Encoder
from pipeline.encoders.folder import load_folder_spec
from pipeline.encoders.local_copy import local_copy
from pipeline.vlm.spec import FILE, read_spec


def open_encoder(
    folder: str,
    *,
    width: int | None = None,
    layer: int | None = None,
    device: str | None = None,
    cache_dir: str | None = None,
    token_budget: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Encoder:
    """The encoder that was saved in `folder`, a path or a URI, with the fingerprint it was saved with.

    `width`, `layer`, `cache_dir` and `token_budget` are for vision-language models: see `pipeline.vlm.saved.open_vlm`. Raises
    ConfigError if a file of it has changed, or if this release would make other vectors of it. `storage_options`: fsspec's, for a URI.
    """
    path = local_copy(folder, storage_options)
    asked = {"width": width, "layer": layer, "cache_dir": cache_dir, "token_budget": token_budget}
    values = read_spec(path)
    if not isinstance(values, dict) or "encoder" not in values:
        from pipeline.vlm import saved

        vlm: Encoder = saved.open_vlm(str(path), device=device, storage_options=storage_options, **asked)  # type: ignore[arg-type]
        return vlm
    return _of_folder(path, {name for name, value in asked.items() if value is not None}, device)


def _of_folder(path: Path, asked: set[str], device: str | None) -> Encoder:
    spec = load_folder_spec(path)
    if asked:
        raise ConfigError(f"{', '.join(sorted(asked))} is for vision-language models, and {path} holds a {spec.encoder} encoder; leave it out")
    encoder: Any = spec.ref(path, device).build()
    if encoder.fingerprint != spec.fingerprint:
        raise ConfigError(
            f"{path / FILE} names the fingerprint {spec.fingerprint}, and what it describes has {encoder.fingerprint}: it was edited, or this "
            "release reads it otherwise. Use the release that saved it, or train anew and fill a new table"
        )
    encoder.training = spec.training
    found: Encoder = encoder
    return found
