"""Credentials in a configuration: told by their names, kept out of what is printed and stored."""

import re
from collections.abc import Iterable
from typing import Any

SECRET = re.compile(
    r"(aws_)?(secret|secret_key|secret_access_key|access_key|access_key_id)|((hf|api|auth|access|session|aws_session|bearer|sas)_)?token"
    r"|client_secret|api_?key|account_key|private_key|password|passwd|passphrase|connection_string|credentials?|authorization"
)
"""Names of credentials, whole: `tokenizer` and `text_key` are none."""
OPTIONS = frozenset({"storage_options", "client_kwargs"})
"""What is handed to a store: any text within may be a credential, whatever its name."""
IN_URI = re.compile(
    r"(?<=://)[^/?#@\s]*:[^/?#@\s]*(?=@)|(?:(?<=[?&]sig=)|(?<=[?&]x-amz-signature=)|(?<=[?&]x-goog-signature=))[^&#\s]+", re.IGNORECASE
)
"""Name and password before a host, and what signs a URL."""


def without_secrets(value: Any) -> Any:
    """A copy of a configuration in which credentials, and every text among a store's options, read `***`."""
    if isinstance(value, dict):
        return {k: _masked(v) if _names_secret(k) or _names_options(k) else without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    return IN_URI.sub("***", value) if isinstance(value, str) else value


def dropping_secrets(value: Any) -> Any:
    """A copy of a configuration that leaves them out: what is built from it takes them from the environment."""
    if isinstance(value, dict):
        return {k: dropping_secrets(v) for k, v in value.items() if not (_names_secret(k) and v is not None) and not _names_options(k)}
    if isinstance(value, list | tuple):
        return [dropping_secrets(entry) for entry in value]
    return value


def hides(location: Iterable[Any]) -> bool:
    """Whether what stands at the end of these keys may be a credential."""
    return any(_names_secret(part) or _names_options(part) for part in location)


def _names_secret(name: Any) -> bool:
    return SECRET.fullmatch(str(name).lower().replace("-", "_")) is not None


def _names_options(name: Any) -> bool:
    return str(name).lower() in OPTIONS


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _masked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(entry) for entry in value]
    return "***" if isinstance(value, str) else value
