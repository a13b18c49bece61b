"""The model card, README.md: what an encoder was made of and how to use it, in the form that the Hugging Face hub reads."""

import re
from typing import Any

import pydantic
import yaml

from pipeline.config import Model
from pipeline.vlm.spec import EncoderSpec

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
UNKNOWN = "unknown"


class DataSource(Model):
    """One set of data that the encoder was trained on."""

    name: str
    """Its name, or where it is."""
    rows: pydantic.NonNegativeInt | None = None
    """How many rows were used; null if nobody counted."""
    digest: str | None = None
    """Hash of its content, with the name of the hash."""
    licence: str | None = None
    """Null says unknown in the card."""


class Card(Model):
    """What the folder itself does not say."""

    name: str
    """Of the encoder."""
    base: str
    """The model that was begun with: its name on the hub, or another name."""
    base_commit: str | None = None
    """Of `base` on the hub; null if it was a folder."""
    base_licence: str | None = None
    """Its identifier on the hub, such as apache-2.0; null says unknown."""
    data: tuple[DataSource, ...] = ()
    """Empty if nothing was trained."""
    settings: dict[str, Any] = {}
    """Of the training, as the job file has them."""
    metrics: dict[str, float] = {}
    """By name, with the set that each was measured on."""
    curves: tuple[str, ...] = ()
    """Pictures, by their path within the folder."""

    instructions: dict[str, tuple[str, ...]] = {}
    """Of the sides query and document, all that rows which were trained on are told; "" where the encoder's own prompt is what they have."""

    def instruction(self, side: str) -> str | None:
        """What all rows of a side are told; None where they differ, or are told nothing."""
        told = self.instructions.get(side, ())
        return told[0] if len(told) == 1 and told[0] else None

    def training(self) -> dict[str, Any]:
        """What a table keeps of the run that made an encoder: all but metrics and pictures; empty if nothing was trained."""
        if not self.data:
            return {}
        values = self.model_dump(mode="json", include={"base", "base_commit", "base_licence", "data", "settings"})
        return {"run": self.name, **values}


def card_text(card: Card, spec: EncoderSpec, *, sentence_transformers: str | None) -> str:
    """The text of README.md. `sentence_transformers`: why that package cannot load the folder; None if it can."""
    sections = [
        f"---\n{_front_matter(card, spec, loads=sentence_transformers is None)}---\n\n# {card.name}\n",
        f"An embedding encoder of {', '.join(_takes(spec))} that Tessera saved. Fingerprint: `{spec.fingerprint or UNKNOWN}`.\n",
        f"## Base and licence\n\n{_base(card)}, licence: {card.base_licence or UNKNOWN}.\n",
        _data(card),
        _instructions(card),
        _table("Settings", ("setting", "value"), [*_flat(card.settings).items(), *_made(spec).items()]),
        _table("Metrics", ("metric", "value"), [(name, f"{value:.4g}") for name, value in card.metrics.items()]),
        _curves(card),
        _use(spec, sentence_transformers),
    ]
    return "\n".join(section for section in sections if section)


def folder_card_text(card: Card, kind: str, made: dict[str, Any]) -> str:
    """The same for a folder of `pipeline.encoders.folder`. `made`: settings that decide vectors."""
    library, takes, use = {
        "openclip": ("open_clip", "images or texts", 'open_clip.create_model_and_transforms("local-dir:path/to/this/folder")'),
        "sentence": ("sentence-transformers", "texts", 'sentence_transformers.SentenceTransformer("path/to/this/folder")'),
    }[kind]
    front = {"license": card.base_licence or UNKNOWN, "library_name": library, "pipeline_tag": "feature-extraction", "tags": ["tessera"]}
    base = {"base_model": card.base, "base_model_relation": "finetune"} if _HUB_NAME.fullmatch(card.base) else {}
    job = yaml.safe_dump({"encoder": {"target": "pipeline.encoders.saved:open_encoder", "args": {"folder": "path/to/this/folder"}}}, sort_keys=False)
    sections = [
        f"---\n{yaml.safe_dump(front | base, sort_keys=False, allow_unicode=True)}---\n\n# {card.name}\n",
        f"An embedding encoder of {takes} that Tessera saved.\n",
        f"## Base and licence\n\n{_base(card)}, licence: {card.base_licence or UNKNOWN}.\n",
        _data(card),
        _instructions(card),
        _table("Settings", ("setting", "value"), [*_flat(card.settings).items(), *_flat(made).items()]),
        _table("Metrics", ("metric", "value"), [(name, f"{value:.4g}") for name, value in card.metrics.items()]),
        _curves(card),
        f"## Use\n\nIn a job file of Tessera:\n\n```yaml\n{job}```\n\nIn Python, the same vectors once they are normalised: `{use}`.\n",
    ]
    return "\n".join(section for section in sections if section)


def _base(card: Card) -> str:
    return card.base if card.base_commit is None else f"{card.base} at commit {card.base_commit}"


def _instructions(card: Card) -> str:
    """Where rows were told different things, what: the encoder has one prompt a side."""
    rows = [(side, each or "the encoder's own") for side, told in card.instructions.items() if len(told) > 1 for each in told]
    return _table("Instructions that rows were trained under, where they differ; the encoder has its own alone", ("side", "instruction"), rows)


def _front_matter(card: Card, spec: EncoderSpec, *, loads: bool) -> str:
    values: dict[str, object] = {
        "license": card.base_licence or UNKNOWN,
        "library_name": "sentence-transformers" if loads else "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["tessera", "multimodal-embedding", *(["sentence-transformers"] if loads else [])],
    }
    if _HUB_NAME.fullmatch(card.base):
        values |= {"base_model": card.base, "base_model_relation": "finetune" if spec.adapter is None else "adapter"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _takes(spec: EncoderSpec) -> list[str]:
    return ["images", "texts"] if spec.of == "all" else [f"{spec.of}s"]


def _data(card: Card) -> str:
    if not card.data:
        return "## Data\n\nNone: nothing was trained.\n"
    rows = [(each.name, UNKNOWN if each.rows is None else f"{each.rows:,}", each.digest or UNKNOWN, each.licence or UNKNOWN) for each in card.data]
    return _table("Data", ("set", "rows", "hash", "licence"), rows)


def _made(spec: EncoderSpec) -> dict[str, object]:
    """What decides vectors, in the words of tessera.json."""
    values = spec.model_dump(mode="json", include={"prompt", "sizes", "reading", "head", "page", "of", "norm", "dtype", "widths", "layers"})
    return {name: value for name, value in _flat(values).items() if value not in (None, [])}


def _flat(values: dict[str, Any], before: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _table(title: str, heads: tuple[str, ...], rows: list[Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join([f"## {title}\n", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *lines, ""])


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")


def _curves(card: Card) -> str:
    pictures = [f"![{path.rpartition('/')[2].rpartition('.')[0]}]({path})" for path in card.curves]
    return "\n".join(["## Curves\n", *pictures, ""]) if pictures else ""


def _use(spec: EncoderSpec, reason: str | None) -> str:
    job = yaml.safe_dump({"encoder": {"target": "pipeline.encoders.saved:open_encoder", "args": {"folder": "path/to/this/folder"}}}, sort_keys=False)
    parts = [f"## Use\n\nIn a job file of Tessera, for documents and queries alike:\n\n```yaml\n{job}```\n"]
    if reason is None:
        parts.append(
            "With sentence-transformers 6.2 or newer, the same vectors:\n\n```python\n"
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("path/to/this/folder")\n'
            'documents = model.encode_document(["a text", image, {"image": image, "text": "both"}])  # PIL images\n'
            'queries = model.encode_query(["what is asked for"])\n```\n\n'
            f"Texts longer than {spec.sizes.max_tokens} tokens are cut by Tessera and not by sentence-transformers; their vectors differ.\n"
        )
    else:
        parts.append(f"sentence-transformers cannot make these vectors: {reason}.\n")
    if spec.adapter is None:
        parts.append("The weights alone, as hidden states: `transformers.AutoModel.from_pretrained(folder)`.\n")
    else:
        parts.append("The adapter alone: `peft.PeftModel.from_pretrained(base_model, folder)`.\n")
    return "\n".join(parts)
