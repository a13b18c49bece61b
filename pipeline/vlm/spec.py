"""EncoderSpec: the one file, tessera.json, that says how a folder of weights becomes vectors.

The trainer writes it, and evaluator, embed job and search read it: nobody repeats a template, a pooling or a pixel limit in
a job file, so nobody gets them wrong. Paths in it are relative to the folder, which may be moved or copied as a whole.
"""

import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from pipeline.config import ConfigError, Model, nearest, section_of
from pipeline.encoders.lineage import COMMIT, sha256_of, sha256_of_all
from pipeline.encoders.precision import Dtype
from pipeline.encoders.sentence_folder import WEIGHTS
from pipeline.vlm.heads import HeadShape
from pipeline.vlm.settings import Prompt, Reading, Sizes
from pipeline.vlm.textimage import Page

FILE = "tessera.json"
FORMAT = 1
"""Rises whenever an older release would read a file wrongly."""
HEAD = "head.safetensors"
READ = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.ttf", "*.otf")
"""Files that can change a vector: all but the card and its pictures."""


class Origin(Model):
    """The model that was begun with: in the folder itself, or somewhere else under an adapter."""

    model: str = "."
    """`.` or `./...` for a folder within this one; else a name on the Hugging Face hub, or another folder."""
    revision: str | None = None
    """The commit on the hub, 40 digits."""
    files: dict[str, str] = {}
    """sha256 of its weights, where it is another folder."""


class EncoderSpec(Model):
    """What is needed to get the same vectors again. See `pipeline.vlm.saved.open_vlm`."""

    format: int = FORMAT
    """Of this file."""
    base: Origin = Origin()
    """Where the weights are."""
    adapter: str | None = None
    """Folder of a LoRA adapter within this one, `.` for this one; null if it is merged, or there is none."""
    prompt: Prompt = Prompt()
    """Template and instructions."""
    sizes: Sizes = Sizes()
    """Limits of pixels and tokens."""
    reading: Reading = Reading()
    """Layer, pooling, width, and how tokens see each other."""
    head: HeadShape | None = None
    """Takes the place of the pooling; its weights are in head.safetensors."""
    page: Page | None = None
    """Texts are drawn as pixels so; null reads them as tokens."""
    of: Literal["all", "image", "text"] = "all"
    """What of an item is embedded."""
    norm: Literal["l2"] = "l2"
    """Vectors have length 1."""
    dtype: Dtype = "float32"
    """The number format that the model computes in."""
    widths: tuple[pydantic.PositiveInt, ...] = ()
    """Widths that were trained (Matryoshka): `reading.width` may be any of them. Empty if only the full one was."""
    layers: tuple[pydantic.PositiveInt, ...] = ()
    """Layers that were trained: `reading.layer` may be any of them. Empty if only the last one was."""
    training: dict[str, Any] = {}
    """The run that made it: its name, what it began with, data, settings. No vector depends on it. Empty if nothing was trained."""
    files: dict[str, str] = {}
    """sha256 of every file of the folder that is read, by its path."""
    fingerprint: str = ""
    """That of the encoder: it changes whenever an item would get another vector. Empty until the spec is sealed."""

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> "EncoderSpec":
        inside = self.base.model == "." or self.base.model.startswith("./")
        if inside and self.base.revision is not None:
            raise ValueError(f"base.revision={self.base.revision!r} is for a model of the hub; base.model={self.base.model!r} is in the folder")
        if self.base.revision is not None and not COMMIT.fullmatch(self.base.revision):
            raise ValueError(f"base.revision={self.base.revision!r} must be a commit of 40 digits: a branch or a tag may change")
        if self.widths and self.reading.width is not None and self.reading.width not in self.widths:
            raise ValueError(f"reading.width={self.reading.width} was not trained; trained are {', '.join(map(str, self.widths))}")
        if self.layers and self.reading.layer is not None and self.reading.layer not in self.layers:
            raise ValueError(f"reading.layer={self.reading.layer} was not trained; trained are {', '.join(map(str, self.layers))}")
        return self

    def save(self, folder: Path) -> None:
        """Write tessera.json."""
        write_spec(self, folder)


def write_spec(spec: Model, folder: Path) -> None:
    """Write tessera.json. The last file that is written: who sees it may trust every file that it names."""
    text = json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False)
    part = folder / f".{FILE}.part"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / FILE)


def load_spec(folder: Path) -> EncoderSpec:
    """The spec of a folder, every file of which is as it was saved. Raises ConfigError naming the file or key that is not."""
    spec = parse_spec(read_spec(folder), folder / FILE)
    _check_files(spec, folder)
    return spec


def read_spec(folder: Path) -> Any:
    """What tessera.json says, of whatever kind of encoder. Raises ConfigError if there is none, or it is no JSON."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no saved encoder: {FILE} is not in it; give the folder that training or `save_encoder` wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; it is written by `save_encoder`, copy it again") from error


def parse_spec(values: Any, path: Path) -> EncoderSpec:
    """A spec from what its JSON says. Raises ConfigError if a newer release wrote it, or naming each wrong key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(values).__name__}")
    version = values.get("format")
    if not isinstance(version, int) or version < 1:
        raise ConfigError(f"{path} does not say which format it is (format: {version!r}); it is no {FILE} that this project wrote")
    if version > FORMAT:
        raise ConfigError(
            f"{path} is of format {version}, and this release reads up to {FORMAT}: upgrade (pip install -U tessera), or save it with this one"
        )
    if "encoder" in values:
        raise ConfigError(
            f"{path} is of another kind of encoder ({values['encoder']}); open it by pipeline.encoders.saved:open_encoder, which opens all"
        )
    try:
        return EncoderSpec.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explained(problem, path) for problem in error.errors())) from None


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of the folder that can change a vector, by its path within it."""
    return {name: digest for name, digest in sha256_of_all(folder, [f"**/{pattern}" for pattern in READ]).items() if name != FILE}


def outside_digests(base: Path) -> dict[str, str]:
    """sha256 of the weights of a base that lies in another folder."""
    safe, pickled = (sha256_of_all(base, [pattern]) for pattern in WEIGHTS)
    return safe or pickled


def _check_files(spec: EncoderSpec, folder: Path) -> None:
    check_files(spec.files, folder)
    if spec.base.files:
        base = Path(spec.base.model).expanduser()
        if not base.is_dir():
            raise ConfigError(
                f"{folder / FILE}: the base model's folder {base} is not there; put it back, or save the encoder merged (adapter: null)"
            )
        _compare(spec.base.files, base)


def check_files(files: dict[str, str], folder: Path) -> None:
    """Every file that was saved is there and the same, and none has come that would be read. Raises ConfigError naming the file."""
    _compare(files, folder)
    came = sorted(set(digests(folder)) - set(files))
    if came:
        raise ConfigError(
            f"{folder}: {', '.join(came[:3])} came after the encoder was saved and may be read with it; remove it, or save the encoder again"
        )


def _compare(files: dict[str, str], folder: Path) -> None:
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing: it was there when the encoder was saved; copy the folder again")
        found = sha256_of(path)
        if found != digest:
            raise ConfigError(
                f"{path} is not the file that was saved (sha256 {found[:12]}..., not {digest[:12]}...): its vectors would not match those in tables; "
                "copy the folder again, or save the encoder anew to get a new fingerprint"
            )


def _explained(problem: Any, path: Path) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = section_of(EncoderSpec, problem["loc"][:-1])
        names = list(section.model_fields) if section else []
        return f"{path}: {where}: unknown key{nearest(str(problem['loc'][-1]), names)}; the keys here are {', '.join(names)}"
    return f"{path}: {where}: {problem['msg']}".replace(": : ", ": ")
