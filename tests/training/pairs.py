"""A small training task: words and the same words in capitals, some beside a plain picture; and what a run needs around it."""

import json
import os
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.config import Ref
from pipeline.training import NO_NOTES
from pipeline.training.infonce import InfoNCE

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "cow",
    "one",
    "two",
    "six",
    "sun",
    "moon",
    "sky",
    "tea",
    "rice",
    "egg",
    "oak",
    "elm",
    "fig",
    "car",
    "bus",
]


def write_pairs(folder, *, num=40, held_out=12):
    """train.jsonl and held.jsonl, MMEB's form: a text and for every fourth row a picture, to a text."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count, start in (("train", num, 0), ("held", held_out, num)):
        rows = []
        for i in range(start, start + count):
            words = f"{WORDS[i % 20]} {WORDS[(i * 7 + i // 20) % 20]}"
            row = {"qry": words, "qry_image_path": "", "pos_text": words.upper(), "pos_image_path": ""}
            if i % 4 == 0:
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
                row |= {"qry": f"<|image_1|> {words}", "qry_image_path": f"{i}.png"}
            rows.append(row)
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def job_values(folder, base, *, name="run", steps=6, **sections):
    """The values of a TrainJob: float32, no dropout, a batch of 8 rows in chunks of 3."""
    dataset = {"reader": {"target": "pipeline.pairs.mmeb:Mmeb"}}
    values = {
        "run": {"name": name, "folder": str(folder / "runs"), "prepared": str(folder / "prepared")},
        "model": {"target": "pipeline.training.vlm:TrainVlm", "args": {"model": str(base), "reading": {"pooling": "mean"}}},
        "data": [{"name": "words", **_reader(dataset, folder / "train.jsonl")}],
        "held_out": [{"name": "held", **_reader(dataset, folder / "held.jsonl")}],
        "mixture": {"batch_size": 8},
        "optimisation": {"steps": steps, "chunk": 3, "learning_rate": 1e-3},
        "watching": {"log_every": 1, "log_rows": True, "checkpoint_every": 2, "evaluate_every": 3, "k": 3, "notice_every": 1},
    }
    for section, more in sections.items():
        values[section] = {**values.get(section, {}), **more}
    return values


def _reader(dataset, path):
    return {"reader": {**dataset["reader"], "args": {"uri": str(path)}}}


def journal(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """By step."""
    found = [line for line in journal(folder) if "loss" in line]
    assert len({line["step"] for line in found}) == len(found), "a step stands twice"
    return {line["step"]: line["loss"] for line in found}


def rows(folder):
    """By step, the rows of its batch."""
    return {line["step"]: line["rows"] for line in journal(folder) if "rows" in line}


class Stopped(Exception):
    """A run that was told to end in its midst."""


class Folder:
    """A link that keeps checkpoints in a folder, raises Stopped after `stop_after` steps' checkpoint, and notices at `notice_at`."""

    def __init__(self, folder, *, stop_after=None, notice_at=()):
        self.folder, self.stop_after, self.notice_at, self.kept, self.asked = Path(folder), stop_after, notice_at, [], 0
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def restored(self):
        found = sorted(self.folder.glob("step-*"))
        yield found[-1] if found else None

    def keep(self, folder, metrics):
        if folder is not None:
            place = self.folder / f"step-{metrics['step']:04}"
            place.mkdir(exist_ok=True)
            for path in folder.iterdir():
                (place / path.name).write_bytes(path.read_bytes())
            shutil.rmtree(folder)
        self.kept.append(metrics["step"])
        if metrics["step"] == self.stop_after:
            raise Stopped

    def reading(self, reader):
        return nullcontext(reader.read)

    def noticed(self):
        self.asked += 1
        return self.asked in self.notice_at


class Deadly(InfoNCE):
    """InfoNCE that ends its process with kill -9 at a step, once: a file remembers it."""

    def __init__(self, *, at, memory, **settings):
        super().__init__(**settings)
        self.at, self.memory = at, Path(memory)

    def forward(self, queries, positives, negatives=None, notes=NO_NOTES):
        if notes.step == self.at and torch.is_grad_enabled():
            try:
                os.close(os.open(self.memory, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(queries, positives, negatives, notes)


def deadly(at, memory):
    """The Ref of a Deadly loss."""
    return Ref(target="tests.training.pairs:Deadly", args={"at": at, "memory": str(memory)}).model_dump()


class Broken(InfoNCE):
    """InfoNCE that at a step is no number, or of which the gradient is none."""

    def __init__(self, *, at, where, **settings):
        super().__init__(**settings)
        self.at, self.where = at, where

    def forward(self, queries, positives, negatives=None, notes=NO_NOTES):
        loss = super().forward(queries, positives, negatives, notes)
        if notes.step != self.at:
            return loss
        # The gradient of the root is infinite at 0, and 0 times that is no number.
        return loss * torch.nan if self.where == "loss" else loss + (0.0 * queries.sum()).sqrt()


class Slow(InfoNCE):
    """InfoNCE that takes its time, so that a test can interrupt it."""

    def __init__(self, *, seconds, **settings):
        super().__init__(**settings)
        self.seconds = seconds

    def forward(self, queries, positives, negatives=None, notes=NO_NOTES):
        time.sleep(self.seconds)
        return super().forward(queries, positives, negatives, notes)


COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "sun": (250, 220, 40), "sky": (120, 190, 250), "tea": (150, 90, 40)}


def write_pictures(folder, *, num=24, held_out=12):
    """train.jsonl and held.jsonl: `text`, and `image`, a file of the text's two colours."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    for name, count, start in (("train", num, 0), ("held", held_out, num)):
        rows = []
        for i in range(start, start + count):
            one, two = names[i % 6], names[(i // 6 + i) % 6]
            pixels = np.zeros((16, 16, 3), np.uint8)
            pixels[:8], pixels[8:] = COLOURS[one], COLOURS[two]
            noisy = np.clip(pixels + rng.integers(-9, 9, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{i}.png")
            rows.append({"text": f"{one} on {two} {i}", "image": f"{i}.png"})
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def picture_values(folder, model, *, name, steps, **sections):
    """The values of a TrainJob on these: both ways, and held out both ways."""

    def dataset(name, file, **more):
        args = {"uri": str(folder / file), "images": ["image"]}
        return {"name": name, "reader": {"target": "pipeline.pairs.sentence_transformers:SentenceTransformers", "args": args}, **more}

    values = {
        "run": {"name": name, "folder": str(folder / "runs"), "prepared": str(folder / "prepared")},
        "model": model,
        "loss": {"target": "pipeline.training.infonce:InfoNCE", "args": {"directions": ["query-document", "document-query"]}},
        "data": [dataset("train", "train.jsonl")],
        "held_out": [dataset("words", "held.jsonl"), dataset("pictures", "held.jsonl", swap=True)],
        "mixture": {"batch_size": 8},
        "optimisation": {"steps": steps, "chunk": 5, "learning_rate": 1e-3},
        "watching": {"log_every": 1, "log_rows": True, "checkpoint_every": 2, "evaluate_every": 3, "k": 3, "notice_every": 1},
    }
    for section, more in sections.items():
        values[section] = {**values.get(section, {}), **more}
    return values
