"""Files in folders and object stores: what they are called, and which there are, with a version.

A place is named by one canonical string: an absolute local path, or an object store's URI (s3://bucket/key), unescaped.
`storage_options` are fsspec's own, by store: `key`, `secret`, `endpoint_url` for s3 and so on; credentials are better
left to the environment. Hidden files (`.x`) and the markers of other tools (`_SUCCESS`, `_temporary`, ...) are no data.
"""

# os.path and os.scandir, not pathlib: 200,000 files are listed in a third of the time.
# ruff: noqa: PTH100, PTH111, PTH112, PTH116, PTH207, PTH208
import glob
import heapq
import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ConfigError, nearest
from pipeline.sorting import sort_rows
from pipeline.stores import check_forbidden, filesystem, listing_all, probe, reaching
from schemas.items import LISTING

FOUND = pa.schema([LISTING.field(name) for name in ("unit", "version", "bytes")])
"""What `find` returns."""

MARKERS = ("_temporary", "_metadata", "_common_metadata", "_delta_log", "_committed_", "_started_", "_SUCCESS", "__MACOSX")
SCHEMES = {"s3a": "s3", "gcs": "gs"}
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
        entries = _find_local(place, wanted) if is_local(place) else _find_remote(place, wanted, storage_options or {})
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
    if is_local(uri):
        path = local_path(uri)
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
    if not is_local(uri):
        scheme, _, rest = uri.partition("://")
        return f"{SCHEMES.get(scheme, scheme)}://{rest.rstrip('/')}"
    return local_path(uri)


def parent(uri: str) -> str:
    """The folder that a file is in."""
    return uri.rpartition("/")[0]


def is_local(uri: str) -> bool:
    """Whether a place is a path of this machine, and not in a store."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> str:
    """The absolute path of a local place."""
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
    path = local_path(place)
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
    everything = dict(_find_local(place, lambda _: True) if is_local(place) else _find_remote(place, lambda _: True, storage_options))
    if not everything:
        return f"{place} has no files; fill it, or correct the URI"
    kinds = Counter(Path(unit).suffix or "(no suffix)" for unit in everything).most_common(5)
    holds = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
    return f"{place} has no files{looked_for}; it holds {holds}; correct the URI or `suffixes`"
