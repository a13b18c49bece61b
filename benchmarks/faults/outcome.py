"""What a job left behind after a fault: counted in the table itself, whatever the job said."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import lance
import pyarrow as pa

TESSERA = "Tessera"


@dataclass(frozen=True)
class Outcome:
    """One route under one fault."""

    route: str
    rows_expected: int
    rows_found: int
    duplicates: int
    lost: int
    wrong: int
    """Rows that should not be there: of an old version, of a vanished item, of another encoder."""
    reported_error: str | None
    note: str = ""

    @property
    def survives(self) -> bool:
        """The right rows, and no error."""
        return not (self.duplicates or self.lost or self.wrong or self.reported_error)

    @property
    def outcome(self) -> str:
        """In one phrase."""
        counts = (self.lost, "missing" if self.reported_error else "lost"), (self.duplicates, "repeated"), (self.wrong, "wrong")
        faults = [f"{count:,} {what}" for count, what in counts if count]
        rows = f"{', '.join(faults)} of {self.rows_expected:,} rows" if faults else f"{self.rows_expected:,} rows, each once"
        said = f"stops: `{self.reported_error}`" if self.reported_error else "reports success" if faults else ""
        return "; ".join(part for part in (rows, said, self.note) if part)


def observe(route: str, table: Path, expected: pa.Table, *, error: str | None = None, note: str = "") -> Outcome:
    """Compare a Lance table with the rows that should be in it, in `expected`'s columns, the first being the id. No table: no rows."""
    want = _counted(expected)
    rows = lance.dataset(str(table)).to_table(columns=expected.column_names) if exists(table) else expected.slice(0, 0)
    have = _counted(rows)
    duplicates = sum(count - want[row] for row, count in have.items() if 0 < want[row] < count)
    wrong = sum(count for row, count in have.items() if row not in want)
    there = set(rows.column(0).to_pylist())
    lost = sum(1 for item in expected.column(0).to_pylist() if item not in there)
    return Outcome(route, expected.num_rows, rows.num_rows, duplicates, lost, wrong, error and one_line(error), note)


def exists(table: Path) -> bool:
    """Whether a commit has made this table."""
    return any(Path(table, "_versions").glob("*.manifest"))


def _counted(rows: pa.Table) -> Counter[str]:
    return Counter(repr(list(row.values())) for row in rows.to_pylist())


def one_line(error: str) -> str:
    """The line of an error that says what it was, short enough for a table."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no message"]
    named = [line for line in lines if re.match(r"(exit \d|failed|configuration error|no answer|[\w.]*(Error|Exception)(\([\w.]*\))?):? ", line)]
    text = " ".join((named or lines)[-1].replace("`", "'").replace("|", "/").split())
    text = re.sub(r", /\S+\.rs:[\d:]+", "", text)  # where in Lance's source it was raised
    return text if len(text) <= 100 else text[:97] + "..."
