"""report.html of a run: curves, similarities, what was trained on, what was left out, and whether it ever stopped. From its journal alone."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.page import page, safe
from pipeline.training.charts import Curve, curves, histogram
from pipeline.training.watch import collapse

PAGE = "report.html"

Line = Mapping[str, Any]


@dataclass(frozen=True)
class DataFacts:
    """One data set of a run."""

    name: str
    rows: int
    rejects: dict[str, int]
    """Rows that are not trained on, by reason."""
    share: float | None
    """Of the batches; None for held-out data."""
    overlap: dict[str, int] = field(default_factory=dict)
    """Of held-out data, queries and documents that are trained on too."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first step. It pickles."""

    name: str
    steps: int
    batch_size: int
    data: tuple[DataFacts, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def write_page(folder: Path, facts: Facts, lines: Sequence[Line], *, status: str) -> None:
    """The page, whole or as it was. `lines`: the journal's; `status`: a word or a sentence."""
    part = folder / f".{PAGE}.part"
    part.write_text(html_of(facts, lines, status=status))
    part.replace(folder / PAGE)


def html_of(facts: Facts, lines: Sequence[Line], *, status: str) -> str:
    """The page's text."""
    steps = [line for line in lines if "loss" in line]
    held = [line for line in lines if "held_out" in line]
    events = [line for line in lines if "event" in line]
    done = steps[-1]["step"] + 1 if steps else 0
    told = f"training run, {status}, step {done:,} of {facts.steps:,}, written {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}"
    body = [_tiles(facts, steps, held), _warnings(steps), _charts(facts, steps, held, events), _held_out(held), _data(facts)]
    return page(facts.name, told, "\n".join([*body, _events(events), _settings(facts)]), style=STYLE)


def _tiles(facts: Facts, steps: Sequence[Line], held: Sequence[Line]) -> str:
    tiles = []
    if steps:
        tiles.append(("loss", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"))
    if held:
        means = {name: value for name, value in held[0]["held_out"].items() if "/" not in name}
        name = next(iter(means))
        best = max(line["held_out"][name] for line in held)
        tiles.append((f"held-out {name}, before → best", f"{means[name]:.3f} → {best:.3f}"))
    if steps:
        tiles.append(("effective rank", f"{steps[0]['effective_rank']:.1f} → {steps[-1]['effective_rank']:.1f}"))
        seconds = sorted(line["seconds"] for line in steps)[len(steps) // 2]
        tiles.append(("rows a second, median step", f"{facts.batch_size / max(seconds, 1e-9):,.1f}"))
        waited = sum(line["waited"] for line in steps) / max(1e-9, sum(line["seconds"] for line in steps))
        tiles.append(("time spent waiting for rows", f"{waited:.0%}"))
        lost = steps[-1]["rejects"]
        if lost:
            tiles.append(("rows drawn and left out", f"{lost:,}"))
    return '<ul class="tiles">' + "".join(f"<li><span>{safe(name)}</span><b>{safe(value)}</b></li>" for name, value in tiles) + "</ul>"


def _warnings(steps: Sequence[Line]) -> str:
    found = collapse(steps[0], steps[-1]).values() if steps else ()
    return "".join(f'<p class="warning">{safe(warning)}</p>' for warning in found)


def _charts(facts: Facts, steps: Sequence[Line], held: Sequence[Line], events: Sequence[Line]) -> str:
    if not steps and not held:
        return '<p class="soft">No step is done yet.</p>'
    marks = [line["step"] for line in events if line["event"] == "resumed"]

    def over(title: str, names: Mapping[str, str], *, smooth: bool = False) -> str:
        drawn = [Curve(told, [(line["step"], line[name]) for line in steps], smooth) for name, told in names.items()]
        return curves(title, drawn, steps=facts.steps, marks=marks)

    found = list(dict.fromkeys(name for line in held for name in line["held_out"] if "/" not in name))
    measured = [Curve(name, [(line["step"], line["held_out"][name]) for line in held]) for name in found]
    drawn = [
        over("Loss", {"loss": "loss"}, smooth=True),
        curves("Held-out retrieval", measured, steps=facts.steps, marks=marks, dots=True),
        over("Mean similarity", {"cosine_positive": "own document", "cosine_negative": "others' documents", "cosine_documents": "two documents"}),
        over("Effective rank of documents", {"effective_rank": "dimensions"}),
        over("Learning rate", {"learning_rate": "rate"}),
        over("Gradient norm, before clipping", {"gradient_norm": "norm"}, smooth=True),
    ]
    for when, line in ((f"step {steps[0]['step']}", steps[0]), (f"step {steps[-1]['step']}", steps[-1])) if steps else ():
        sides = [("own document", line["similarities"]["positive"]), ("others' documents", line["similarities"]["negative"])]
        drawn.append(histogram(f"Similarities at {when}", sides, low=-1, high=1))
    note = '<p class="soft">Broken lines: where the run went on after a stop.</p>' if marks else ""
    return f'<section class="charts">{"".join(drawn)}</section>{note}'


def _held_out(held: Sequence[Line]) -> str:
    if not held:
        return ""
    names = list(held[0]["held_out"])
    by = names[0] if "/" not in names[0] else next(name for name in names if "/" not in name)
    best = max(held, key=lambda line: (line["held_out"][by], -line["step"]))
    heads = ["metric", f"before ({_at(held[0])})", f"best by {by} ({_at(best)})", f"last ({_at(held[-1])})"]
    rows = [[name, *(f"{line['held_out'][name]:.4f}" for line in (held[0], best, held[-1]))] for name in names]
    return _table("Held-out data", heads, rows)


def _at(line: Line) -> str:
    return f"{line['step']:,} steps"


def _data(facts: Facts) -> str:
    rows = []
    for data in facts.data:
        rejects = ", ".join(f"{count:,} {reason}" for reason, count in data.rejects.items()) or "none"
        also = f", {' and '.join(f'{count:,} {what}' for what, count in data.overlap.items())} trained on too" if data.overlap else ""
        rows.append([data.name, f"{data.rows:,}", f"held out{also}" if data.share is None else f"{data.share:.1%}", rejects])
    return _table("Data", ["data set", "rows", "share of batches", "rows left out"], rows)


def _events(events: Sequence[Line]) -> str:
    rows = []
    for line in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line["time"]))
        rows.append([when, f"{line['step']:,}", _told(line)])
    return _table("Starts, stops and notices", ["UTC", "step", "what"], rows) if rows else ""


def _told(line: Line) -> str:
    if line["event"] == "notice":
        return "a machine of the run was to be taken away: a checkpoint was made"
    if line["event"] == "early_stop":
        return "ended early: no better evaluation for as many as watching.patience allows"
    workers = f"{line['workers']} worker{'' if line['workers'] == 1 else 's'}"
    if line["event"] == "begun":
        return f"began with {workers}"
    again = f"; {line['again']:,} logged steps were done again" if line["again"] else ""
    return f"went on from the last checkpoint with {workers}{again}"


def _settings(facts: Facts) -> str:
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in flat(facts.settings).items()]
    return f"<details><summary>Settings</summary>{_table('', ['key', 'value'], rows)}</details>" if rows else ""


def flat(value: Any, before: str = "") -> dict[str, Any]:
    """Nested keys as one: {"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict) or not value:
        return {before: value}
    return {name: each for key, inner in value.items() for name, each in flat(inner, f"{before}.{key}" if before else key).items()}


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{safe(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{safe(value)}</td>' for value in row)}</tr>" for row in rows)
    named = f"<h2>{safe(title)}</h2>" if title else ""
    return f'<section class="table">{named}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>'


STYLE = """
:root { --c0: #2f6f5e; --c1: #b5562b; --c2: #3d6aa8; --warn: #9a3b12; --warned: #fbeee6 }
@media (prefers-color-scheme: dark) { :root { --c0: #6fc3a9; --c1: #e59a6f; --c2: #8fb4e8; --warn: #f0b48f; --warned: #33241b } }
h2 { margin: 0 0 .6rem; font-size: 1rem; font-weight: 600 }
h3 { margin: 0; font-size: .9rem; font-weight: 600 }
section, details { margin-top: 2.2rem }
.soft, .legend { color: var(--soft); font-size: .85rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; list-style: none; margin: 0; padding: 0 }
.tiles li, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem }
.tiles span { display: block; color: var(--soft); font-size: .8rem }
.tiles b { font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums }
.warning { margin: 1.2rem 0 0; padding: .6rem 1rem; border-radius: 8px; background: var(--warned); color: var(--warn); font-weight: 500 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; justify-content: space-between }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; align-items: baseline; margin-bottom: .3rem }
.legend { margin: 0 }
.legend span { margin-left: .9rem; white-space: nowrap }
.legend i { display: inline-block; width: .7rem; height: .2rem; margin-right: .35rem; vertical-align: middle; background: var(--c0) }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums }
.legend .c1 i { background: var(--c1) } .legend .c2 i { background: var(--c2) }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums }
svg .row { stroke: var(--line); stroke-width: 1 }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4 }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
svg .pale { opacity: .3; stroke-width: 1 }
svg polygon { stroke-width: 1.2; fill-opacity: .25 }
.c0 { stroke: var(--c0) } .c1 { stroke: var(--c1) } .c2 { stroke: var(--c2) }
polygon.c0, circle.c0 { fill: var(--c0) } polygon.c1, circle.c1 { fill: var(--c1) } polygon.c2, circle.c2 { fill: var(--c2) }
circle { stroke: none !important }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; min-width: 30rem }
th { text-align: left; color: var(--soft); font-weight: 500 }
th, td { padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
td { font-variant-numeric: tabular-nums }
summary { cursor: pointer; font-weight: 600 }
details section { margin-top: .6rem }
"""
