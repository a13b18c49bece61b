"""The files beside the weights by which sentence-transformers (6.2 or newer) makes the same vectors of the same folder.

It puts whatever it embeds through the processor's chat template. So that template is written to do what ours does, proved on
examples, and `encode_query` and `encode_document` choose between the two instructions. Where the architecture does not
allow the same vectors, `obstacle` says why, and no file is written: a folder that loads and gives other vectors is worse.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.vlm.base import QWEN
from pipeline.vlm.causality import saved_with_model
from pipeline.vlm.message import MARKER, Message, neutral
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.spec import EncoderSpec
from pipeline.vlm.templates import Template, template_of

_MODES = {"last": "lasttoken", "mean": "mean", "cls": "cls", "weightedmean": "weightedmean"}
_TEXT = "\u2983text\u2984"
"""Stands for a text where a template is looked at; no template has it."""
_MOST_TOKENS = 500
_HOW = {"method": "forward", "method_output_name": "last_hidden_state"}


class Unsuitable(Exception):
    """The template cannot be said as a chat template."""


@dataclass(frozen=True)
class _Side:
    """What a template puts around a message: around a text; images; images and a text. And what it makes of an empty text."""

    text: tuple[str, str]
    images: tuple[str, str]
    both: tuple[str, str, str]
    empty: str


def obstacle(spec: EncoderSpec, model: torch.nn.Module, preparer: Preparer) -> str | None:
    """Why sentence-transformers would not make the same vectors; None if it does."""
    reading, config = spec.reading, _config(model)
    checks = {
        "it has a trained head of its own": spec.head is not None,
        "texts are drawn as pixels": spec.page is not None,
        "Token Prepending is switched on": reading.prepending is not None,
        "it is read at a layer before the last": reading.layer not in (None, config.get_text_config().num_hidden_layers),
        "PaliGemma's texts have a frame that its processor gives only to images": preparer.kind == "paligemma",
        "its template counts images as text": template_of(spec.prompt.template).bare and preparer.kind in QWEN,
        "its attention is made bidirectional while it loads": reading.bidirectional and (spec.adapter is not None or not saved_with_model(model)),
        f"only a part of an item is embedded (of: {spec.of})": spec.of != "all",
    }
    found = next((reason for reason, holds in checks.items() if holds), None)
    if found is not None:
        return found
    try:
        chat_template(spec, preparer)
    except Unsuitable as error:
        return str(error)
    return None


def write_sentence_files(folder: Path, spec: EncoderSpec, dim: int) -> None:
    """Write modules.json and what it names. `dim`: width of the backbone. The chat template is saved with the processor."""
    modules = {"": "base.modules.transformer.Transformer", "1_Pooling": "sentence_transformer.modules.pooling.Pooling"}
    pooling = {"embedding_dimension": dim, "pooling_mode": _MODES[spec.reading.pooling], "include_prompt": True}
    _write(folder / "1_Pooling" / "config.json", pooling)
    if spec.reading.width not in (None, dim):
        modules["2_Dense"] = "base.modules.dense.Dense"
        _write_cut(folder / "2_Dense", dim, int(spec.reading.width or dim))
    last = f"{len(modules)}_Normalize"
    modules[last] = "base.modules.normalize.Normalize"
    _write(folder / last / "config.json", {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"})
    modality = dict.fromkeys(("text", "image", "image+text"), _HOW) | {"message": {**_HOW, "format": "structured"}}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": modality,
        "module_output_name": "token_embeddings",
        # Cut by number of tokens, an image would lose some of its own.
        "processing_kwargs": {"text": {"truncation": False}},
        "model_kwargs": {"dtype": spec.dtype},
    }
    _write(folder / "sentence_bert_config.json", transformer)
    saved: dict[str, object] = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", saved)
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (path, kind) in enumerate(modules.items())
    ]
    _write(folder / "modules.json", listed)


def chat_template(spec: EncoderSpec, preparer: Preparer) -> str:
    """A chat template (Jinja) that makes of a user's message what the spec's template makes. Raises Unsuitable."""
    template = template_of(spec.prompt.template)
    document = template.instruction if spec.prompt.instruction is None else spec.prompt.instruction
    query = document if spec.prompt.query_instruction is None else spec.prompt.query_instruction
    sides = [_side(template, _said(said, preparer), query=query) for query, said in ((False, document), (True, query))]
    text = _jinja(sides[0], sides[1], preparer, template)
    _prove(text, template, {False: _said(document, preparer), True: _said(query, preparer)}, preparer)
    return text


def _said(instruction: str, preparer: Preparer) -> str:
    # As `Preparer.read` does.
    return neutral(instruction, preparer.control).replace(MARKER, "").strip("\0")


def _side(template: Template, said: str, *, query: bool) -> _Side:
    render = template.query if query else template.document
    image = (np.zeros((1, 1, 3), np.uint8),)
    before, rest = _split(render(said, Message(_TEXT, image)), MARKER)
    between, after = _split(rest, _TEXT)
    return _Side(
        text=_split(render(said, Message(_TEXT)), _TEXT),
        images=_split(render(said, Message("", image)), MARKER),
        both=(before, between, after),
        empty=render(said, Message("")),
    )


def _split(rendered: str, at: str) -> tuple[str, str]:
    before, found, after = rendered.partition(at)
    if not found or at in after:
        raise Unsuitable("its template does not put images before the text, each once")
    return before, after


def _jinja(document: _Side, query: _Side, preparer: Preparer, template: Template) -> str:
    added = {*preparer.tokenizer.get_added_vocab(), *preparer.tokenizer.all_special_tokens}
    tokens = sorted((token for token in added if preparer.control.fullmatch(token)), key=len, reverse=True)
    if len(tokens) > _MOST_TOKENS:
        raise Unsuitable(f"its tokenizer has {len(tokens)} special tokens, too many to keep out of texts in a chat template")
    image = _literal(preparer.image_text(bare=template.bare))
    return "".join(
        [
            "{%- set it = namespace(text='', images=0) -%}",
            "{%- for message in messages -%}",
            "{%- if message['role'] != 'user' -%}",
            "{{ raise_exception('this encoder has its own instructions: give no prompt, use encode_query and encode_document') }}{%- endif -%}",
            "{%- if message['content'] is string -%}{%- set it.text = it.text + message['content'] -%}{%- else -%}",
            "{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'text' -%}{%- set it.text = it.text + part['text'] -%}",
            "{%- elif part['type'] == 'image' -%}{%- set it.images = it.images + 1 -%}",
            "{%- else -%}{{ raise_exception('this encoder takes texts and images') }}{%- endif -%}",
            "{%- endfor -%}{%- endif -%}{%- endfor -%}",
            f"{{%- if {_literal(MARKER)} in it.text -%}}{{{{ raise_exception('image markers in a text are read by Tessera only') }}}}{{%- endif -%}}",
            # A text that holds a special token is read as letters, as `message.neutral` does.
            f"{{%- for token in {_literal(tokens)} -%}}{{%- set it.text = it.text.replace(token, token[0] + ' ' + token[1:]) -%}}{{%- endfor -%}}",
            "{%- if task is defined and task == 'query' -%}",
            _branches(query, image),
            "{%- else -%}",
            _branches(document, image),
            "{%- endif -%}",
        ]
    )


def _branches(side: _Side, image: str) -> str:
    say = [_literal(part) for part in (*side.text, *side.images, *side.both, side.empty)]
    return (
        f"{{%- if it.images and it.text -%}}{{{{- {say[4]} + {image} * it.images + {say[5]} + it.text + {say[6]} -}}}}"
        f"{{%- elif it.images -%}}{{{{- {say[2]} + {image} * it.images + {say[3]} -}}}}"
        f"{{%- elif it.text -%}}{{{{- {say[0]} + it.text + {say[1]} -}}}}"
        f"{{%- else -%}}{{{{- {say[7]} -}}}}{{%- endif -%}}"
    )


def _literal(value: object) -> str:
    # What JSON escapes in a string, Jinja reads so too.
    return json.dumps(value, ensure_ascii=False)


def _prove(text: str, template: Template, said: dict[bool, str], preparer: Preparer) -> None:
    """Raises Unsuitable unless the chat template makes the same of some messages as the template does."""
    image = preparer.image_text(bare=template.bare)
    pixels = np.zeros((1, 1, 3), np.uint8)
    for words in ("", "a cat", ' "quoted" {braces}\n\\ ', f"x{preparer.tokenizer.all_special_tokens[0]}y"):
        for images in range(3):
            parts = [{"type": "image"}] * images + ([{"type": "text", "text": words}] if words else [])
            for query, task in ((False, "document"), (True, "query")):
                render = template.query if query else template.document
                expected = render(said[query], Message(neutral(words, preparer.control), (pixels,) * images)).replace(MARKER, image)
                found = preparer.processor.apply_chat_template([{"role": "user", "content": parts}], chat_template=text, task=task, tokenize=False)
                if found != expected:
                    raise Unsuitable(f"its template cannot be said as a chat template: {found!r} would stand for {expected!r}")


def _write_cut(folder: Path, dim: int, width: int) -> None:
    """A linear layer that keeps the first `width` numbers, as a narrower vector is made here before it is normalised."""
    from safetensors.torch import save_file

    settings = {"in_features": dim, "out_features": width, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    _write(folder / "config.json", {**settings, "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"})
    save_file({"linear.weight": torch.eye(dim)[:width].contiguous()}, folder / "model.safetensors")


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _config(model: torch.nn.Module) -> Any:
    inner: Any = model
    return inner.get_base_model().config if hasattr(inner, "get_base_model") else inner.config
