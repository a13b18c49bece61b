"""Chat messages as cells: [{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}]."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.pairs.rows import BadRow, Image, image_of, short, text_of
from pipeline.vlm.message import MARKER


def is_chat(cell: Any) -> bool:
    """Whether a cell is a list of chat messages, or one."""
    first = cell[0] if isinstance(cell, list) and cell else cell
    return isinstance(first, Mapping) and "role" in first and "content" in first


def of_chat(cell: Any, folder: str, what: str) -> tuple[str, list[Image], str | None]:
    """Text with markers, images, and what the system says. Raises BadRow for an answer of the assistant: a document is one turn."""
    text, images, system = "", list[Image](), list[str]()
    for turn in cell if isinstance(cell, list) else [cell]:
        said, seen = _content(turn.get("content"), folder, what)
        if turn.get("role") == "system" and not seen:
            system.append(said)
        elif turn.get("role") == "user":
            text, images = text + said, images + seen
        else:
            raise BadRow("bad_row", f"{what} has a turn of {turn.get('role')!r}; only user, and system with text, can be embedded")
    return text, images, "\n".join(system) or None


def _content(content: Any, folder: str, what: str) -> tuple[str, list[Image]]:
    if isinstance(content, str):
        return content, []
    text, images = "", list[Image]()
    parts: Sequence[Any] = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text += text_of(part.get("text"), what) or ""
            continue
        image = image_of(part.get("image"), folder, what) if kind == "image" else None
        if image is None:
            raise BadRow("bad_row", f"{what} has a part that is neither text nor image: {short(part)}")
        text, images = text + MARKER, [*images, image]
    return text, images
