"""The table of docs/guarantees.md, made of the outcomes in results.jsonl and the names of the tests."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.outcome import TESSERA, Outcome

Fault = Callable[[Path], Iterator[Outcome]]
"""A fault: its docstring is its title; it does itself to every route, in a folder of its own."""

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
BEGIN, END = "<!-- made by python -m benchmarks.faults: begin -->", "<!-- made by python -m benchmarks.faults: end -->"


PACKAGES = ("ray", "pylance", "lance-ray", "lancedb", "pyarrow")
"""Whose versions are kept with each outcome."""


def line(fault: Fault, outcome: Outcome) -> str:
    """One outcome as a line of JSON."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return json.dumps({"fault": fault.__name__, "outcome": outcome.outcome, **asdict(outcome), "versions": versions})


def write(proofs: dict[Fault, list[str]]) -> None:
    """Put the table in its place on the page. `proofs`: of each fault, the tests that hold Tessera to it, `file::name`."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + "\n\n" + section(proofs) + "\n\n" + text[text.index(END) :])


def outcomes() -> list[dict[str, Any]]:
    """What was kept of the last run of each fault."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def section(proofs: dict[Fault, list[str]]) -> str:
    """What this program writes on the page: the versions that were run, and the table."""
    versions = {", ".join(f"{name} {version}" for name, version in outcome["versions"].items()) for outcome in outcomes()}
    return f"Run with {'; and '.join(sorted(versions))}.\n\n{table(proofs)}"


def table(proofs: dict[Fault, list[str]]) -> str:
    """Markdown: a row a fault; damage that nobody is told of is bold."""
    rows = ["| fault | the obvious route | Tessera | held by |", "|---|---|---|---|"]
    for fault, tests in proofs.items():
        mine = [outcome for outcome in outcomes() if outcome["fault"] == fault.__name__]
        theirs = "<br>".join(f"{outcome['route']}: {_said(outcome)}" for outcome in mine if outcome["route"] != TESSERA)
        ours = "<br>".join(_said(outcome) for outcome in mine if outcome["route"] == TESSERA) + _because(fault)
        rows.append(f"| `{fault.__name__}`<br>{_title(fault)} | {theirs} | {ours} | {'<br>'.join(_link(test) for test in tests)} |")
    return "\n".join(rows)


def _said(outcome: dict[str, Any]) -> str:
    silent = (outcome["lost"] or outcome["duplicates"] or outcome["wrong"]) and not outcome["reported_error"]
    return f"**{outcome['outcome']}**" if silent else outcome["outcome"]


def _title(fault: Fault) -> str:
    return (fault.__doc__ or "").splitlines()[0]


def _because(fault: Fault) -> str:
    """Why it comes out so, where the fault's docstring says it."""
    why = (fault.__doc__ or "").partition("Tessera: ")[2].strip()
    return f": {why}" if why else ""


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[`{name}`](../{path})"
