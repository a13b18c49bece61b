"""Saved: the vision-language encoder of a folder that has a tessera.json. For any kind: `pipeline.encoders.saved:open_encoder`."""

from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.encoders.local_copy import local_copy
from pipeline.encoders.vlm import Vlm
from pipeline.vlm.reading import TrainedHead
from pipeline.vlm.spec import FILE, HEAD, EncoderSpec, digests, load_spec, outside_digests
from pipeline.vlm.textimage import Page


def open_vlm(
    folder: str,
    *,
    width: int | None = None,
    layer: int | None = None,
    device: str | None = None,
    cache_dir: str | None = None,
    token_budget: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Vlm:
    """The encoder that was saved in `folder`, with the fingerprint it was saved with.

    `width` and `layer`: others than it was saved with, of those that were trained; its fingerprint is then another one, for
    a table of its own. Raises ConfigError if a file of it has changed, or if this release would make other vectors of it.
    """
    path = local_copy(folder, storage_options)
    spec = load_spec(path)
    use: dict[str, Any] = {"device": device, "cache_dir": cache_dir, "token_budget": token_budget, "storage_options": storage_options}
    encoder = _encoder(spec, path, **use)
    found = encoder.fingerprint
    if found != spec.fingerprint:
        raise ConfigError(
            f"{path / FILE} names the fingerprint {spec.fingerprint}, and what it describes has {found}: it was edited, or this release "
            "reads it otherwise. Use the release that saved it, or save the encoder anew and fill a new table"
        )
    asked = {name: value for name, value in (("width", width), ("layer", layer)) if value is not None}
    if not asked:
        return encoder
    return _encoder(_trained(spec, asked), path, **use)


def _trained(spec: EncoderSpec, asked: dict[str, int]) -> EncoderSpec:
    """The spec read at another width or layer. Raises ConfigError unless it was trained there: elsewhere vectors are of no use."""
    for name, value in asked.items():
        trained = {"width": spec.widths, "layer": spec.layers}[name]
        if value not in trained:
            raise ConfigError(f"{name}={value} was not trained; trained are {', '.join(map(str, trained)) or 'none but the one it was saved with'}")
    return spec.model_copy(update={"reading": spec.reading.model_copy(update=asked)})


def sealed(spec: EncoderSpec, folder: Path) -> EncoderSpec:
    """The spec with digests of the folder's files as they are now, and the fingerprint of the encoder that they make."""
    folder = folder.absolute()
    outside = Path(spec.base.model).expanduser()
    if not inside(spec.base.model) and outside.is_dir():
        spec = spec.model_copy(update={"base": spec.base.model_copy(update={"files": outside_digests(outside)})})
    spec = spec.model_copy(update={"files": digests(folder)})
    return spec.model_copy(update={"fingerprint": _encoder(spec, folder).fingerprint})


def inside(model: str) -> bool:
    """Whether a spec's base is a folder within its own."""
    return model == "." or model.startswith("./")


def _encoder(
    spec: EncoderSpec,
    folder: Path,
    *,
    device: str | None = None,
    cache_dir: str | None = None,
    token_budget: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Vlm:
    encoder = Vlm(
        str(folder / spec.base.model) if inside(spec.base.model) else spec.base.model,
        adapter=None if spec.adapter is None else str(folder / spec.adapter),
        prompt=spec.prompt,
        reading=spec.reading,
        sizes=spec.sizes,
        head=None if spec.head is None else TrainedHead(shape=spec.head, weights=str(folder / HEAD)),
        page=_page(spec, folder),
        of=spec.of,
        dtype=spec.dtype,
        device=device,
        revision=spec.base.revision,
        cache_dir=cache_dir,
        token_budget=token_budget,
        storage_options=storage_options,
    )
    encoder.training = spec.training
    return encoder


def _page(spec: EncoderSpec, folder: Path) -> Page | None:
    if spec.page is None or spec.page.font is None:
        return spec.page
    return spec.page.model_copy(update={"font": str(folder / spec.page.font)})
