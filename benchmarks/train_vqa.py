"""Does a vision-language model of real parts learn to look? `python -m benchmarks.train_vqa [FOLDER] [STEPS]`. Prints one JSON line.

The "what" questions of easy-VQA, 11 answers: picture and question must find their answer. The model is `demo.vqa_assets`' FastVLM; its
projector and the layers of its language model are trained by the train job on 2 workers, on 32 questions a step. Then the embed job fills a
table with the answers, by the saved encoder alone, and every question of the test split is searched in it.

Two figures stand beside it: the same run with the questions alone, and what knowing each question's most frequent answer gives. A run that is
done is not done again; its curves are in FOLDER/*/report.html.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from demo.vqa_assets import fetch_vqa
from jobs.embed import EmbedJob
from jobs.embed import run as embed
from jobs.train import TrainJob
from jobs.train import run as train
from pipeline.media import Limits, decode
from pipeline.search import Query, Searcher, query_encoder
from pipeline.table.at import TableAt
from pipeline.training.run import TrainReport
from pipeline.vlm.message import MARKER, Message

WATCHED = 400
"""Questions of the test split that the model is measured on while it is trained."""
BATCH = 64
"""Questions that are embedded at once for the table."""


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file in MMEB's form."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def job(folder: Path, assets: Path, name: str, steps: int) -> TrainJob:
    """The run `seeing`, or `blind` without pictures."""
    blind = "_blind" if name == "blind" else ""
    watched = folder / f"test{blind}.jsonl"
    if not watched.exists():
        lines = (assets / "vqa" / f"test{blind}.jsonl").read_text().splitlines()
        watched.write_text("".join(f"{line}\n" for line in random.Random(0).sample(lines, WATCHED)))
    parts = ["language_model.layers", "language_model.norm", "multi_modal_projector"]
    values: dict[str, Any] = {
        "run": {"name": name, "folder": str(folder), "prepared": str(folder / "prepared"), "base_licence": "apache-2.0"},
        "model": {"target": "pipeline.training.vlm:TrainVlm", "args": {"model": str(assets / "vlm"), "parts": parts}},
        "data": [_data("train", assets / "vqa" / f"train{blind}.jsonl", assets)],
        "held_out": [_data("test", watched, assets)],
        # Not sorted by length: questions of one length want answers of one kind, which would then be compared with those of that kind alone.
        "mixture": {"batch_size": 32, "bucket_batches": 1},
        "optimisation": {"steps": steps, "chunk": None, "learning_rate": 2e-4, "learning_rates": {"projector": 1e-3}, "decay": "constant"},
        "watching": {"log_every": 2, "evaluate_every": 10, "checkpoint_every": 1000, "k": 1},
        "workers": {"num": 2},
    }
    if blind:  # a pattern must be found, and what reads pictures gets no gradient
        values["optimisation"]["learning_rates"] = {}
        values["model"]["args"]["parts"] = parts[:2]
    return TrainJob.model_validate(values)


def _data(name: str, path: Path, assets: Path) -> dict[str, Any]:
    reader = {"target": "pipeline.pairs.mmeb:Mmeb", "args": {"uri": str(path), "image_dir": str(assets / "vqa")}}
    return {"name": name, "reader": reader, "tokens_per_image": 16}


def guessed(assets: Path) -> float:
    """Share of the test split that the most frequent answer to each question, by its words alone, gets right."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows_of(assets / "vqa" / "train_blind.jsonl"):
        counts[row["qry"]][row["pos_text"]] += 1
    test = rows_of(assets / "vqa" / "test_blind.jsonl")
    return float(np.mean([counts[row["qry"]].most_common(1)[0][0] == row["pos_text"] for row in test]))


def found_in_table(folder: Path, assets: Path, report: TrainReport) -> float:
    """Share of the whole test split whose answer comes first in a table of answers, filled by the embed job."""
    table = {"uri": str(folder / "vectors"), "name": "answers"}
    encoder = {"target": "pipeline.encoders.saved:open_encoder", "args": {"folder": report.encoder}}
    source = {"target": "pipeline.readers.text:TextFiles", "args": {"uri": str(assets / "vqa" / "answers")}}
    embed(EmbedJob.model_validate({"source": source, "encoder": encoder, "table": table, "compute": {"cpus": 2}}))
    at = TableAt(**table)
    asked: Any = query_encoder(at, report.fingerprint)
    test = rows_of(assets / "vqa" / "test.jsonl")
    searcher, right = Searcher(at), 0
    for start in range(0, len(test), BATCH):
        rows = test[start : start + BATCH]
        messages = [Message(row["qry"].replace("<|image_1|> ", MARKER), (_pixels(assets, row),)) for row in rows]
        queries = [Query(vector=vector.tolist(), k=1, columns=["text"]) for vector in asked.encode_messages(messages)]
        right += sum(hits["text"][0].as_py() == row["pos_text"] for row, hits in zip(rows, searcher.search(queries), strict=True))
    return right / len(test)


def _pixels(assets: Path, row: dict[str, str]) -> np.ndarray:
    return decode((assets / "vqa" / row["qry_image_path"]).read_bytes(), Limits())


def measure(folder: Path, steps: int) -> dict[str, object]:
    """Train both, and search."""
    folder.mkdir(parents=True, exist_ok=True)
    assets = fetch_vqa()
    seeing, blind = (train(job(folder, assets, name, steps)) for name in ("seeing", "blind"))
    return {
        "steps": seeing.steps,
        "before": seeing.before["recall@1"],
        "after": seeing.after["recall@1"],
        "seconds": seeing.seconds,
        "blind": blind.after["recall@1"],
        "guessed": round(guessed(assets), 3),
        "test_split_by_table": round(found_in_table(folder, assets, seeing), 3),
        "report": f"{seeing.run}/report.html",
    }


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/output/vqa").absolute()
    print(json.dumps(measure(where, int(sys.argv[2]) if len(sys.argv) > 2 else 50)))
