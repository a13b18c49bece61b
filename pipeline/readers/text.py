"""Text files, cut into passages. Planning reads and cuts every new file once, to know how many passages it has."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.encoders.local_copy import is_uri, local_copy
from pipeline.fetch import fetch
from pipeline.media import BadItem
from pipeline.readers import rows, slices
from pipeline.readers.identity import settings_digest
from pipeline.readers.rows import Block, Columns
from pipeline.readers.slices import MAX_SLICE_ROWS, UNREADABLE, Part
from schemas.items import SLICE

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
MAX_FILE_BYTES = 64 * 2**20
METADATA = pa.schema([pa.field("start", pa.int64()), pa.field("stop", pa.int64())])
FILES_AT_ONCE = 64
PIECE = 2**20
"""Characters that go to the tokenizer together: it takes some 200 bytes a token."""
SPAN = np.dtype((np.int32, 2))


class TextFiles:
    """Passages of plain text files: an item's id is its file and its number in it."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        tokenizer: str | None = None,
        chunk_tokens: int = 256,
        overlap_tokens: int = 32,
        suffixes: Sequence[str] = SUFFIXES,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Say where the files are and how long a passage is.

        `tokenizer`: name, folder or URI of the encoder's Hugging Face tokenizer; without it, words are counted. `chunk_tokens`:
        as many as the encoder reads, those that the tokenizer adds at the ends among them; a word that is cut apart there may need
        one more. `overlap_tokens`: how many a passage shares with the one before. The columns `start` and `stop` say where in
        its file a passage is, in characters.
        """
        if not 0 <= overlap_tokens < chunk_tokens:
            raise ConfigError(f"overlap_tokens={overlap_tokens} must be at least 0 and less than chunk_tokens={chunk_tokens}")
        self.uri = uri
        self.tokenizer = tokenizer
        self.chunk_tokens = chunk_tokens
        self.overlap_tokens = overlap_tokens
        self.suffixes = tuple(suffixes)
        self.metadata = METADATA
        self.source = name or storage.source_name(uri)
        self.storage_options = storage_options

    def list(self) -> pa.Table:
        """The files. Another way of cutting is another version of every file."""
        found = storage.find(self.uri, suffixes=self.suffixes, storage_options=self.storage_options)
        return rows.containers(found, settings_digest(self.tokenizer, self.chunk_tokens, self.overlap_tokens))

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 passages."""
        parts: list[tuple[str, str, Part]] = []
        for batch in _together(units):
            names, versions = batch["unit"].to_pylist(), batch["version"].to_pylist()
            for unit, version, text in zip(names, versions, self._texts(names), strict=True):
                if isinstance(text, BadItem):
                    parts.append((unit, version, UNREADABLE))
                    continue
                count = len(self._spans(text))
                parts += [(unit, version, (at, min(at + MAX_SLICE_ROWS, count), None)) for at in range(0, count, MAX_SLICE_ROWS)]
        return slices.table(parts)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Passages by slices. A file that is no UTF-8 text, empty or too large is one reject."""
        for part in work.select(SLICE.names).to_pylist():
            text = self._texts([part["unit"]])[0]
            if isinstance(text, BadItem):
                wanted = range(part["start"], part["stop"])
                yield slices.rejected(part["unit"], part["version"], wanted, METADATA, reason=text.reason, detail=text.detail)
                continue

            def blocks(unit: str, start: int, stop: int, text: str = text) -> Iterator[Block]:
                spans = self._spans(text)[start:stop]
                if len(spans):
                    passages = pa.array([text[begin:end] for begin, end in spans], pa.string())
                    yield Block(unit, start, {"text": passages, "start": pa.array(spans[:, 0]), "stop": pa.array(spans[:, 1])})

            columns = Columns(None, "text", None, None, None, {"start": pa.int64(), "stop": pa.int64()})
            yield from slices.read(pa.Table.from_pylist([part]), blocks, columns, METADATA)

    def _texts(self, units: Sequence[str]) -> Sequence[str | BadItem]:
        found = fetch(units, max_bytes=MAX_FILE_BYTES, storage_options=self.storage_options)
        return [_decoded(data) for data in found]

    def _spans(self, text: str) -> np.ndarray:
        """(N, 2) int64: where each of N passages starts and ends, in characters."""
        tokens = _words(text) if self.tokenizer is None else _tokens(text, self.tokenizer)
        size = self.chunk_tokens - self._added()
        step = size - self.overlap_tokens
        # The last passage is full of new tokens or the rest; one of overlap alone would repeat.
        firsts = np.arange(0, max(len(tokens) - self.overlap_tokens, 1), step)
        lasts = np.minimum(firsts + size, len(tokens)) - 1
        return np.stack([tokens[firsts, 0], tokens[lasts, 1]], axis=1).astype(np.int64)

    def _added(self) -> int:
        """Tokens that the tokenizer adds to a passage. Raises ConfigError if no room is left for text."""
        added = _load(self.tokenizer).num_special_tokens_to_add() if self.tokenizer else 0
        if self.overlap_tokens + added >= self.chunk_tokens:
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens} holds {added} tokens that the tokenizer adds; it must be more than these and "
                f"overlap_tokens={self.overlap_tokens} together"
            )
        return int(added)


def _decoded(data: bytes | BadItem | None) -> str | BadItem:
    if not isinstance(data, bytes):
        return _of_a_container(data or BadItem("missing"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadItem("bad_row", f"not UTF-8 text, convert it: {error}")
    return text if text.strip() else BadItem("empty", f"{len(data)} bytes and no word")


def _of_a_container(bad: BadItem) -> BadItem:
    """What is wrong with a file, told of one that holds several items."""
    if bad.reason == "missing":
        return BadItem("unreadable", bad.detail)
    return BadItem(bad.reason, f"more than {MAX_FILE_BYTES} bytes, {slices.BOUND}") if bad.reason == "too_many_bytes" else bad


def _together(units: pa.Table) -> Iterator[pa.Table]:
    """Files that are held at once: `FILES_AT_ONCE` and `MAX_FILE_BYTES` at most."""
    start = held = 0
    for index, size in enumerate(units["bytes"].to_pylist()):
        more = MAX_FILE_BYTES if size is None else min(size, MAX_FILE_BYTES)
        if index > start and (index - start == FILES_AT_ONCE or held + more > MAX_FILE_BYTES):
            yield units.slice(start, index - start)
            start, held = index, 0
        held += more
    yield units.slice(start)


def _words(text: str) -> np.ndarray:
    """Spans (N, 2) int32 of N words. One by one into the array: a list of them takes 128 bytes a word."""
    return np.fromiter((match.span() for match in re.finditer(r"\S+", text)), SPAN)


def _tokens(text: str, tokenizer: str) -> np.ndarray:
    """Spans (N, 2) int32 of the tokens that hold characters; at least one, the whole text, if the tokenizer knows none."""
    spans = np.concatenate([_tokens_of(text[start:stop], tokenizer) + np.int32(start) for start, stop in _pieces(text)])
    return spans if len(spans) else np.array([[0, len(text)]], np.int32)


def _tokens_of(text: str, tokenizer: str) -> np.ndarray:
    encoded = _load(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans: np.ndarray = np.fromiter(encoded["offset_mapping"], SPAN)
    return spans[spans[:, 1] > spans[:, 0]]


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Where a text is cut for the tokenizer: before white space, if there is any in a piece."""
    start = 0
    while len(text) - start > PIECE:
        stop = max((text.rfind(white, start + 1, start + PIECE) for white in (" ", "\n")), default=-1)
        stop = stop if stop > start else start + PIECE
        yield start, stop
        start = stop
    yield start, len(text)


def _load(name: str) -> Any:
    """The tokenizer. Raises ConfigError if it cannot be had, or does not say where its tokens are."""
    if name not in _loaded:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(local_copy(name)) if is_uri(name) else name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tokenizer {name!r} cannot be loaded: {error}") from error
        if not tokenizer.is_fast:
            raise ConfigError(f"tokenizer {name!r} does not say where its tokens are (it is not a fast one); leave it out to count words")
        _loaded[name] = tokenizer
    return _loaded[name]


_loaded: dict[str, Any] = {}
"""One of each per process: loading takes longer than cutting a book."""
