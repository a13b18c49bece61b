"""WebDataset: tar files in which consecutive members with one key (cat.jpg, cat.txt, cat.json) are one sample.

open_clip's conventions: `{00000..00099}` in a URI is expanded, `::` joins several sources, the image is the first of
several endings. Planning reads the headers of every new shard; where a store cannot skip, that is the whole shard.
"""

import glob
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.config import ConfigError, nearest
from pipeline.media import BadItem
from pipeline.readers import images, lines, rows, slices
from pipeline.readers.identity import salted
from pipeline.readers.kinds import declared
from pipeline.readers.lines import BEGIN, Start, Starts
from pipeline.readers.rows import Block, Columns, Fault
from pipeline.readers.slices import UNREADABLE, Part

SUFFIXES = (".tar", ".tar.gz", ".tgz")
BATCH_ROWS = 1024
BATCH_BYTES = 32 * 2**20
ASKED_AT_ONCE = 16
MANY = 8
MAX_MEMBER_BYTES = 64 * 2**20
IMAGES = "jpg;png;jpeg;webp"
LOOKED_AT = 16
"""Samples of the first shard that show whether the endings that were named are there."""


class Sample(NamedTuple):
    """Members of one key: by ending, their bytes, why they were not read, or None where only counted; and the offset after them."""

    key: str
    members: dict[str, bytes | BadItem | None]
    end: int
    fault: Fault | None


class Member(NamedTuple):
    """One file of a tar; its key is empty where the tar broke off between files."""

    key: str
    ending: str
    data: bytes | BadItem | None
    end: int
    fault: Fault | None


class WebDataset:
    """Items in the samples of tar files; an item's id is its shard and key."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        image: str | None = IMAGES,
        text: str | None = "txt",
        json_field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        weights: Sequence[float] | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Say which members hold what, by their ending.

        `image`: endings, joined by `;`, the first that a sample has. `text`: an ending; with `json_field`, that key of
        the sample's .json instead. `metadata`: keys (name: type) of the .json to carry along. `weights`: one for each
        source; shards are taken in turn so that the sources' bytes keep this proportion from the first chunk on: every
        sample is still read once, but a run that is stopped early holds the mixture.
        """
        self.uri = uri
        self.weights = weights
        # Endings count in any case.
        self.images = image.lower().split(";") if image else []
        self.text = text.lower() if text else None
        self.json_field = json_field
        given = declared(metadata)
        self.metadata = pa.schema([pa.field(key, kind or pa.string()) for key, kind in given.items()])
        has_text = "text" if text or json_field else None
        if not (has_text or image):
            raise ConfigError("there is nothing to embed: name the endings of the image or the text")
        self.columns = Columns("id", has_text, "image" if image else None, None, None, given)
        self.source = name or storage.source_name(uri)
        self.storage_options = storage_options
        self._starts: Starts = {}

    def list(self) -> pa.Table:
        """The shards. Raises ConfigError naming the first that a brace expression promises and is not there, or an ending that no sample has."""
        places = [self.uri] if isinstance(self.uri, str) else self.uri
        sources = [part for place in places for part in place.split("::")]
        if self.weights is not None:
            _check_weights(self.weights, len(sources))
        if pipe := next((part for part in sources if "pipe:" in part), None):
            raise ConfigError(f"{pipe!r}: commands are not run; give the URI itself, e.g. s3://bucket/{{000..099}}.tar")
        tables = [self._shards(part) for part in sources]
        owners = {unit: number for number, table in reversed([*enumerate(tables)]) for unit in table["unit"].to_pylist()}
        mine = [pc.equal(pa.array([owners[unit] for unit in table["unit"].to_pylist()]), number) for number, table in enumerate(tables)]
        found = pa.concat_tables([table.filter(first) for table, first in zip(tables, mine, strict=True)]).sort_by("unit")
        self._check_names(found["unit"].to_pylist())
        listing = rows.containers(found, self.columns.digest(self.images, self.text, self.json_field))
        return listing if self.weights is None else mixed(listing, owners, self.weights)

    def _check_names(self, units: Sequence[str]) -> None:
        """Raise ConfigError if the first shard that can be read shows that a name is wrong. Else all would be embedded without that member.

        A default that is not there is taken for a wrong one only if there are images of other endings.
        """
        samples = next(filter(None, map(self._first_samples, units)), [])
        found = sorted({ending for sample in samples for ending in sample.members})
        pictures = any(f".{ending}" in images.SUFFIXES for ending in found)
        if self.images and (pictures or self.images != IMAGES.split(";")):
            _check_endings("image", self.images, found)
        if self.text not in (None, "txt") and not self.json_field:
            _check_endings("text", [str(self.text)], found)
        objects = [fields for sample in samples if (fields := _object(sample.members.get("json")))]
        if self.json_field and objects and not any(self.json_field in fields for fields in objects):
            keys = list(objects[0])
            raise ConfigError(f"no .json has a key {self.json_field!r}{nearest(self.json_field, keys)}; it has {', '.join(map(repr, keys))}")

    def _first_samples(self, unit: str) -> Sequence[Sample]:
        try:
            with lines.opened(unit, self.storage_options) as file:
                samples = itertools.islice(_grouped(_members(file, {"json"})), LOOKED_AT)
                return [sample for sample in samples if not sample.fault]
        except (FileNotFoundError, PermissionError):
            return []

    def _shards(self, source: str) -> pa.Table:
        """What is at the URIs that a source stands for."""
        folders: dict[str, set[str]] = {}
        for uri in map(storage.canonical, expand(source)):
            folders.setdefault(storage.parent(uri), set()).add(uri)
        return pa.concat_tables([self._find(folder, uris) for folder, uris in folders.items()])

    def _find(self, folder: str, uris: set[str]) -> pa.Table:
        if len(uris) <= MANY or any(map(glob.has_magic, uris)):
            return storage.find(sorted(uris), suffixes=SUFFIXES, storage_options=self.storage_options)
        if folder.startswith(("http://", "https://")):  # a web server need not list its folders
            with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
                return pa.concat_tables(pool.map(lambda uri: storage.find(uri, storage_options=self.storage_options), sorted(uris)))
        # One listing of the folder, where the shards one by one would be thousands of requests.
        found = storage.find(folder, suffixes=SUFFIXES, storage_options=self.storage_options)
        missing = sorted(uris - set(found["unit"].to_pylist()))
        if missing:
            raise ConfigError(f"{len(missing)} of {len(uris)} shards do not exist, the first is {missing[0]}; correct the numbers in the braces")
        return found.filter(pc.is_in(found["unit"], pa.array(sorted(uris))))

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 samples and about 64 MiB."""
        parts: list[tuple[str, str, Part]] = []
        for unit, version in zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True):
            try:
                found = lines.cut((0, sample.end) for sample in self._samples(unit, BEGIN, read=False))
            except (FileNotFoundError, PermissionError):
                parts.append((unit, version, UNREADABLE))
                continue
            parts += [(unit, version, (start.row, stop, size)) for start, stop, size in found]
            self._starts[unit, version] = [start for start, _, _ in found]
        return slices.table(parts)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Items by batches. Of a truncated shard, all that can be read, and one reject for the rest."""
        versions = dict(zip(work["unit"].to_pylist(), work["version"].to_pylist(), strict=True))

        def blocks(unit: str, start: int, stop: int) -> Iterator[Block]:
            return self._blocks(unit, lines.nearest_start(self._starts, unit, versions[unit], start), range(start, stop))

        return slices.read(work, blocks, self.columns, self.metadata)

    def _blocks(self, unit: str, begin: Start, wanted: range) -> Iterator[Block]:
        held: list[Sample] = []
        size, at = 0, begin.row
        for sample in self._samples(unit, begin, read=True):
            if at >= wanted.stop:
                break
            if at >= wanted.start:
                held.append(sample)
                size += sum(len(data) for data in sample.members.values() if isinstance(data, bytes))
            at += 1
            if len(held) == BATCH_ROWS or size >= BATCH_BYTES:
                yield self._block(unit, at - len(held), held)
                held, size = [], 0
        if held:
            yield self._block(unit, at - len(held), held)

    def _block(self, unit: str, start: int, samples: Sequence[Sample]) -> Block:
        parsed = [self._parse(sample) for sample in samples]
        values = {name: [value.get(name) for value, _ in parsed] for name in ["text", *self.metadata.names]}
        keys = [sample.key if sample.key and _is_utf8(sample.key) else None for sample in samples]
        values["id"] = [None if key is None else one for key, one in zip(keys, salted(keys, unit), strict=True)]
        values["image"] = pa.array([value.get("image") for value, _ in parsed], pa.binary())
        return Block(unit, start, values, [fault for _, fault in parsed], keys)

    def _parse(self, sample: Sample) -> tuple[dict[str, Any], Fault | None]:
        if sample.fault:
            return {}, sample.fault
        if not _is_utf8(sample.key):
            return {}, f"the name {sample.key!r} is not UTF-8; rename it"
        members = {ending: data for ending, data in sample.members.items() if not isinstance(data, BadItem)}
        if large := next((data for data in sample.members.values() if isinstance(data, BadItem)), None):
            return {}, BadItem(large.reason, f"sample {sample.key!r}: {large.detail}")
        value: dict[str, Any] = {"image": next((members[ending] for ending in self.images if ending in members), None)}
        try:
            fields = json.loads(members["json"] or b"") if members.get("json") is not None and (self.json_field or self.metadata.names) else {}
            if not isinstance(fields, dict):
                raise ValueError("its .json is no object")
            value |= {name: fields.get(name) for name in self.metadata.names}
            text = members.get(self.text) if self.text else None
            value["text"] = fields.get(self.json_field) if self.json_field else text.decode("utf-8-sig") if text is not None else None
        except (ValueError, RecursionError) as error:
            return {}, f"sample {sample.key!r}: {error}"
        return value, None

    def _samples(self, unit: str, start: Start, *, read: bool) -> Iterator[Sample]:
        """Samples from a start on, with the bytes of the members that are wanted if they are to be read."""
        endings = {*self.images, *([self.text] if self.text else []), "json"} if read else set()
        with lines.opened(unit, self.storage_options) as file:
            file.seek(start.offset)
            yield from _grouped(_members(file, endings))


def _grouped(members: Iterator[Member]) -> Iterator[Sample]:
    """Members to samples. A sample that is not known to be whole when the shard breaks off is the reject for the rest."""
    key = ""
    found: dict[str, bytes | BadItem | None] = {}
    end = 0
    for member in members:
        if found and member.key not in (key, ""):
            yield Sample(key, found, end, None)
            found = {}
        key, end = member.key or (key if found else ""), member.end
        if member.fault:
            yield Sample(key, {}, end, member.fault)
            return
        found.setdefault(member.ending, member.data)
    if found:
        yield Sample(key, found, end, None)


def _members(file: IO[bytes], endings: set[str]) -> Iterator[Member]:
    """The files in a tar, with the bytes of those wanted. A fault is the last."""
    key, end = "", file.tell()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header of a shard
                end = header.offset_data + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, slash, name = header.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if header.isfile() and stem and ending:
                    key = folder + slash + stem
                    data = _content(tar, header) if ending.lower() in endings else None
                    yield Member(key, ending.lower(), data, end, None)
                    key = ""
            file.seek(end)
            # tarfile takes a damaged header for the end of the archive.
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {end}")
    except (tarfile.TarError, *lines.DAMAGE) as error:
        yield Member(key, "", None, end, BadItem("unreadable", f"the rest of the shard cannot be read: {error}"))


def _check_endings(name: str, endings: Sequence[str], found: Sequence[str]) -> None:
    if found and not set(endings) & set(found):
        have = ", ".join(f".{ending}" for ending in found)
        raise ConfigError(f"no sample has a member .{' or .'.join(endings)}; they have {have}; correct `{name}`, or set it to null")


def _object(data: bytes | BadItem | None) -> dict[str, Any]:
    """The object in a .json; empty if there is none."""
    try:
        fields = json.loads(data) if isinstance(data, bytes) else {}
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _is_utf8(name: str) -> bool:
    """tarfile gives other bytes as halves of characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _check_weights(weights: Sequence[float], sources: int) -> None:
    if len(weights) != sources or min(weights) <= 0:
        raise ConfigError(f"weights={list(weights)} must be {sources} numbers above 0, one for each source")


def mixed(listing: pa.Table, owners: Mapping[str, int], weights: Sequence[float]) -> pa.Table:
    """`listing` in an order in which each source's bytes so far are in proportion to its weight (stride scheduling).

    `owners`: the source of each shard, by its number.
    """
    passed = [0.0] * len(weights)
    turns = []
    for row, (unit, size) in enumerate(zip(listing["unit"].to_pylist(), listing["bytes"].to_pylist(), strict=True)):
        one = owners[unit]
        passed[one] += (size or 1) / weights[one]
        turns.append((passed[one], row))
    return listing.take(pa.array([row for _, row in sorted(turns)], pa.int64()))


def _content(tar: tarfile.TarFile, header: tarfile.TarInfo) -> bytes | BadItem | None:
    """A member's bytes. A header can promise any number of them, and a gzip file keep the promise."""
    if header.size > MAX_MEMBER_BYTES:
        return BadItem("too_many_bytes", f"{header.size} bytes; {MAX_MEMBER_BYTES} are {slices.BOUND}")
    body = tar.extractfile(header)
    return body.read() if body else None


def expand(uri: str) -> list[str]:
    """Every URI that a brace expression stands for, as in bash: `{000..002}` counts with its zeros, `{a,b}` lists. A brace alone is text."""
    if "{" not in uri:
        return [uri]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise ConfigError(f"{uri}: braces need the package braceexpand; pip install 'tessera[webdataset]'") from error
    try:
        return list(braceexpand(uri))
    except ValueError:  # unbalanced
        return [uri]
