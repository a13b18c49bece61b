"""The journal of a run, metrics.jsonl: one JSON object a line, each step once however often the run was interrupted."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.training.gather import gather_rows, gather_sizes


class Journal:
    """Lines of {"step": number of the step, "loss": ...}, of {"step": steps done, "held_out": {metric: value}}, and {"step": ..., "event": ...}."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, step: int) -> None:
        """Go on at a step: lines of what will be done again are taken out. What happened stays."""

        def stays(line: dict[str, Any]) -> bool:
            # An evaluation after so many steps belongs to them.
            return line["step"] < step or (line["step"] == step and "held_out" in line and step > 0) or "event" in line

        kept = [line for line in self.lines() if stays(line)]
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        part.replace(self._path)

    def add(self, line: dict[str, Any]) -> None:
        """One more line."""
        with self._path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")

    def lines(self) -> list[dict[str, Any]]:
        """All of them; a last one that a crash cut short is left out."""
        if not self._path.is_file():
            return []
        whole = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in whole]


def all_keys(keys: list[int], device: torch.device) -> list[str]:
    """The keys of all ranks' rows, 16 hexadecimal digits each (a JSON number does not hold 64 bits), in the order of the batch."""
    sizes = gather_sizes(len(keys), device)
    gathered = gather_rows(torch.tensor(keys, dtype=torch.int64, device=device)).tolist()
    found = [""] * len(gathered)
    start = 0
    for rank, size in enumerate(sizes):
        # Rank r has rows r, r + ranks, ... (`Draw.part`).
        found[rank :: len(sizes)] = [f"{key % 2**64:016x}" for key in gathered[start : start + size]]
        start += size
    return found
