"""Files in folders and object stores: find them with a version, fetch many small ones, open a large one.

A place is named by one canonical string: an absolute local path, or an object store's URI (s3://bucket/key), unescaped.
`storage_options` are fsspec's own, by store: `key`, `secret`, `endpoint_url` for s3 and so on; credentials are better
left to the environment. Hidden files (`.x`) and the markers of other tools (`_SUCCESS`, `_temporary`, ...) are no data.
"""

# os.path and os.scandir, not pathlib: 200,000 files are listed in a third of the time.
# ruff: noqa: PTH100, PTH111, PTH112, PTH116, PTH123, PTH207, PTH208
import asyncio
import errno
import glob
import heapq
import io
import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
import fsspec.asyn
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ConfigError, nearest
from pipeline.media import BadItem
from pipeline.sorting import sort_rows
from pipeline.stores import CONNECTIONS, check_credentials, check_forbidden, filesystem, listing_all, probe, reaching
from schemas.items import LISTING

FOUND = pa.schema([LISTING.field(name) for name in ("unit", "version", "bytes")])
"""What `find` returns."""

MARKERS = ("_temporary", "_metadata", "_common_metadata", "_delta_log", "_committed_", "_started_", "_SUCCESS", "__MACOSX")
SCHEMES = {"s3a": "s3", "gcs": "gs"}
ITEMS_FAULT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
BUFFER_BYTES = 2**20
HTTP_S = 30.0
FILES_A_BLOCK = 2**16

Entry = tuple[str, int | None]


def find(uri: str | Sequence[str], *, suffixes: Sequence[str] | None = None, storage_options: dict[str, Any] | None = None) -> pa.Table:
    """Every file of a folder (at any depth), a glob, a file, or a list of these: schema FOUND, sorted by `unit`.

    `suffixes`: which files of a folder count, such as `.jpg`, in any case; a file that is named, or a glob that ends in
    a suffix of its own, is taken as it is. A folder that is reached by two ways is listed once; a broken link and a name
    that is not UTF-8 are listed, so that they become rejects and not a silence. Raises ConfigError if there is nothing, or any
    folder cannot be listed.
    """
    places = [uri] if isinstance(uri, str) else list(uri)
    if not places or not all(places):
        raise ConfigError("uri is empty; give a folder, a file, a glob such as photos/*.jpg, or a list of these")
    blocks: list[pa.RecordBatch] = []
    for place in places:
        wanted = _wanted(suffixes, place)
        entries = _find_local(place, wanted) if _is_local(place) else _find_remote(place, wanted, storage_options or {})
        before = len(blocks)
        blocks += _blocks(entries)
        if len(blocks) == before:
            raise ConfigError(_nothing(place, suffixes, storage_options or {}))
    found = sort_rows(pa.Table.from_batches(blocks, FOUND), "unit")
    again = pc.equal(found["unit"].slice(1), found["unit"].slice(0, found.num_rows - 1))
    if not pc.any(again).as_py():
        return found
    return found.filter(pc.invert(pa.chunked_array([pa.array([False]), *again.chunks])))


def _blocks(entries: Iterator[tuple[str, Entry]]) -> Iterator[pa.RecordBatch]:
    """Files as they are found, FOUND's columns: as Arrow strings they take a third of the memory of Python's."""
    while block := list(itertools.islice(entries, FILES_A_BLOCK)):
        try:
            yield _block(block)
        except UnicodeEncodeError:
            yield _block([_shown(*found) for found in block])


def _block(found: Sequence[tuple[str, Entry]]) -> pa.RecordBatch:
    columns = [[unit for unit, _ in found], [version for _, (version, _) in found], [size for _, (_, size) in found]]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, FOUND, strict=True)], schema=FOUND)


def _shown(path: str, entry: Entry) -> tuple[str, Entry]:
    """A file whose name is not UTF-8 under a name that can be stored, caf\\xe9.jpg: it will not be found, and is a reject, not a silence."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return (path, entry) if name == path else (name, ("not-utf8", None))


def look(uri: str, storage_options: dict[str, Any] | None = None) -> dict[str, Entry]:
    """One file, or the files that lie in one folder, not below it, with versions and bytes as `find` gives them; empty if there is no such place.

    Raises what the disk or the store raises if it cannot say, with the store's own retries; CredentialsRefused where that is why.
    """
    if _is_local(uri):
        path = _local(uri)
        try:
            status = os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                return {path: _entry(status)}
            with os.scandir(path) as entries:
                return {name: found for entry in entries if not _hidden(entry.name) for name, found in _listed(entry)}
        except (FileNotFoundError, NotADirectoryError):
            return {}
    store, path = filesystem(uri, storage_options or {})
    store.invalidate_cache()
    try:
        info = store.info(path)
        if info["type"] == "file":
            return {store.unstrip_protocol(info["name"]): _remote_entry(info)}
        infos = store.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    except PermissionError:
        check_forbidden(store, path, uri)
        raise
    files = [info for info in infos if info["type"] == "file" and not info["name"].endswith("/")]
    return {store.unstrip_protocol(info["name"]): _remote_entry(info) for info in files if not _hidden(info["name"].rpartition("/")[2])}


def source_name(uri: str | Sequence[str]) -> str:
    """The canonical form of a place, or of several, joined by commas."""
    places = [uri] if isinstance(uri, str) else list(uri)
    return ",".join(canonical(place) for place in places)


def canonical(uri: str) -> str:
    """An absolute path, or a URI whose scheme is the store's usual one, without a slash at the end."""
    if not _is_local(uri):
        scheme, _, rest = uri.partition("://")
        return f"{SCHEMES.get(scheme, scheme)}://{rest.rstrip('/')}"
    return _local(uri)


def parent(uri: str) -> str:
    """The folder that a file is in."""
    return uri.rpartition("/")[0]


def _is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))


def _local(uri: str) -> str:
    path = uri.partition("://")[2] if "://" in uri else uri
    return os.path.abspath(os.path.expanduser(path))


def _hidden(name: str) -> bool:
    # Not every leading underscore: cameras name their Adobe RGB pictures _DSC0001.JPG.
    return name.startswith((".", *MARKERS))


def _wanted(suffixes: Sequence[str] | None, place: str) -> Callable[[str], bool]:
    last = place.rpartition("/")[2]
    own = last.rpartition(".")[2] if glob.has_magic(place) and "." in last else ""
    if suffixes is None or (own and not glob.has_magic(own)):
        return lambda name: True
    endings = tuple(suffix.lower() for suffix in suffixes)
    return lambda name: name.lower().endswith(endings)


# ---- local ----


def _find_local(place: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Entry]]:
    path = _local(place)
    try:
        if os.path.isdir(path):
            yield from _walk(path, wanted)
        elif os.path.lexists(path):
            yield path, _entry(os.stat(path))
        elif glob.has_magic(path):
            yield from _glob_local(path, wanted)
        else:
            raise ConfigError(_missing_local(path))
    except PermissionError as error:
        raise ConfigError(f"{error.filename} may not be read by this user; change its permissions, or run as another user") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is a broken link; remove it, or restore what it points to") from error


def _glob_local(pattern: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Entry]]:
    _check_folders(pattern)
    for path in glob.iglob(pattern, recursive=True):
        name = path.rpartition("/")[2]
        if os.path.isdir(path):
            if "**" not in pattern:
                yield from _walk(path, wanted)
        elif wanted(name) and not _hidden(name):
            yield path, _entry(os.stat(path))


def _check_folders(pattern: str) -> None:
    """Raise PermissionError if there is a folder on the way that may not be listed: `glob` steps over it, and says nothing."""
    parts = pattern.split("/")
    for index, part in enumerate(parts):
        if glob.has_magic(part):
            folders = "/".join([*parts[: index + (part == "**")], ""])
            for folder in glob.iglob(folders, recursive=True):
                os.scandir(folder).close()


def _walk(root: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Entry]]:
    """Files under `root`. Real folders before linked ones, so that a folder's name does not depend on the order of a disk."""
    folders, links, seen = [root], list[str](), set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    heapq.heappush(links, entry.path)
                elif wanted(entry.name):
                    yield from _listed(entry)


def _listed(entry: os.DirEntry[str]) -> Iterator[tuple[str, Entry]]:
    try:
        status = entry.stat()
    except OSError:
        if entry.is_symlink():  # broken, or a loop of links
            yield entry.path, ("broken-link", None)
        return  # else it was deleted this moment
    if stat.S_ISREG(status.st_mode):
        yield entry.path, _entry(status)


def _entry(status: os.stat_result) -> Entry:
    return f"{status.st_size}-{status.st_mtime_ns}", status.st_size


def _missing_local(path: str) -> str:
    here = Path(path).parent
    missing = Path(path).name
    while not here.is_dir():
        missing, here = here.name, here.parent
    hint = nearest(missing, os.listdir(here))
    return f"{path} does not exist{hint or f'; the nearest folder that does is {here}'}"


# ---- object stores ----


def _find_remote(place: str, wanted: Callable[[str], bool], storage_options: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    info = probe(place, storage_options)
    with reaching(place):
        store, path = filesystem(place, storage_options)
        # fsspec keeps listings, and a second run in the same process would not see what is new.
        store.invalidate_cache()
        if info is not None and info["type"] == "file":
            yield store.unstrip_protocol(info["name"]), _remote_entry(info)
            return
        with listing_all(store):
            if info is not None:
                infos, root = store.find(path, detail=True), path
            elif glob.has_magic(path):
                infos, root = store.glob(path, detail=True), path[: _magic_at(path)].rpartition("/")[0]
            else:
                raise ConfigError(_missing_remote(place, store, path))
        for name, entry in infos.items():
            parts = name[len(root) :].strip("/").split("/")
            if entry["type"] == "file" and not name.endswith("/") and wanted(parts[-1]) and not any(map(_hidden, parts)):
                yield store.unstrip_protocol(name), _remote_entry(entry)


def _magic_at(path: str) -> int:
    return min(path.find(sign) for sign in "*?[" if sign in path)


def _remote_entry(info: dict[str, Any]) -> Entry:
    size = info.get("size")
    for key in ("ETag", "etag", "generation", "md5Hash"):
        if info.get(key):
            return str(info[key]).strip('"'), size
    changed = next((info[key] for key in ("LastModified", "mtime", "updated", "last_modified", "created") if info.get(key)), "")
    return f"{size}-{changed}", size


def _missing_remote(place: str, store: Any, path: str) -> str:
    name, above = "", path.rstrip("/")
    while above:
        above, _, name = above.rpartition("/")
        try:
            names = [entry.rstrip("/").rpartition("/")[2] for entry in store.ls(above, detail=False)]
        except (OSError, ValueError):
            continue
        if names:
            hint = nearest(name, names) or f"; {above or 'the store'} holds {_some(names)}"
            return f"{place} does not exist{hint}"
    return f"{place} does not exist, nor the folder or bucket it is in; correct the URI"


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _nothing(place: str, suffixes: Sequence[str] | None, storage_options: dict[str, Any]) -> str:
    looked_for = f" ending in {', '.join(suffixes)}" if suffixes else ""
    if glob.has_magic(place):
        return f"no file{looked_for} matches {place}; correct the pattern"
    everything = dict(_find_local(place, lambda _: True) if _is_local(place) else _find_remote(place, lambda _: True, storage_options))
    if not everything:
        return f"{place} has no files; fill it, or correct the URI"
    kinds = Counter(Path(unit).suffix or "(no suffix)" for unit in everything).most_common(5)
    holds = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
    return f"{place} has no files{looked_for}; it holds {holds}; correct the URI or `suffixes`"


# ---- reading ----


def fetch(uris: Sequence[str | None], *, max_bytes: int, storage_options: dict[str, Any] | None = None) -> list[bytes | BadItem | None]:
    """The bytes of each file, in order; None for None.

    A file that is gone or forbidden is a BadItem `missing`, one larger than `max_bytes` is `too_many_bytes` and is not
    read whole. A store that cannot be reached, or refuses the credentials (CredentialsRefused), raises: that is no item's
    fault. Object stores are read 64 files at a time.
    """
    results: list[bytes | BadItem | None] = [None] * len(uris)
    remote: dict[str, list[int]] = {}
    for index, uri in enumerate(uris):
        if uri is None:
            continue
        if _is_local(uri):
            results[index] = _read_local(_local(uri), max_bytes)
        else:
            remote.setdefault("/".join(uri.split("/", 3)[:3]), []).append(index)
    for indexes in remote.values():
        for index, result in zip(indexes, _fetch_remote([str(uris[i]) for i in indexes], max_bytes, storage_options or {}), strict=True):
            results[index] = result
    return results


def _read_local(path: str, max_bytes: int) -> bytes | BadItem:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return BadItem("missing", f"{path} is not a file")
        if status.st_size > max_bytes:
            return _too_large(status.st_size, max_bytes)
        with open(path, "rb") as file:
            # Not max_bytes at once: Python would make room for all of them first.
            data = file.read(status.st_size + 1)
            if len(data) > status.st_size:  # it has grown meanwhile
                data += file.read(max_bytes + 1 - len(data))
    except (OSError, ValueError) as error:
        # A disk that fails, or too many open files, is no item's fault.
        if isinstance(error, OSError) and error.errno not in ITEMS_FAULT:
            raise
        return BadItem("missing", f"{type(error).__name__}: {error}{_rename(path)}")
    return data if len(data) <= max_bytes else _too_large(len(data), max_bytes)


def _rename(path: str) -> str:
    return "; if its name is not UTF-8, rename it" if "\\x" in path else ""


def _too_large(size: int | None, max_bytes: int) -> BadItem:
    return BadItem("too_many_bytes", f"{size if size else 'more than ' + str(max_bytes)} bytes; limits.max_item_bytes is {max_bytes}")


def _fetch_remote(uris: list[str], max_bytes: int, storage_options: dict[str, Any]) -> list[bytes | BadItem]:
    """Files of one store."""
    scheme = uris[0].partition("://")[0]
    if scheme not in fsspec.available_protocols():
        return [BadItem("missing", f"{uri}: unknown store {scheme!r}") for uri in uris]
    store, _ = filesystem(uris[0], storage_options)
    paths = [store._strip_protocol(uri) for uri in uris]
    if not store.async_impl:
        return [_read_sync(store, path, max_bytes) for path in paths]
    read = _read_http if scheme in ("http", "https") else _read_async

    async def fetch_all() -> list[bytes | BadItem]:
        turn = asyncio.Semaphore(CONNECTIONS)

        async def one(path: str) -> bytes | BadItem:
            async with turn:
                return await read(store, path, max_bytes)

        return await asyncio.gather(*map(one, paths))

    results: list[bytes | BadItem] = fsspec.asyn.sync(store.loop, fetch_all)
    return results


def _read_sync(store: Any, path: str, max_bytes: int) -> bytes | BadItem:
    try:
        size = store.info(path)["size"]
        if size is not None and size > max_bytes:
            return _too_large(size, max_bytes)
        return bytes(store.cat_file(path))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        check_credentials(error, path)
        return BadItem("missing", f"{type(error).__name__}: {error}")


async def _read_async(store: Any, path: str, max_bytes: int) -> bytes | BadItem:
    """One request: the first `max_bytes` + 1 bytes say whether there are too many."""
    try:
        try:
            data: bytes = await store._cat_file(path, start=0, end=max_bytes + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError | PermissionError) or (await store._info(path))["size"] != 0:
                raise
            return b""  # stores refuse a range of an empty object
    except OSError as error:
        check_credentials(error, path)
        if not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        return BadItem("missing", f"{type(error).__name__}: {error}")
    return data if len(data) <= max_bytes else _too_large(None, max_bytes)


async def _read_http(store: Any, url: str, max_bytes: int) -> bytes | BadItem:
    """A page of the open web: whatever goes wrong is that host's fault, and the item's."""
    import aiohttp

    try:
        session = await store.set_session()
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=HTTP_S)) as response:
            response.raise_for_status()
            if (response.content_length or 0) > max_bytes:
                return _too_large(response.content_length, max_bytes)
            data = bytearray()
            async for part in response.content.iter_chunked(2**16):
                data += part
                if len(data) > max_bytes:
                    return _too_large(None, max_bytes)
            return bytes(data)
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        return BadItem("missing", f"{type(error).__name__}: {error}")


def open_file(uri: str, storage_options: dict[str, Any] | None = None) -> IO[bytes]:
    """A file for reading, seekable and not read ahead as a whole. Raises FileNotFoundError or PermissionError."""
    if _is_local(uri):
        return open(_local(uri), "rb")
    store, path = filesystem(uri, storage_options or {})
    store.invalidate_cache()
    # fsspec's own files know no readline(limit), and go through Python for each line.
    return io.BufferedReader(store.open(path, "rb"), BUFFER_BYTES)
