"""Instruction templates: what stands around a message, to the space. Another white space is another vector.

* `plain`: images, a line break, instruction and text.
* `vlm2vec-v1`: VLM2Vec as its image tasks are evaluated (TIGER-AI-Lab/VLM2Vec, src/data/eval_dataset/image_qa_dataset.py,
  image_cls_dataset.py, image_t2i_eval.py): a line break after the image and one at the end. `vlm2vec-v1-visdial` has two at
  the end of text queries, as VisDial has there.
* `vlm2vec-v2`: VLM2Vec-V2's video and document tasks (src/model/processor.py, process_input_text; vidore_dataset.py):
  spaces, and nothing at the end. Its image tasks are those of v1.
* `qwen3-vl-embedding`: QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py: the instruction as system prompt.
* `prompt-eol`: "means in one word" for models without training: PromptEOL (arXiv 2307.16645) for texts, the wording of
  E5-V (arXiv 2407.12580) for images.

VLM2Vec gives Qwen models a bare image token, without the tokens that begin and end an image: then its own copy of the model
counts positions of an image as if it were text (get_rope_index looks for the beginning). `bare` says to do the same.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.config import ConfigError, nearest
from pipeline.vlm.message import MARKER, PLACEHOLDER, Message, placed


@dataclass(frozen=True)
class Template:
    """`query` and `document` take an instruction and a message to the text that the model is given, with image markers."""

    query: Callable[[str, Message], str]
    document: Callable[[str, Message], str]
    instruction: str = ""
    """Used where none is given."""
    bare: bool = False
    """Images have no beginning and end tokens, and are counted as text."""


def template_of(name: str) -> Template:
    """The template with this name, or made of a text with {input} and, if wanted, {instruction}."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{input}" not in name:
        raise ConfigError(
            f"template {name!r} is neither one of {', '.join(TEMPLATES)} nor a text with {{input}}{nearest(name, TEMPLATES)}; "
            "{input} is where the message goes, {instruction} where the instruction goes"
        )
    return _own(name)


def with_placeholder(template: Template) -> Template:
    """The template with the placeholder of Token Prepending before the text of each message."""

    def prepended(render: Callable[[str, Message], str]) -> Callable[[str, Message], str]:
        return lambda instruction, message: render(instruction, replace(message, text=PLACEHOLDER + message.text))

    return replace(template, query=prepended(template.query), document=prepended(template.document))


def _own(text: str) -> Template:
    def render(instruction: str, message: Message) -> str:
        # In one pass: an instruction or a message may hold braces of its own.
        values = {"{instruction}": instruction, "{input}": placed(message)}
        return re.sub(r"\{instruction\}|\{input\}", lambda found: values[found[0]], text)

    return Template(render, render)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _before(message: Message) -> tuple[str, str]:
    """Markers of images that come before the text, and the text, which has the others."""
    text = placed(message)
    markers = MARKER * len(message.images)
    return (markers, text.removeprefix(markers)) if message.images and text.startswith(markers) else ("", text)


def _plain(instruction: str, message: Message) -> str:
    markers, text = _before(message)
    said = _joined(instruction, text)
    return f"{markers}\n{said}" if markers and said else markers + said


def _vlm2vec_v1_query(instruction: str, message: Message) -> str:
    markers, text = _before(message)
    said = _joined(instruction.strip(), text)
    # " \n" became "\n" where VLM2Vec put its parts together.
    return f"{markers}\n{said}\n" if markers else f"{said}\n"


def _vlm2vec_v1_document(instruction: str, message: Message) -> str:
    return _vlm2vec_v1_query(instruction, message) if message.images else _joined(instruction.strip(), message.text)


def _vlm2vec_v1_visdial(instruction: str, message: Message) -> str:
    return _vlm2vec_v1_query(instruction, message) + ("" if message.images else "\n")


def _vlm2vec_v2(instruction: str, message: Message) -> str:
    markers, text = _before(message)
    return _joined(markers, instruction, text)


def _qwen3_vl_embedding(instruction: str, message: Message) -> str:
    system = instruction.strip()
    if system and not unicodedata.category(system[-1]).startswith("P"):
        system += "."
    user = placed(message) or "NULL"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def _prompt_eol(instruction: str, message: Message) -> str:
    markers, text = _before(message)
    before = f"{instruction}\n" if instruction else ""
    if not markers:
        return f'{before}This sentence : "{text}" means in one word:"'
    if not text:
        return f"{before}{markers}\nSummary of the above image in one word:"
    return f"{before}{markers}\n{text}\nSummary of the above image and text in one word:"


TEMPLATES = {
    "plain": Template(_plain, _plain),
    "vlm2vec-v1": Template(_vlm2vec_v1_query, _vlm2vec_v1_document, bare=True),
    "vlm2vec-v1-visdial": Template(_vlm2vec_v1_visdial, _vlm2vec_v1_document, bare=True),
    "vlm2vec-v2": Template(_vlm2vec_v2, _vlm2vec_v2, bare=True),
    "qwen3-vl-embedding": Template(_qwen3_vl_embedding, _qwen3_vl_embedding, instruction="Represent the user's input."),
    "prompt-eol": Template(_prompt_eol, _prompt_eol),
}
