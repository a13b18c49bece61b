"""Image files, one item each, with captions from files beside them. The images themselves are fetched by the pipeline."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError, nearest
from pipeline.fetch import fetch
from pipeline.media import BadItem
from pipeline.readers import rows
from pipeline.readers.identity import digests
from pipeline.readers.kinds import convert, declared
from schemas.items import item_schema

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
MAX_SIDECAR_BYTES = 2**20


class Images:
    """Every image of a folder, a glob, or a list of these."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        captions: Literal["txt", "json"] | None = None,
        text_key: str = "caption",
        metadata: Mapping[str, str] | None = None,
        suffixes: Sequence[str] = SUFFIXES,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Say where the images are, and where their captions.

        `captions`: `txt` takes the text of photo.jpg from photo.txt, `json` from the key `text_key` of photo.json, and
        the keys `metadata` (name: type) with it. An image without such a file has no text. `suffixes`: which files
        count, in any case. `name` of the source; without it, `uri`.
        """
        if captions not in (None, "txt", "json"):
            raise ConfigError(f"captions={captions!r}{nearest(str(captions), ['txt', 'json'])}; it is txt, json or null")
        if metadata and captions != "json":
            raise ConfigError("metadata of images comes from JSON files beside them: set captions: json")
        self.uri = uri
        self.captions = captions
        self.text_key = text_key
        self.suffixes = tuple(suffixes)
        self.source = name or storage.source_name(uri)
        self.storage_options = storage_options
        self.metadata = pa.schema([pa.field(key, kind or pa.string()) for key, kind in declared(metadata).items()])

    def list(self) -> pa.Table:
        """The images. With captions, an image's version changes with its caption's."""
        if self.captions is None:
            found = storage.find(self.uri, suffixes=self.suffixes, storage_options=self.storage_options)
            return rows.listing(found, _ids(found))
        ending = f".{self.captions}"
        found = storage.find(self.uri, suffixes=[*self.suffixes, ending], storage_options=self.storage_options)
        listed = {row["unit"]: row for row in [*found.to_pylist(), *self._beside_named(ending)]}
        images = [row for unit, row in sorted(listed.items()) if not unit.lower().endswith(ending)]
        # By what they are called without their ending; in small letters it comes last, and wins.
        captions = {_stem(unit): row for unit, row in sorted(listed.items()) if unit.lower().endswith(ending)}
        if not images:
            raise ConfigError(f"{self.uri} has files ending in {ending}, and no image; correct the URI or `suffixes`")
        if not captions:
            raise ConfigError(f"{self.uri} has no file ending in {ending}; correct `captions`, or leave it out")
        key = f":{self.text_key}" if self.captions == "json" and self.text_key != "caption" else ""
        for row in images:
            beside = captions.get(_stem(row["unit"]))
            row["version"] += f"|{_ending(beside['unit'])}:{beside['version']}{key}" if beside else ""
        table = pa.Table.from_pylist(images, schema=found.schema)
        return rows.listing(table, _ids(table))

    def _beside_named(self, ending: str) -> Iterator[dict[str, Any]]:
        """What lies beside images that are named, or matched by their suffix: a place that names them does not name these files."""
        for place in [self.uri] if isinstance(self.uri, str) else self.uri:
            for other in (ending, ending.upper()) if place.lower().endswith(self.suffixes) else ():
                with contextlib.suppress(ConfigError):  # an image without a caption
                    yield from storage.find(_stem(place) + other, storage_options=self.storage_options).to_pylist()

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """The items, `image_uri` set. A caption file that cannot be understood rejects its image."""
        units = work["unit"].to_pylist()
        # The version says whether there is a caption, and how its ending is written.
        endings = [re.search(rf"\|({self.captions}):", version, re.IGNORECASE) for version in work["version"].to_pylist()]
        beside = [f"{_stem(unit)}.{found[1]}" if found else None for unit, found in zip(units, endings, strict=True)]
        contents = fetch(beside, max_bytes=MAX_SIDECAR_BYTES, storage_options=self.storage_options)
        parsed = [self._parse(data) for data in contents]
        faults = [entry.detail if isinstance(entry, BadItem) else None for entry in parsed]
        values = [{} if isinstance(entry, BadItem) else entry for entry in parsed]
        carried = {}
        for field in self.metadata:
            column, bad = convert([value.get(field.name) for value in values], field.type)
            carried[field.name] = column
            for row in bad.nonzero()[0]:
                faults[row] = faults[row] or f"{field.name!r} is not {field.type}: {values[row][field.name]!r}"
        nothing = pa.nulls(len(units), pa.binary())
        text = pa.array([value.get(self.text_key) for value in values], pa.string())
        given = [work["id"], work["version"], work["unit"], text, nothing, work["unit"], *carried.values()]
        table = pa.table(given, schema=item_schema(self.metadata))
        if any(faults):
            reasons = ["bad_row" if fault else None for fault in faults]
            table = table.append_column("reject_reason", pa.array(reasons, pa.string()))
            table = table.append_column("reject_detail", pa.array(faults, pa.string()))
        yield table

    def _parse(self, data: bytes | BadItem | None) -> dict[str, Any] | BadItem:
        """The caption and metadata in a file beside an image: a text under `text_key`, or null."""
        if data is None:
            return {}
        if isinstance(data, BadItem):
            return BadItem("bad_row", f"its .{self.captions} file: {data.detail}")
        try:
            text = data.decode("utf-8-sig")
            values = {self.text_key: text} if self.captions == "txt" else json.loads(text)
        except ValueError as error:
            return BadItem("bad_row", f"its .{self.captions} file: {error}")
        if not isinstance(values, dict) or self.text_key not in values:
            return BadItem(
                "bad_row", f"its .json file has no key {self.text_key!r}{nearest(self.text_key, values if isinstance(values, dict) else [])}"
            )
        caption = values[self.text_key]
        if caption is not None and not _is_text(caption):
            return BadItem("bad_row", f"its .json file: {self.text_key!r} is no text: {caption!r}")
        return values | {self.text_key: (caption or "").strip() or None}


def _ids(found: pa.Table) -> pa.ChunkedArray:
    """Chunk by chunk: joined, the URIs of 20 million images are more than one array of strings may hold."""
    return pa.chunked_array([digests(chunk) for chunk in found["unit"].chunks], pa.string())


def _is_text(value: Any) -> bool:
    """Whether this is text that can be stored: JSON can hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _ending(uri: str) -> str:
    return uri.rpartition(".")[2]


def _stem(uri: str) -> str:
    folder, slash, name = uri.rpartition("/")
    return folder + slash + name.rpartition(".")[0]
