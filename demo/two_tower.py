"""A two-tower model of open_clip out of an image classifier and a sentence encoder, which finds pictures by words before it is trained.

After ConSE (arXiv 1312.5650), with its softmax left out: the mean of class names' vectors weighted by the classifier's logits is one linear
layer on the classifier's features, so open_clip's own `CustomTextCLIP` holds it: EfficientNet-lite0 and a linear head, MiniLM and a linear head
that is the identity. Weaker than the softmax (`pipeline.encoders.conse`), and a start that training can change.
"""

import json
import shutil
from pathlib import Path

import torch

from pipeline.encoders.conse import NUM_CLASSES, class_names, in_order
from pipeline.encoders.sentence import Sentence

ARCHITECTURE = "tf_efficientnet_lite0"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def save_two_tower(folder: Path, encoder: Path, *, image_px: int, dropout: float) -> Path:
    """Write the model into `folder`, unless it is there. `encoder`: the folder that `demo.assets` fetches.

    `image_px`: side of the images it takes; the classifier's own have 224 pixels, smaller ones cost less. `dropout`: of image features, in training.
    """
    config = {
        "model_cfg": _config(folder, image_px, dropout),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    path = folder / "open_clip_config.json"
    if path.is_file() and json.loads(path.read_text()) == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "text").mkdir(parents=True)
    shutil.copyfile(encoder / "sentence" / "config.json", folder / "text" / "config.json")
    for name in TEXT_FILES:
        shutil.copyfile(encoder / "sentence" / name, folder / name)
    _write_weights(folder, encoder, config["model_cfg"])
    path.write_text(json.dumps(config, indent=2))
    return folder


def _config(folder: Path, image_px: int, dropout: float) -> dict[str, object]:
    vision = {"timm_model_name": ARCHITECTURE, "timm_pool": "avg", "timm_proj": "linear", "timm_drop": dropout, "image_size": image_px}
    text = {"hf_model_name": str((folder / "text").absolute()), "hf_tokenizer_name": str(folder.absolute()), "context_length": 64}
    return {"embed_dim": 384, "vision_cfg": vision, "text_cfg": {**text, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}}


def _write_weights(folder: Path, encoder: Path, config: dict[str, object]) -> None:
    import timm
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import load_file, save_file

    model = CustomTextCLIP(**{**config, "text_cfg": {**config["text_cfg"], "hf_model_pretrained": False}})  # type: ignore[dict-item]
    classifier = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=NUM_CLASSES)
    given = torch.load(encoder / "classifier.pth", map_location="cpu", weights_only=True)
    classifier.load_state_dict(in_order(given, classifier.state_dict(), str(encoder / "classifier.pth")))
    trunk = {name: values for name, values in classifier.state_dict().items() if not name.startswith("classifier.")}
    model.visual.trunk.load_state_dict(trunk)
    sentence = load_file(encoder / "sentence" / "model.safetensors")
    wanted = model.text.transformer.state_dict()
    model.text.transformer.load_state_dict({name: sentence.get(name, values) for name, values in wanted.items()})
    names_CD = torch.from_numpy(Sentence(str(encoder / "sentence")).encode_texts(class_names()))
    classes_CF = classifier.get_classifier().weight.detach()
    with torch.no_grad():
        # Around their mean: what all classes share says nothing about an image.
        model.visual.head.proj.weight.copy_(names_CD.T @ (classes_CF - classes_CF.mean(dim=0)))
        model.text.proj.weight.copy_(torch.eye(len(model.text.proj.weight)))
    save_file({name: values.contiguous().clone() for name, values in model.state_dict().items()}, folder / "open_clip_model.safetensors")
