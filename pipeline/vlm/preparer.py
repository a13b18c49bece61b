"""Preparer: a message to the tensors that a model is given. On the CPU, without weights; safe in several threads.

A batch is a list of rows, each with tensors of its own, so that it can be cut anywhere: `collate` puts rows together at
the last moment. Padding goes to the right, where no token of a causal model sees it.
"""

import re
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config import ConfigError
from pipeline.vlm.base import QWEN, TILED, Base
from pipeline.vlm.message import MARKER, PLACEHOLDER, Message, check_markers, neutral, neutralised
from pipeline.vlm.settings import Sizes
from pipeline.vlm.templates import Template

_IMAGES = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "batch_num_images")
"""What image processors give beside pixels, as far as models take it."""

_NESTED = (*TILED, "llava_onevision")
"""Model types whose processor is told which images are of one row: LLaVA-OneVision cuts an image into tiles only if it is alone."""

_LONGEST = 200
"""Qwen's processor refuses an image so many times longer than wide, and says so when the row is made."""


@dataclass(frozen=True)
class Prepared:
    """One message for the model, unpadded."""

    input_ids: torch.Tensor
    """(T,) int64."""
    along: dict[str, torch.Tensor]
    """Other numbers a token, by the model's name for them: (T,)."""
    images: dict[str, torch.Tensor]
    """This row's pixels and what goes with them, by the model's names; empty without images."""
    image_tokens: int
    place: int | None = None
    """Where the placeholder of Token Prepending stands, if the template has one."""

    def __len__(self) -> int:
        """Number of tokens, those of images included."""
        return len(self.input_ids)


class Preparer:
    """The processor of one model, with its sizes fixed."""

    def __init__(self, base: Base, sizes: Sizes) -> None:
        self.kind, self.max_tokens = base.kind, sizes.max_tokens
        self.processor = _processor(base)
        """transformers' own: tokenizer and image processor in one."""
        self.pixels = _limit(self.processor.image_processor, base.kind, sizes)
        """What the image processor was told: part of the lineage."""
        self.tokenizer = self.processor.tokenizer
        self.image_token_id = int(base.config.get("image_token_id", base.config.get("image_token_index", self.processor.image_token_id)))
        self.control = _control(self.processor)
        """Matches the model's special tokens."""
        self._place_token = self.tokenizer.pad_token or self.tokenizer.eos_token  # no text has it
        self._lock = threading.Lock()

    def most_image_tokens(self) -> int | None:
        """Tokens of the largest image; None for models other than the Qwen family, whose images are of one size or tiled."""
        if self.kind not in QWEN:
            return None
        return int(self.processor.image_processor.size["longest_edge"]) // self.pixels_a_token

    @property
    def pixels_a_token(self) -> int:
        """Of an image (the Qwen family)."""
        return int(self.processor.image_processor.patch_size * self.processor.image_processor.merge_size) ** 2

    def read(self, message: Message, template: Template, *, instruction: str | None = None, query: bool = False) -> Prepared:
        """One row: the message under an instruction (None: the template's own), its text cut to `max_tokens` if it must be.

        Special tokens in the message or the instruction are read as plain letters; only the template's own count. Raises
        ValueError if markers and images do not agree, or if the images alone are too long.
        """
        render = template.query if query else template.document
        said = neutral(template.instruction if instruction is None else instruction, self.control)
        message = neutralised(message, self.control)
        row = self.prepare(render(said, message), message.images, bare=template.bare)
        while len(row) > self.max_tokens:
            message = self._shorter(message, len(row) - self.max_tokens, row)
            row = self.prepare(render(said, message), message.images, bare=template.bare)
        return row

    def prepare(self, text: str, images: tuple[np.ndarray, ...] = (), *, bare: bool = False) -> Prepared:
        """One row of a text with an image marker for each image. Special tokens in the text are special: see `read`.

        `bare`: as a template says it.
        """
        if text.count(MARKER) != len(images):
            check_markers(text, len(images))
            raise ValueError(f"the text has no image marker ({MARKER}) and the message {len(images)} images")
        joint = self._framed(text).replace(MARKER, self.image_text(bare=bare)).replace(PLACEHOLDER, self._place_token)
        features = self._features(joint, images)
        ids = features["input_ids"][0]
        if not len(ids):
            raise ValueError("the message and its template together are empty: there is nothing to embed")
        image_tokens = int((ids == self.image_token_id).sum())
        if bool(image_tokens) != bool(images):
            raise ValueError(f"{len(images)} images became {image_tokens} image tokens; the text is {joint[:200]!r}")
        along = {name: features[name][0] for name in _along(self.kind) if name in features}
        if bare and "mm_token_type_ids" in along:
            along["mm_token_type_ids"] = torch.zeros_like(ids)
        kept = {name: features[name] for name in _IMAGES if name in features} if images else {}
        place = ids.tolist().index(self.tokenizer.convert_tokens_to_ids(self._place_token)) if PLACEHOLDER in text else None
        return Prepared(ids, along, kept, image_tokens, place)

    def resized(self, image: np.ndarray) -> np.ndarray:
        """The image at the size that the model reads it in, where it has one of its own (the Qwen family); else unchanged.

        uint8 (H, W, 3) to uint8 (h, w, 3). The same row comes of it, to the bit: for decode workers, who then hold less.
        """
        processor = self.processor.image_processor
        height, width = image.shape[:2]
        if self.kind not in QWEN or max(height, width) > _LONGEST * min(height, width):
            return image
        from transformers.image_utils import SizeDict

        # A copy: the pixels of an Arrow table are read-only, which torch warns of.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        factor = processor.patch_size * processor.merge_size
        pixels = processor.resize(pixels, size=SizeDict(**dict(processor.size)), resample=processor.resample, factor=factor)
        resized: np.ndarray = pixels[0].permute(1, 2, 0).contiguous().numpy()
        return resized

    def collate(self, rows: list[Prepared]) -> dict[str, torch.Tensor]:
        """The rows as one batch: the arguments of the model's forward, padded to the right."""
        width = max(len(row) for row in rows)
        batch = {"input_ids": torch.full((len(rows), width), int(self.image_token_id == 0)), "attention_mask": torch.zeros((len(rows), width))}
        batch = {name: values.long() for name, values in batch.items()}
        batch.update({name: torch.zeros((len(rows), width), dtype=torch.long) for name in rows[0].along})
        for index, row in enumerate(rows):
            batch["attention_mask"][index, : len(row)] = 1
            for name, values in {"input_ids": row.input_ids, **row.along}.items():
                batch[name][index, : len(row)] = values
        with_images = [row.images for row in rows if row.images]
        if with_images:
            # Idefics has a place for images in every row, also in one that has none; the others have a list of images.
            parts = [row.images for row in rows] if self.kind in TILED else with_images
            batch.update({name: _stacked([part.get(name) for part in parts], like) for name, like in with_images[0].items()})
        return batch

    def _features(self, text: str, images: tuple[np.ndarray, ...]) -> Any:
        from PIL import Image

        # An array of 3 x 3 pixels does not say which side is colour; a PIL image does.
        pictures = [Image.fromarray(image) for image in images]
        with self._lock:  # a tokenizer keeps its settings in itself while it runs
            if not images:  # not every processor takes a text alone
                ids = self.tokenizer([text], return_tensors="pt")["input_ids"]
                return {"input_ids": ids, **{name: torch.zeros_like(ids) for name in _along(self.kind)}}
            return self.processor(text=[text], images=[pictures] if self.kind in _NESTED else pictures, return_tensors="pt")

    def image_text(self, *, bare: bool) -> str:
        """What stands in a text for one image; `bare`: without the tokens around it."""
        token: str = self.processor.image_token
        return f"<|vision_start|>{token}<|vision_end|>" if self.kind in QWEN and not bare else token

    def _framed(self, text: str) -> str:
        # PaliGemma's processor does so after images, and forgets it where there are none.
        return f"{self.tokenizer.bos_token}{text}\n" if self.kind == "paligemma" and MARKER not in text else text

    def _shorter(self, message: Message, excess: int, row: Prepared) -> Message:
        """The message without the last `excess` tokens of its text, every image kept."""
        parts = message.text.split(MARKER)
        for index in range(len(parts) - 1, -1, -1):
            if not parts[index] or excess <= 0:
                continue
            with self._lock:
                offsets = self.tokenizer(parts[index], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            kept = max(0, len(offsets) - excess)
            excess -= len(offsets) - kept
            # At least a letter less each time, whatever the tokenizer says, so that this comes to an end.
            parts[index] = parts[index][: min(offsets[kept][0], len(parts[index]) - 1)] if kept < len(offsets) and kept else ""
        if MARKER.join(parts) == message.text:
            raise ValueError(
                f"{len(row)} tokens, {row.image_tokens} of them of {len(message.images)} images, are more than max_tokens={self.max_tokens}, and "
                "there is no text left to cut: an image is never cut; raise max_tokens, or lower max_pixels"
            )
        return Message(MARKER.join(parts), message.images)


def _processor(base: Base) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(base.folder)
    except ImportError as error:  # SmolVLM's asks for num2words, which it needs for videos
        raise ConfigError(f"the processor of {base.folder} needs another package: {error}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ConfigError(f"{base.folder} loads as {type(processor).__name__}, which has no image processor: images would never reach the model")
    return processor


def _limit(images: Any, kind: str, sizes: Sizes) -> dict[str, object]:
    """Set the sizes on an image processor; what it has then."""
    if kind in QWEN:
        given = {"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels}
        images.size = {**dict(images.size), **{name: value for name, value in given.items() if value is not None}}
        if images.size["shortest_edge"] > images.size["longest_edge"]:
            raise ConfigError(f"min_pixels={images.size['shortest_edge']} is more than max_pixels={images.size['longest_edge']}")
    elif sizes.min_pixels is not None or sizes.max_pixels is not None:
        raise ConfigError(f"min_pixels and max_pixels are for {', '.join(QWEN)}; {kind} has a fixed size of image")
    if kind in TILED:
        images.do_image_splitting = images.do_image_splitting if sizes.tiles is None else sizes.tiles
    elif sizes.tiles is not None:
        raise ConfigError(f"tiles is for {', '.join(TILED)}; {kind} cuts images as its own settings say, or not at all")
    return {"size": dict(images.size), "tiles": getattr(images, "do_image_splitting", None)}


def _control(processor: Any) -> re.Pattern[str]:
    """Matches every text that the tokenizer reads as a special token."""
    tokenizer = processor.tokenizer
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {PLACEHOLDER, *tokenizer.all_special_tokens, *processor.all_special_multimodal_tokens} - {MARKER}
    # The longest first: one may begin another.
    found = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in found) or r"(?!)")


def _along(kind: str) -> tuple[str, ...]:
    if kind in QWEN:
        return ("mm_token_type_ids",)  # where its images' positions have rows and columns
    return ("token_type_ids",) if kind == "paligemma" else ()  # its prompt sees itself in both directions


def _stacked(parts: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """Joined along the first axis, the others padded with zeros to the longest; a None is all zeros."""
    given = [torch.zeros((1, *[0] * (like.ndim - 1)), dtype=like.dtype) if part is None else part for part in parts]
    shape = [max(part.shape[axis] for part in given) for axis in range(1, like.ndim)]
    padded = [torch.zeros((len(part), *shape), dtype=like.dtype) for part in given]
    for whole, part in zip(padded, given, strict=True):
        whole[tuple(slice(length) for length in part.shape)] = part
    return torch.cat(padded)
