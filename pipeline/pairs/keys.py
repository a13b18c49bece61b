"""64-bit hashes of what a row is: what the order of training is made from, and what tells the same document again. BLAKE2b."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

MAX_INT32 = 2**31 - 1


def hash64(*parts: str | bytes | None) -> int:
    """A signed 64-bit hash; parts cannot run together, and null is not empty. The same on every machine, in every release."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"-" if data is None else b"%d:" % len(data))
        digest.update(data or b"")
    return int.from_bytes(digest.digest(), "little", signed=True)


def content_key(message: Mapping[str, Any]) -> int:
    """Of text and images. Images by their bytes, or by their URI where they are not at hand: a copy elsewhere is then another image."""
    images = [part for image in message["images"] or [] for part in (image["bytes"], image["uri"] if image["bytes"] is None else None)]
    return hash64("content", message["text"], *images)


def document_key(message: Mapping[str, Any], dataset: str) -> int:
    """Of a document's id within its data set, else of its content."""
    return content_key(message) if message["id"] is None else hash64("id", dataset, message["id"])


def told_key(key: int, instruction: str) -> int:
    """A key of what is read under an instruction: the same text that is told something else is something else. Without one, the key itself."""
    return hash64("told", instruction, str(key)) if instruction else key


def cost_of(messages: Sequence[Mapping[str, Any]], tokens_per_image: int) -> int:
    """Estimated tokens: four bytes of UTF-8 a token, which is about right for English, and as many an image as said."""
    text = sum(len((message["text"] or "").encode("utf-8", "surrogatepass")) for message in messages)
    images = sum(len(message["images"] or []) for message in messages)
    return min(MAX_INT32, -(-text // 4) + images * tokens_per_image)
