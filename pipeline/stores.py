"""Object stores: how one is reached, and what to do where it cannot be.

Waits are bounded here, so that a wrong endpoint is an answer within seconds; reading keeps the store's own retries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import fsspec.asyn

from pipeline.config import ConfigError, nearest

CONNECTIONS = 64
PROBE_S = 10.0
CREDENTIAL_FAULTS = (
    *("AccountProblem", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken"),
    *("NotSignedUp", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"),
)
"""What S3 says when it refuses whoever asks, whatever is asked for (API reference, "Error responses"). s3fs makes most of
them the same PermissionError as a single object's AccessDenied."""
PACKAGES = {"s3": "tessera[s3]", "s3a": "tessera[s3]", "gs": "tessera[gcs]", "gcs": "tessera[gcs]"}


def filesystem(uri: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """The store of a URI, and the path in it. Not fsspec's url_to_fs: that takes `::` and `?` in an object's name for its own."""
    scheme = uri.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        how = f"pip install '{package}'" if package else str(error)
        raise ConfigError(f"{scheme}:// needs a package that is not installed; {how}") from error
    except ValueError as error:
        known = fsspec.available_protocols()
        raise ConfigError(
            f"{uri}: unknown store {scheme!r}{nearest(scheme, known)}; use a path, or s3://, gs://, az://, https:// or the like"
        ) from error
    options = dict(storage_options)
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": 5, "max_pool_connections": CONNECTIONS} | options.get("config_kwargs", {})
    elif scheme in ("http", "https"):
        import aiohttp

        # Its default is five minutes for a whole file, however fast that comes.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)} | options.get("client_kwargs", {})
    elif scheme not in ("gs", "gcs"):
        options = kind._get_kwargs_from_urls(uri) | options
    return kind(**options), kind._strip_protocol(uri)


class CredentialsRefused(OSError):
    """The store refuses the credentials: no file's fault, and none can be read."""


def check_credentials(error: OSError, uri: str) -> None:
    """Raise CredentialsRefused if that is what a store's error comes from."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    if code in CREDENTIAL_FAULTS:
        raise CredentialsRefused(
            f"{uri}: the store refuses the credentials ({code}: {error}); renew those in the environment or storage_options, "
            "check this machine's clock, and run again"
        ) from error


def check_forbidden(store: Any, path: str, uri: str) -> None:
    """Raise CredentialsRefused if that is why `path` is forbidden. A byte of it is asked for: the answer to `info` has no room for a reason."""
    try:
        store.cat_file(path, start=0, end=1)
    except OSError as error:
        check_credentials(error, uri)


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn what a store raises into what the person who wrote the job can do. FileNotFoundError passes."""
    try:
        yield
    except (FileNotFoundError, ConfigError):
        raise
    except PermissionError as error:
        raise ConfigError(f"{uri}: forbidden ({error}); check the credentials in the environment or storage_options, and their rights") from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if str(error) else f"no answer within {PROBE_S:.0f} s"
        fix = "check the URI, the credentials, and endpoint_url in storage_options if the store is not the cloud's own"
        raise ConfigError(f"{uri} cannot be reached ({said}); {fix}") from error


@contextmanager
def listing_all(store: Any) -> Iterator[None]:
    """Raise what kept `store` from listing a folder: fsspec's walks leave such a folder out, and say nothing.

    fsspec gives each thread a store of its own, so nobody else's listings are met. A folder that was deleted meanwhile has no files.
    """
    name = "_ls" if store.async_impl else "ls"
    listed, failures = getattr(store, name), list[tuple[str, OSError]]()

    @contextmanager
    def noting(path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            failures.append((path, error))
            raise

    def ls(path: str, *args: Any, **kwargs: Any) -> Any:
        with noting(path):
            return listed(path, *args, **kwargs)

    async def ls_async(path: str, *args: Any, **kwargs: Any) -> Any:
        with noting(path):
            return await listed(path, *args, **kwargs)

    setattr(store, name, ls_async if store.async_impl else ls)
    try:
        yield
    finally:
        delattr(store, name)
    for path, error in failures:
        with reaching(store.unstrip_protocol(path)):
            raise error


def probe(uri: str, storage_options: dict[str, Any]) -> dict[str, Any] | None:
    """What the store says of a path, or None if there is nothing. In seconds, where the listing itself may take an hour."""
    options = dict(storage_options)
    if uri.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {"connect_timeout": 3, "read_timeout": 5, "retries": {"max_attempts": 1}} | options.get("config_kwargs", {})
    with reaching(uri):
        store, path = filesystem(uri, options)
        store.invalidate_cache()
        try:
            if store.async_impl:
                return dict(fsspec.asyn.sync(store.loop, store._info, path, timeout=PROBE_S))
            return dict(store.info(path))
        except FileNotFoundError as error:
            if isinstance(error.__cause__, OSError):  # what fsspec says of a web host that does not answer
                raise error.__cause__ from error
            return None
