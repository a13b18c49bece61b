"""The bytes of files in folders and object stores: fetch many small ones, open a large one. Places are named as `storage` names them."""

# os.path, not pathlib: it is called for every item.
# ruff: noqa: PTH116, PTH123
import asyncio
import errno
import io
import os
import stat
from collections.abc import Sequence
from typing import IO, Any

import fsspec
import fsspec.asyn

from pipeline.media import BadItem
from pipeline.storage import is_local, local_path
from pipeline.stores import CONNECTIONS, check_credentials, filesystem

ITEMS_FAULT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
BUFFER_BYTES = 2**20
HTTP_S = 30.0


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
        if is_local(uri):
            results[index] = _read_local(local_path(uri), max_bytes)
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
    if is_local(uri):
        return open(local_path(uri), "rb")
    store, path = filesystem(uri, storage_options or {})
    store.invalidate_cache()
    # fsspec's own files know no readline(limit), and go through Python for each line.
    return io.BufferedReader(store.open(path, "rb"), BUFFER_BYTES)
