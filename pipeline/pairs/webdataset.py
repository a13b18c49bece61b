"""WebDataset as image-caption pairs: open_clip's shards, read by `pipeline.readers.webdataset`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.pairs import rows
from pipeline.pairs.rows import BadRow, Pair, message
from pipeline.readers.identity import salted
from pipeline.readers.webdataset import WebDataset as Samples

Query = Literal["image", "text"]


class WebDataset:
    """Pairs in the samples of tar files: an image and its caption."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        query: Query = "image",
        image: str = "jpg;png;jpeg;webp",
        text: str = "txt",
        json_field: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """`query`: which of the two searches for the other. The rest says which members of a sample hold what, as for embedding."""
        if query not in ("image", "text"):
            raise ConfigError(f"query={query!r}; it is 'image' (its caption is the document) or 'text' (its image is the document)")
        self.query: Query = query
        self.samples = Samples(uri, image=image, text=text, json_field=json_field, storage_options=storage_options)
        self.source = self.samples.source
        caption = f"json:{json_field}" if json_field else text
        sides = {"image": image, "text": caption}
        self._uses: dict[str, str | None] = {sides.pop(query): "query", next(iter(sides.values())): "positives"}

    def list(self) -> pa.Table:
        """The shards."""
        return self.samples.list()

    def uses(self) -> dict[str, str | None]:
        """By ending; other members are not looked at."""
        return dict(self._uses)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 samples and about 64 MiB."""
        return self.samples.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """One row a sample, the image's bytes within it."""
        for items in self.samples.read(work):
            yield rows.tabled([_row(item, self.query) for item in items.to_pylist()])


def _row(item: Mapping[str, Any], query: Query) -> Pair:
    unit, _, label = item["uri"].rpartition("#")
    head = {"row_id": salted([label], storage.canonical(unit).rpartition("/")[2])[0], "uri": item["uri"]}
    try:
        return head | _pair(item, query)
    except BadRow as bad:
        return head | rows.rejection(bad.reason, bad.detail)


def _pair(item: Mapping[str, Any], query: Query) -> Pair:
    if item.get("reject_reason"):
        known = {"missing": "missing", "empty": "empty"}
        raise BadRow(known.get(item["reject_reason"], "bad_row"), item["reject_detail"] or item["reject_reason"])
    images = [{"bytes": item["image"], "uri": None}] if item["image"] else []
    sides = {"image": message(None, images, what="image"), "text": message(item["text"], what="caption")}
    return {"query": sides.pop(query), "positives": [*sides.values()], "negatives": []}
