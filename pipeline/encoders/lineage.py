"""What a fingerprint is a hash of: the identity of weights, whether they are a file or a repository of the Hugging Face hub."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.config import ConfigError

COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint_of(lineage: dict[str, object]) -> str:
    """Hash of a lineage, whatever the order of its keys: 32 hexadecimal digits."""
    text = json.dumps(lineage, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sha256_of(path: str | Path) -> str:
    """sha256 of a file, as hexadecimal digits. Read once a process while size and time of the file stay the same."""
    stat = Path(path).stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # size and time are in its key
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """sha256 of every file of `folder` that fits one of the patterns, by its path within the folder."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in found}


def hub_commit(repo: str, revision: str | None, cache_dir: str | None = None) -> str:
    """The commit that `revision` (a branch, a tag, a commit; default main) of a hub repository stands for.

    The local cache is asked first, so that a run does not need the hub, nor changes when the repository does.
    Raises ConfigError if neither the cache nor the hub knows it.
    """
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    cached = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    if cached.is_file():
        return cached.read_text().strip()
    try:
        commit: str | None = HfApi().model_info(repo, revision=revision, timeout=30).sha
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        _check_refused(repo, error)
        raise ConfigError(
            f"{repo}@{revision} is not in the local cache, and the hub cannot say which commit it is ({_first_line(error)}); "
            f"check the name, go online once, or pin a commit of 40 digits as the revision"
        ) from error
    if commit is None:
        raise ConfigError(f"the hub does not say which commit {repo}@{revision} is; pin a commit of 40 digits as the revision")
    return commit


def snapshot(repo: str, commit: str, cache_dir: str | None, patterns: list[str] | None) -> Path:
    """The folder with the files of a hub repository at a commit; `patterns`: only these (None: PyTorch's weights too).

    Raises ConfigError if they are neither in the local cache nor to be had.
    """
    from huggingface_hub import snapshot_download

    other_formats = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlpackage*", "onnx/*", "openvino/*"]
    try:
        return Path(snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=other_formats))
    except Exception as error:  # as above
        _check_refused(repo, error)
        raise ConfigError(f"{repo}@{commit} is not in the local cache and cannot be fetched from the hub: {_first_line(error)}") from error


def _check_refused(repo: str, error: Exception) -> None:
    """Raise ConfigError if the hub does not let this user at a repository, saying how it does."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    log_in = "log in with `hf auth login`, or set HF_TOKEN where the job runs and on every worker"
    if isinstance(error, GatedRepoError):
        raise ConfigError(f"the hub gives {repo} only to those who have accepted its terms: do so on the model's page, then {log_in}") from error
    if isinstance(error, RepositoryNotFoundError):
        raise ConfigError(f"the hub has no repository {repo}, or it is private: correct the name, or {log_in}") from error
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        raise ConfigError(f"the hub refuses the token ({_first_line(error)}): {log_in}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
