"""Small vision-language models with random weights and their real processors, saved as folders: every supported family."""

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WIDTH = 32
LAYERS = 3
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "llava", "llava_next", "llava_onevision", "fast_vlm", "paligemma"]

SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics": ["<pad>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>"]
    + [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)],
    "llava": ["<pad>", "<s>", "</s>", "<image>", "<video>"],
    "fast": ["<pad>", "<s>", "</s>", "<image>"],
    "paligemma": ["<pad>", "<eos>", "<bos>", "<image>"],
}
GRID = [[16, 32], [32, 16], [32, 32]]
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
SIGLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}


def tokenizer_of(special):
    """Bytes, no merges, and special tokens: as a byte-level BPE reads text, only longer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"pad_token": special[0], "eos_token": special[2] if len(special) > 2 else special[0]}
    if "<bos>" in special:
        named["bos_token"] = "<bos>"
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special, padding_side="left", **named)


def save_model(folder, family, *, seed=0):
    """A model of `family` in `folder`, LAYERS layers of WIDTH, as its own classes save it."""
    torch.manual_seed(seed)
    model, processor = _MAKERS[family]()
    with torch.no_grad():  # some parts begin at zero or near it, and would hide what they do
        for values in model.parameters():
            values.add_(torch.randn_like(values) * 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed, height=24, width=24):
    """Noise, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _qwen(name):
    tokenizer = tokenizer_of(SPECIAL["qwen"])
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), range(3, 7), strict=True))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "rope_scaling": rope}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2}
    size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    images = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size)
    if name == "qwen2_vl":
        config = hf.Qwen2VLConfig(text_config=text, vision_config={**vision, "embed_dim": 16, "hidden_size": WIDTH}, **ids)
        return hf.Qwen2VLForConditionalGeneration(config), hf.Qwen2VLProcessor(images, tokenizer, hf.Qwen2VLVideoProcessor())
    if name == "qwen2_5_vl":
        own = {"hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, **own}, **ids)
        return hf.Qwen2_5_VLForConditionalGeneration(config), hf.Qwen2_5_VLProcessor(images, tokenizer, hf.Qwen2VLVideoProcessor())
    own = {"hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(text_config={**text, "head_dim": 8}, vision_config={**vision, **own}, **ids)
    return hf.Qwen3VLForConditionalGeneration(config), hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor())


def _idefics(name):
    tokenizer = tokenizer_of(SPECIAL["idefics"])
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0}
    own = {"image_token_id": 4, "scale_factor": 2, "pad_token_id": 0}
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    if name == "idefics3":
        model = hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(text_config=text, vision_config=SIGLIP, **own))
        return model, hf.Idefics3Processor(hf.Idefics3ImageProcessor(**sizes), tokenizer, image_seq_len=4)
    model = hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(text_config=text, vision_config=SIGLIP, **own))
    videos = hf.SmolVLMVideoProcessor(**sizes, num_frames=1, fps=1)
    return model, hf.SmolVLMProcessor(hf.SmolVLMImageProcessor(**sizes), tokenizer, videos, image_seq_len=4)


def _llava(name):
    tokenizer = tokenizer_of(SPECIAL["llava"])
    clip = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16}
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0}
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    own = {"image_token_id": 3, "image_token_index": 3, "image_seq_length": 16}
    reading = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if name == "llava":
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=clip, text_config=text, **own))
        return model, hf.LlavaProcessor(hf.CLIPImageProcessor(**square), tokenizer, **reading)
    if name == "llava_next":
        config = hf.LlavaNextConfig(vision_config=clip, text_config=text, image_grid_pinpoints=GRID, **own)
        images = hf.LlavaNextImageProcessor(image_grid_pinpoints=GRID, **square)
        return hf.LlavaNextForConditionalGeneration(config), hf.LlavaNextProcessor(images, tokenizer, **reading)
    siglip = {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**text, "model_type": "qwen2"}
    own = {"image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "video_token_index": 4, "vision_feature_select_strategy": "full"}
    config = hf.LlavaOnevisionConfig(vision_config=siglip, text_config=text, image_grid_pinpoints=GRID, vision_feature_layer=-1, **own)
    images = hf.LlavaOnevisionImageProcessor(image_grid_pinpoints=GRID, size={"height": 16, "width": 16})
    videos = hf.LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16})
    full = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return hf.LlavaOnevisionForConditionalGeneration(config), hf.LlavaOnevisionProcessor(images, tokenizer, videos, **full)


def _fast_vlm():
    tokenizer = tokenizer_of(SPECIAL["fast"])
    # A net of convolutions with batch norms, as FastVLM's own is; a token is 32 x 32 pixels of the image at 64 x 64.
    vision = {"model_type": "timm_wrapper", "architecture": "test_efficientnet", "hidden_size": 256, "do_pooling": False}
    text = {**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer), "pad_token_id": 0}
    config = hf.FastVlmConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=4)
    square = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    reading = {"patch_size": 32, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    model = hf.FastVlmForConditionalGeneration(config)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):  # with 1 the random net would make nearly the same of every picture
            torch.nn.init.constant_(part.weight, 4.0)
    return model, hf.LlavaProcessor(hf.CLIPImageProcessor(**square), tokenizer, **reading)


def _paligemma():
    tokenizer = tokenizer_of(SPECIAL["paligemma"])
    text = {**TEXT, "model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8, "pad_token_id": 0}
    siglip = {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": WIDTH}
    config = hf.PaliGemmaConfig(vision_config=siglip, text_config=text, image_token_id=3, projection_dim=WIDTH, hidden_size=WIDTH)
    images = hf.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    return hf.PaliGemmaForConditionalGeneration(config), hf.PaliGemmaProcessor(images, tokenizer)


_MAKERS = {
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "idefics3": lambda: _idefics("idefics3"),
    "smolvlm": lambda: _idefics("smolvlm"),
    "llava": lambda: _llava("llava"),
    "llava_next": lambda: _llava("llava_next"),
    "llava_onevision": lambda: _llava("llava_onevision"),
    "fast_vlm": _fast_vlm,
    "paligemma": _paligemma,
}
