"""Does one encoder follow two instructions about the same picture? `python -m benchmarks.instructions [STEPS]`. Prints one JSON line.

Real photographs in drawn frames: the synthetic label is the frame's colour. "What does it show?" must find the caption,
"What colour is the frame?" the colour, among all captions and colours together. A small LLaVA with random weights is
trained by GradCache on two thirds of the pairs of photograph and colour, and asked about the others, cut elsewhere.
The ablation is trained and asked without an instruction: one picture is then one vector, so at most half can be right.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from demo.assets import fetch
from pipeline.media import Limits, decode
from pipeline.training import Notes
from pipeline.training.chunks import Rows
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE
from pipeline.vlm.backbone import Backbone, load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.message import Message
from pipeline.vlm.preparer import Prepared, Preparer
from pipeline.vlm.reading import read
from pipeline.vlm.settings import Reading, Sizes
from pipeline.vlm.templates import template_of

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "purple": (150, 40, 190),
    "white": (255, 255, 255),
}
INSTRUCTIONS = ("What does it show?", "What colour is the frame?")
PHOTOS, SIDE, FRAME = 6, 40, 8
BATCH = 32


def make_model(folder: Path) -> None:
    """LLaVA, two layers of 64, with a vision tower of two layers on patches of 8 px; the tokenizer is MiniLM's."""
    tokenizer = AutoTokenizer.from_pretrained(fetch() / "encoder" / "sentence", additional_special_tokens=["<image>"])
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8, "projection_dim": 64, **layers},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 4, "pad_token_id": 0, **layers},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // 8) ** 2,
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)


class Task:
    """Framed photographs as rows for the model; a target is a number: captions first, then colours."""

    def __init__(self, preparer: Preparer, *, instructed: bool) -> None:
        folder = fetch() / "photos"
        with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))[:PHOTOS]
        self._photos = [decode((folder / row["filepath"]).read_bytes(), Limits()) for row in rows]
        self._preparer, self._template, self._instructed = preparer, template_of("plain"), instructed
        texts = [row["title"] for row in rows] + [f"a {colour} frame" for colour in COLOURS]
        self.targets = [preparer.read(Message(text), self._template) for text in texts]

    def query(self, photo: int, colour: int, instruction: int, rng: np.random.Generator) -> tuple[Prepared, int]:
        """A cut of a photograph in a frame under an instruction, and the target that is right."""
        image = self._photos[photo]
        side = int(min(image.shape[:2]) * rng.uniform(0.85, 1.0))
        top, left = rng.integers(0, image.shape[0] - side + 1), rng.integers(0, image.shape[1] - side + 1)
        inner = Image.fromarray(image[top : top + side, left : left + side]).resize((SIDE - 2 * FRAME, SIDE - 2 * FRAME))
        framed = np.empty((SIDE, SIDE, 3), np.uint8)
        framed[:] = list(COLOURS.values())[colour]
        framed[FRAME:-FRAME, FRAME:-FRAME] = np.asarray(inner)
        said = INSTRUCTIONS[instruction] if self._instructed else ""
        row = self._preparer.read(Message("", (framed,)), self._template, instruction=said, query=True)
        return row, photo if instruction == 0 else PHOTOS + colour


def held_out(photo: int, colour: int) -> bool:
    """A third of the pairs, each photograph and each colour as often."""
    return (photo + colour) % 3 == 0


def train(backbone: Backbone, task: Task, steps: int) -> None:
    """InfoNCE over the batch, equal targets not counted against each other; AdamW, all weights."""
    rng = np.random.default_rng(0)
    backbone.model.train().requires_grad_(True)
    loss = InfoNCE(0.05)
    reading = Reading(layer=backbone.num_layers)
    step = GradCache(embed=lambda rows: read(backbone, list(rows), reading), loss=loss, modules=[backbone.model], chunk=Rows(2 * BATCH))
    optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=1e-3)
    pairs = [(photo, colour) for photo in range(PHOTOS) for colour in range(len(COLOURS)) if not held_out(photo, colour)]
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (number + 1) / 20, (steps - number) / (0.3 * steps))
        chosen = [(*pairs[index], int(rng.integers(2))) for index in rng.integers(0, len(pairs), BATCH)]
        queries, targets = zip(*(task.query(*one, rng) for one in chosen), strict=True)
        keys = torch.tensor(targets)
        optimizer.zero_grad()
        step.step(queries, [task.targets[target] for target in targets], notes=Notes(positive_keys=keys, step=number))
        torch.nn.utils.clip_grad_norm_(backbone.model.parameters(), 1.0)
        optimizer.step()
    backbone.model.eval()


def ask(backbone: Backbone, task: Task) -> dict[str, float]:
    """Share of held-out pictures whose nearest target is the right one: under each instruction, and under both."""
    rng = np.random.default_rng(1)
    reading = Reading(layer=backbone.num_layers)
    pairs = [(photo, colour) for photo in range(PHOTOS) for colour in range(len(COLOURS)) if held_out(photo, colour)]
    right = []
    with torch.inference_mode():
        targets = read(backbone, task.targets, reading)
        for instruction in range(2):
            queries, wanted = zip(*(task.query(*pair, instruction, rng) for pair in pairs), strict=True)
            nearest = (read(backbone, list(queries), reading) @ targets.T).argmax(1)
            right.append((nearest == torch.tensor(wanted)).numpy())
    return {"shows": float(right[0].mean()), "frame": float(right[1].mean()), "both": float((right[0] & right[1]).mean())}


def measure(steps: int, *, instructed: bool) -> dict[str, float]:
    """Train from the same start, and ask."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        base = base_of(folder)
        preparer = Preparer(base, Sizes())
        backbone = load_backbone(base, preparer, dtype="float32", device="cpu")
        task = Task(preparer, instructed=instructed)
        train(backbone, task, steps)
        return {name: round(share, 2) for name, share in ask(backbone, task).items()}


def main() -> None:
    """With instructions, and without."""
    transformers.logging.set_verbosity_error()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print(json.dumps({"steps": steps, "instructed": measure(steps, instructed=True), "without": measure(steps, instructed=False)}))


if __name__ == "__main__":
    main()
