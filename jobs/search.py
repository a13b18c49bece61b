"""Search a table by text, by image, by a row's id or by a vector, with the encoder that made it.

    tessera search jobs/search.yaml table.uri=vectors query.text="a red fox" query.k=5 sheet=hits.html

On a terminal it prints a table, else one line of JSON.
"""

import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pydantic

from pipeline import command, sheet
from pipeline.config import Model, Ref
from pipeline.place import check_place, write_file
from pipeline.search import SIMILARITY, Query, Searcher, row
from pipeline.table.at import TableAt

if TYPE_CHECKING:
    from rich.table import Table


class SearchJob(Model):
    """Which table, and what is looked for in it."""

    table: TableAt
    query: Query | None = None
    queries: list[Query] = []
    """Several queries at once; `query` comes first."""
    encoder: Ref | None = None
    """The query encoder; null for the one that made the table. Another one is refused."""
    sheet: str | None = None
    """A file for a contact sheet of the hits, .html or .png: a path or a URI."""
    storage_options: dict[str, Any] = {}
    """fsspec's options for what is not in the table: the images of queries, the pictures of hits, the sheet."""

    @pydantic.model_validator(mode="after")
    def _complete(self) -> "SearchJob":
        if not self.asked:
            raise ValueError("nothing is looked for: give query.text, query.image, query.id or query.vector, or a list `queries`")
        if self.sheet is not None and not self.sheet.endswith((".html", ".png")):
            raise ValueError(f"sheet={self.sheet!r} must end in .html or .png")
        return self

    @property
    def asked(self) -> list[Query]:
        """All queries in their order."""
        return [*([self.query] if self.query else []), *self.queries]


class SearchReport(Model):
    """The hits of all queries, in the queries' order, nearest first."""

    job: str = "search"
    table: str
    queries: list[dict[str, Any]]
    hits: list[dict[str, Any]]
    """A hit's columns, but for bytes; `_query` is the number of its query, from 0."""
    sheet: str | None
    seconds: float


def run(job: SearchJob) -> SearchReport:
    """Search, and write the contact sheet if one is wanted. Changes nothing in the table."""
    started = time.perf_counter()
    if job.sheet is not None:
        check_place(job.sheet, job.storage_options)
    found = Searcher(job.table, encoder=job.encoder, storage_options=job.storage_options).search(job.asked)
    if job.sheet is not None:
        _write_sheet(job, job.sheet, found)
    hits = [{"_query": number, **_plain(hit)} for number, table in enumerate(found) for hit in table.to_pylist()]
    queries = [query.model_dump(mode="json", exclude_defaults=True) for query in job.asked]
    seconds = round(time.perf_counter() - started, 3)
    return SearchReport(table=job.table.path(), queries=queries, hits=hits, sheet=job.sheet, seconds=seconds)


def _plain(hit: dict[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in hit.items() if not isinstance(value, bytes)}
    return {**shown, SIMILARITY: round(hit[SIMILARITY], 6)}


def _write_sheet(job: SearchJob, path: str, found: list[pa.Table]) -> None:
    dataset = job.table.require()
    rows = [row(dataset, query.id, columns=["uri", "thumbnail"]) if query.id else None for query in job.asked]
    sections = [
        sheet.section(query, hits, row=known, storage_options=job.storage_options) for query, hits, known in zip(job.asked, found, rows, strict=True)
    ]
    if path.endswith(".html"):
        data = sheet.html(sections, title=job.table.name, subtitle=job.table.path()).encode()
    else:
        data = sheet.png(sections, title=job.table.name)
    write_file(path, data, job.storage_options)


def show(report: SearchReport) -> None:
    """The hits as a table for a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for number, query in enumerate(report.queries):
        hits = [hit for hit in report.hits if hit["_query"] == number]
        console.print(Text(", ".join(f"{key}: {value}" for key, value in query.items()), style="bold"))
        console.print(_grid(hits) if hits else "nothing was found")
        console.print()
    console.print(f"{report.seconds:.2f} s{f', contact sheet in {report.sheet}' if report.sheet else ''}", style="dim", highlight=False)


def _grid(hits: list[dict[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    first = ["id", SIMILARITY, "text"]
    names = [name for name in dict.fromkeys([*first, *hits[0]]) if name in hits[0] and name not in ("_query", "source", "vector")]
    # The uri often says no more than the id, and is long: it comes last, where the terminal cuts it.
    names.sort(key=lambda name: name == "uri")
    grid = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        kept = {"id": min(32, max(len(hit["id"]) for hit in hits)), SIMILARITY: len(SIMILARITY)}.get(name)
        grid.add_column(name, no_wrap=True, min_width=kept, max_width=60, justify="right" if name == SIMILARITY else "left")
    for hit in hits:
        shown = {name: "" if hit[name] is None else str(hit[name]) for name in names} | {SIMILARITY: f"{hit[SIMILARITY]:.3f}"}
        grid.add_row(*(Text(shown[name], overflow="ellipsis", no_wrap=True) for name in names))
    return grid


def main() -> None:
    """The command."""
    command.main(SearchJob, run, show=show)


if __name__ == "__main__":
    main()
