"""Message: what is embedded, a text and images in any order, with one neutral marker wherever an image stands."""

import re
from dataclasses import dataclass, replace

import numpy as np

MARKER = "<|image|>"
"""Stands in a text where an image goes, whatever the model calls it."""

PLACEHOLDER = "<|placeholder|>"
"""Stands in a text where Token Prepending wants a token of its own (`pipeline.vlm.prepending`)."""


@dataclass(frozen=True)
class Message:
    """`images`, uint8 (H, W, 3) each, in the order of their markers in `text`; without a marker they come before the text."""

    text: str = ""
    images: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        for image in self.images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"an image of a message must be uint8 (height, width, 3), not {image.dtype} {image.shape}")


def placed(message: Message, *, gap: str = "") -> str:
    """The text with a marker for each image. `gap` goes after images that are put before the text.

    Raises ValueError if there are markers, but not as many as images.
    """
    check_markers(message.text, len(message.images))
    if not message.images or MARKER in message.text:
        return message.text
    return MARKER * len(message.images) + (gap + message.text if message.text else "")


def words(text: str) -> str:
    """A text less its markers and the white space around it: empty where it only says where images stand."""
    return text.replace(MARKER, "").strip()


def check_markers(text: str, images: int) -> None:
    """Raises ValueError unless the text has no marker at all or one for each image."""
    markers = text.count(MARKER)
    if markers not in (0, images):
        raise ValueError(f"the text has {markers} image markers ({MARKER}) and the message {images} images; give one marker for each image, or none")


def neutral(text: str, control: re.Pattern[str]) -> str:
    """The text with a space after the first character of whatever `control` matches, markers left as they are.

    So a text that holds a model's own special token, such as <|im_end|>, is read as letters. Tokenizers look for special
    tokens before anything else, and not every one can be told not to: changing the letters works with all of them.
    """
    parts = [control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", part) for part in text.split(MARKER)]
    return MARKER.join(parts)


def neutralised(message: Message, control: re.Pattern[str]) -> Message:
    """The message with `neutral` text."""
    return replace(message, text=neutral(message.text, control))
