"""What order and padding cost when texts are embedded: `python -m benchmarks.text_order [TEXTS]`. Prints one JSON line a round, then the medians.

The real MiniLM on runs of words from the documentation of installed packages, of log-normal length. `naive`: batches of 32 in the order
of arrival, padded to their longest, as a first script does it. `tessera`: the `sentence` encoder, which sorts by length and fills batches up to a
number of tokens. Both are float32, on as many torch threads; rounds alternate; the vectors are compared.
"""

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from demo.assets import fetch
from pipeline.encoders.sentence import Sentence

ROUNDS = 3


def corpus(count: int) -> list[str]:
    """Runs of words, seeded: median 17, some of several hundred, as captions and paragraphs mix."""
    words: list[str] = []
    for package in ("numpy", "torch", "transformers", "pyarrow", "ray"):
        text = importlib.metadata.metadata(package).get_payload()
        words += str(text).split()
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(2.85, 1.05, count)).clip(2, 400).astype(int)
    starts = rng.integers(0, len(words) - 400, count)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def naive_of(folder: Path) -> Callable[[list[str]], np.ndarray]:
    """Batches of 32 in the order of arrival, mean pooling, norm 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def encode(texts: list[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy())
        return np.concatenate(found)

    return encode


def main() -> None:
    """Alternates both over the same texts."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    folder, texts = fetch() / "encoder" / "sentence", corpus(count)
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=256)["input_ids"]]
    computed = sum(32 * max(lengths[start : start + 32]) for start in range(0, count, 32))
    encoders = {"naive": naive_of(folder), "tessera": Sentence(str(folder), max_tokens=256).encode_texts}
    vectors = {name: encode(texts[:32]) for name, encode in encoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ROUNDS):
        for name, encode in encoders.items():
            started = time.perf_counter()
            vectors[name] = encode(texts)
            seconds[name].append(round(time.perf_counter() - started, 2))
        print(json.dumps({name: found[-1] for name, found in seconds.items()}), flush=True)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    difference = float(np.abs(vectors["naive"] - vectors["tessera"]).max())
    facts = {"texts": count, "tokens_mean": round(statistics.mean(lengths)), "tokens_median": statistics.median(lengths)}
    facts |= {"naive_real_share_of_tokens": round(sum(lengths) / computed, 2), "largest_difference": difference}
    print(json.dumps({**facts, "seconds": median, "naive/tessera": round(median["naive"] / median["tessera"], 2)}))


if __name__ == "__main__":
    main()
