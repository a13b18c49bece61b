"""What all contenders are given: 2,000 JPEGs cut from real photographs, and a model with random weights in a folder."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.assets import fetch

TINY = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 192, "head_width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
"""A vision tower of 0.15 GFLOP an image: cheap on purpose, so that everything around it shows."""

B32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
"""ViT-B-32's vision tower (8.8 GFLOP an image); its text tower is not used here and made small."""

MODELS = {"tiny": TINY, "b32": B32}
SIZES = [(500, 375), (640, 480), (800, 600), (375, 500), (480, 640)]


def make_images(folder: Path, count: int) -> None:
    """`count` JPEGs of 500 x 375 to 800 x 600 px, seeded: crops and flips of the demonstration's photographs with noise; a tenth progressive."""
    photos = [Image.open(path).convert("RGB") for path in sorted((fetch() / "photos").glob("*.*")) if path.suffix in (".jpg", ".jpeg", ".png")]
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        size = SIZES[number % len(SIZES)]
        photo = photos[rng.integers(len(photos))]
        share = rng.uniform(0.5, 1.0)
        width, height = int(photo.width * share), int(photo.height * share)
        left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
        crop = photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        noisy = np.asarray(crop, np.int16) + rng.integers(-6, 7, (size[1], size[0], 3), np.int16)
        sink = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=88, progressive=number % 10 == 0)
        (folder / f"{number:05}.jpg").write_bytes(sink.getvalue())


def make_model(folder: Path, kind: str) -> None:
    """A folder that open_clip's `local-dir:` takes."""
    import open_clip

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODELS[kind], "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
