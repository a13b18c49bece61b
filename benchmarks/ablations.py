"""What do pooling, hard negatives, Matryoshka and its second dimension change? `python -m benchmarks.ablations [STEPS]`. Writes docs/ablations.md.

One small task, the same for all, 3 seeds each: names of emoji must find their tags ("red envelope": "gift, good luck, hóngbāo, money"); a tag that
stands in the name is left out. A fifth of the concepts is held out. The model is the first 4 layers of SmolLM2 (`demo.vqa_assets`), trained by the
loop of the train job; the last weights are measured, so nothing is chosen by the held-out rows. A seed draws the order of the rows; the split, the
start and the mined negatives stay. Two trainings go on at once, each on one core.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from demo.assets import fetch
from demo.emoji_assets import concept
from demo.emoji_assets import fetch as fetch_emoji
from demo.vqa_assets import fetch_vqa
from pipeline.config import Ref
from pipeline.encoders.sentence import Sentence
from pipeline.metrics import ranking, recall_at
from pipeline.pairs.prepare import Dataset
from pipeline.training.batches import Choice
from pipeline.training.loop import Recipe, train
from pipeline.training.plan import Mixture
from pipeline.training.run import RunAt, task_of
from pipeline.training.settings import Feeding, Optimisation, Watching, Workers
from pipeline.vlm.backbone import load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.message import Message
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.reading import read_layers
from pipeline.vlm.settings import Reading, Sizes
from pipeline.vlm.templates import template_of
from schemas.items import encoder_schema

SEEDS = (0, 1, 2)
LAYERS, FULL = 4, 576
WIDTHS = (36, 72, 144, 288)
K = 10
NEGATIVES, SAFE = 2, 0.95
"""Mined for each row; as alike as that share of the positive's cosine at most (arXiv 2407.15831, TopK-PercPos)."""
BATCH = 24
SIZES = Sizes(max_tokens=10)
DOC = Path(__file__).parent.parent / "docs" / "ablations.md"

INFONCE = {"target": "pipeline.training.infonce:InfoNCE", "args": {"temperature": 0.05}}
MATRYOSHKA = {"target": "pipeline.training.matryoshka:Matryoshka", "args": {"loss": INFONCE, "widths": list(WIDTHS)}}
GRID = {"target": "pipeline.training.matryoshka:grid", "args": {"loss": INFONCE, "layers": [1, 2, 3], "widths": list(WIDTHS)}}
RUNS: dict[str, dict[str, Any]] = {
    "last": {"pooling": "last"},
    "mean": {"pooling": "mean"},
    "negatives": {"pooling": "last", "negatives": "allowed"},
    "widths": {"pooling": "last", "loss": MATRYOSHKA},
    "grid": {"pooling": "last", "loss": GRID},
}
"""What is trained; without a word of it InfoNCE over the batch, hard negatives left out."""

Recalls = dict[tuple[int, int], float]
"""R@K by layer and width."""


class Nowhere:
    """A link that keeps no checkpoint."""

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Nothing."""
        yield None

    def keep(self, folder: Path | None, metrics: dict[str, Any]) -> None:
        """Take it away."""
        if folder is not None:
            shutil.rmtree(folder)

    def noticed(self) -> bool:
        """Never."""
        return False


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names and tags, to train on and held out, split by concept."""
    rows = [json.loads(line) for line in (fetch_emoji() / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    concepts = sorted({row["concept"] for row in rows})
    held = set(np.random.default_rng(0).permutation(concepts)[: len(concepts) // 5].tolist())
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for row in rows:
        name, _, tags = row["text"].rpartition(": ")
        said = set(name.lower().replace(":", " ").split())
        kept = [tag for tag in tags.split(", ") if not said & set(tag.lower().split())]
        if name and kept:
            sides[row["concept"] in held].append((name, ", ".join(kept)))
    return sides


def mined(rows: list[tuple[str, str]]) -> list[list[str]]:
    """For each row the tags that MiniLM finds nearest to its name, and that are no nearer than SAFE of its own."""
    encoder = Sentence(str(fetch() / "encoder" / "sentence"))
    queries, documents = (_minilm(encoder, [row[side] for row in rows]) for side in (0, 1))
    found = []
    for row, query in enumerate(queries):
        scores = documents @ query
        fitting = [other for other in np.argsort(-scores) if scores[other] < SAFE * scores[row] and concept(rows[other][0]) != concept(rows[row][0])]
        found.append([rows[other][1] for other in fitting[:NEGATIVES]])
    return found


def _minilm(encoder: Sentence, texts: list[str]) -> np.ndarray:
    items = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    return encoder.encode(pa.Table.from_pylist(items, schema=encoder_schema()))


def run(folder: Path, settings: Mapping[str, Any], seed: int, steps: int) -> Path:
    """One training; the folder of its encoder."""
    name = f"run-{seed}"
    reader = Ref(target="pipeline.pairs.flag:Flag", args={"uri": str(folder / "train.jsonl")})
    args = {
        "model": str(fetch_vqa() / "vlm"),
        "parts": [r"language_model\.layers\.[0-3]\.", r"language_model\.norm"],
        "reading": {"pooling": settings["pooling"], "layer": LAYERS},
        "sizes": SIZES.model_dump(),
    }
    recipe = Recipe(
        Ref(target="pipeline.training.vlm:TrainVlm", args=args),
        Ref(**settings.get("loss", INFONCE)),
        Mixture(batch_size=BATCH, seed=seed),
        Choice(seed=seed),
        Optimisation(steps=steps, chunk=None, learning_rate=5e-4),
        Watching(),
    )
    at = RunAt(name=name, folder=str(folder / "runs"), prepared=str(folder / "prepared"))
    dataset = Dataset(name="emoji", reader=reader, negatives=settings.get("negatives", "dropped"))
    task = task_of(recipe, at, data=[dataset], held_out=[], workers=Workers(), settings={}, feeding=Feeding())
    at.place.mkdir(parents=True)
    train(task, Nowhere(), torch.device("cpu"))
    return at.place / "encoder"


def recalls(model: Path, held: list[tuple[str, str]], pooling: Any) -> Recalls:
    """R@K of the held-out rows at every layer and width, read from one pass."""
    base = base_of(str(model))
    preparer, template, layers = Preparer(base, SIZES), template_of("plain"), tuple(range(1, LAYERS + 1))
    backbone = load_backbone(base, preparer, dtype="float32", device="cpu")
    # Documents in an order that says nothing of the queries': the first of equal ones wins.
    order = np.random.default_rng(1).permutation(len(held))
    texts = [name for name, _ in held] + [held[row][1] for row in order]
    found: list[list[np.ndarray]] = [[] for _ in layers]
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            rows = [preparer.read(Message(text), template) for text in texts[start : start + 64]]
            for place, vectors in enumerate(read_layers(backbone, rows, Reading(pooling=pooling, layer=LAYERS), layers)):
                found[place].append(vectors.numpy())
    place_of = np.argsort(order)
    # The same tags are a right answer wherever they stand.
    same: dict[str, list[int]] = {}
    for row, (_, tags) in enumerate(held):
        same.setdefault(tags, []).append(int(place_of[row]))
    relevant = [dict.fromkeys(same[tags], 1.0) for _, tags in held]
    result = {}
    for layer, parts in zip(layers, found, strict=True):
        whole = np.concatenate(parts)
        for width in (*WIDTHS, FULL):
            cut = whole[:, :width] / np.linalg.norm(whole[:, :width], axis=1, keepdims=True)
            result[layer, width] = recall_at(ranking(cut[: len(held)], cut[len(held) :], K), relevant, K)
    return result


def trained(rows: Path, held: list[tuple[str, str]], name: str, seed: int, steps: int) -> tuple[Recalls, float]:
    """What one run gives, and its CPU seconds."""
    torch.set_num_threads(1)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.jsonl").symlink_to(rows)
        encoder = run(Path(folder), RUNS[name], seed, steps)
        found = recalls(encoder, held, RUNS[name]["pooling"])
    print(name, seed, {f"{layer}/{width}": round(value, 4) for (layer, width), value in found.items()}, file=sys.stderr, flush=True)
    return found, time.process_time() - begun


def measure(steps: int) -> tuple[dict[str, list[Recalls]], dict[str, Recalls], str]:
    """Recalls of every run by its seeds, those of the model before training by its pooling, and the task in words."""
    to_train, held = pairs()
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = [{"query": name, "pos": [tags], "neg": own} for (name, tags), own in zip(to_train, mined(to_train), strict=True)]
        path = Path(place) / "train.jsonl"
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
        jobs = {(name, seed): pool.submit(trained, path, held, name, seed, steps) for seed in SEEDS for name in RUNS}
        before = {pooling: recalls(fetch_vqa() / "vlm", held, pooling) for pooling in ("last", "mean")}
        done = {key: job.result() for key, job in jobs.items()}
    found = {name: [done[name, seed][0] for seed in SEEDS] for name in RUNS}
    minutes = sum(seconds for _, seconds in done.values()) / 60
    return found, before, f"{len(to_train)} rows to train on, {len(held)} held out, {steps} steps of {BATCH} rows, {minutes:.0f} CPU minutes"


def cell(values: list[float]) -> str:
    """Mean, and the least and the most."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def against(values: list[float], others: list[float]) -> str:
    """How much more than others, seed by seed."""
    differences = np.subtract(values, others)
    return f"{differences.mean():+.3f}, more in {int((differences > 0).sum())} of {len(values)}"


def verdict(what: str, values: list[float], others: list[float]) -> str:
    """A line in words: a gain or a loss only where all seeds agree."""
    differences = np.subtract(values, others)
    said = "gains" if (differences > 0).all() else "loses" if (differences < 0).all() else "makes no difference that the seeds agree on"
    return f"* {what} {said} ({against(values, others)})."


def table(found: dict[str, list[Recalls]], before: dict[str, Recalls], task: str, steps: int) -> str:
    """The document."""

    def at(name: str, layer: int = LAYERS, width: int = FULL) -> list[float]:
        return [recall[layer, width] for recall in found[name]]

    last = at("last")
    lines = [
        "# Ablations of training",
        "",
        f"`python -m benchmarks.ablations {steps}`: {task}.",
        "",
        f"Names of emoji must find their tags among those of all held-out emoji: R@{K}, the mean of {len(SEEDS)} seeds (the least to the most).",
        f"The model is the first {LAYERS} layers of SmolLM2-135M; see `benchmarks/ablations.py`. A small task and a short training: figures",
        "that show what each part does, not which recipe is best.",
        "",
        "## Pooling and hard negatives",
        "",
        f"| trained with | R@{K} | against the first row, seed by seed | before training |",
        "|---|---|---|---|",
        f"| last token | {cell(last)} | | {before['last'][LAYERS, FULL]:.3f} |",
        f"| mean of tokens | {cell(at('mean'))} | {against(at('mean'), last)} | {before['mean'][LAYERS, FULL]:.3f} |",
        f"| last token, {NEGATIVES} hard negatives a row | {cell(at('negatives'))} | {against(at('negatives'), last)} | |",
        "",
        "## Widths",
        "",
        f"The vector of the last layer, cut to its first numbers. R@{K}:",
        "",
        "| trained at | " + " | ".join(map(str, (*WIDTHS, FULL))) + " |",
        "|---|" + "---|" * (len(WIDTHS) + 1),
    ]
    trained = {"last": "the full width alone", "widths": "every width (Matryoshka)", "grid": "every layer and width (2D)"}
    lines += [f"| {said} | " + " | ".join(cell(at(name, width=width)) for width in (*WIDTHS, FULL)) + " |" for name, said in trained.items()]
    lines += ["", "## Layers", "", f"The full width of an earlier layer, the deeper ones not computed. R@{K}:", ""]
    lines += ["| trained at | " + " | ".join(f"layer {layer}" for layer in range(1, LAYERS + 1)) + " |", "|---|" + "---|" * LAYERS]
    for name, said in {"last": "the last layer alone", "grid": "every layer and width (2D)"}.items():
        lines.append(f"| {said} | " + " | ".join(cell(at(name, layer=layer)) for layer in range(1, LAYERS + 1)) + " |")
    lines += [
        "",
        "## In words",
        "",
        "The spread of three seeds is no test: a line says that something gains, or loses, only where it does in all of them.",
        "",
        verdict("Mean pooling, against the last token,", at("mean"), last),
        verdict(f"Training with {NEGATIVES} mined negatives a row", at("negatives"), last),
        *(
            verdict(f"Matryoshka at width {width}, against cutting what was not trained so,", at("widths", width=width), at("last", width=width))
            for width in (*WIDTHS, FULL)
        ),
        *(
            verdict(f"2D at layer {layer}, against reading what was not trained so,", at("grid", layer=layer), at("last", layer=layer))
            for layer in range(1, LAYERS + 1)
        ),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, write the document, print it."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    text = table(*measure(steps), steps)
    DOC.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
