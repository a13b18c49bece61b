"""Small models with random weights, made on the spot: the architectures of open_clip and sentence-transformers in kilobytes."""

import json
import string

import pyarrow as pa
import torch

from pipeline.media import to_pixels
from schemas.items import encoder_schema

WORDS = ["a", "the", "cat", "dog", "runs", "sleeps", "on", "under", "red", "blue", "house", "query", "passage", "document", "search", "for", ":", "."]


def items_of(texts, images=None):
    """Items of texts and decoded images, either may be None."""
    images = images or [None] * len(texts)
    columns = [pa.array([f"item-{n}" for n in range(len(texts))]), pa.array(texts, pa.string()), to_pixels(images)]
    return pa.table(columns, schema=encoder_schema())


def save_tokenizer(folder, *, padding_side="right", lower_case=True):
    """A WordPiece tokenizer of a few words and all letters, in the files of transformers."""
    from transformers import BertTokenizerFast

    letters = [*string.ascii_letters, *(f"##{letter}" for letter in string.ascii_letters)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=lower_case, padding_side=padding_side, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_bert(folder, *, seed=0, **tokenizer):
    """A BERT of two layers, 32 wide, with its tokenizer."""
    from transformers import BertConfig, BertModel

    size = save_tokenizer(folder, **tokenizer)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_llama(folder):
    """A Llama of two layers, 32 wide, whose tokenizer pads on the left."""
    from transformers import LlamaConfig, LlamaModel

    size = save_tokenizer(folder, padding_side="left")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    LlamaModel(LlamaConfig(vocab_size=size, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, **sizes)).save_pretrained(folder)
    return folder


def save_sentence_transformer(folder, base, modes, *, dense=(), include_prompt=True, normalise=False, prompts=None, **transformer):
    """A folder written by sentence-transformers itself around the model in `base`; returned with its own model of it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(1)
    body = modules.Transformer(str(base), **transformer)
    parts = [body, modules.Pooling(32, modes, include_prompt=include_prompt)]
    for width in dense:
        parts.append(modules.Dense(parts[-1].get_embedding_dimension(), width))
    if normalise:
        parts.append(modules.Normalize())
    SentenceTransformer(modules=parts, prompts=prompts, device="cpu").save(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def siglip_config(tokenizer):
    return {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "none"},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 200,
            "hf_tokenizer_name": tokenizer,
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def save_open_clip(folder, config, preprocess=None, *, seed=0):
    """A folder that open_clip's `local-dir:` takes: configuration, random weights; the tokenizer is put there by others."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    torch.save({name: weight.clone() for name, weight in model.state_dict().items()}, folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"
