"""What can be found wrong with a table: every code, what it means, what to do, and what a repair does about it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pipeline.config import Model

MAX_EXAMPLES = 5

AGAIN = "run `tessera verify` with --repair"
REEMBED = f"{AGAIN}, then the embed job"


class Kind(NamedTuple):
    """One kind of finding. `wrong`: the table does not hold what it should; `note`: worth knowing."""

    severity: Literal["wrong", "note"]
    what: str
    do: str
    repair: str | None = None
    """What a repair does; None if nothing can be done without inventing data."""


_DELETES = "deletes these rows; the next embed run makes them again"

KINDS = {
    # rows
    "duplicate_ids": Kind(
        "wrong",
        "ids that stand in more than one row",
        AGAIN,
        "keeps the row with a sound vector that the newest run wrote, and removes the others",
    ),
    "not_finite": Kind("wrong", "rows whose vector holds NaN or infinity", REEMBED, _DELETES),
    "zero_vectors": Kind("wrong", "rows whose vector is zero", REEMBED, _DELETES),
    "unnormalised": Kind("wrong", "rows whose vector has not norm 1", REEMBED, _DELETES),
    "null_values": Kind(
        "wrong",
        "nulls in columns that must not hold any; examples are column: count",
        "delete these rows with lance.dataset(TABLE).delete('COLUMN IS NULL'), then run the embed job",
    ),
    "missing_columns": Kind("wrong", "columns that every table of vectors has, and this one lacks", "fill another table with the embed job"),
    "lost_rows": Kind(
        "wrong",
        "rows that runs left in the table and that are not in it, though no run or repair is known to have deleted them; examples are chunks",
        "run the embed job: it makes them again, or says that their items are gone. Was the table restored, or rows deleted by other means?",
    ),
    "empty_table": Kind("note", "the table has no rows", "run the embed job"),
    # encoder and runs
    "vector_type": Kind("wrong", "the column `vector` is not what the table's metadata says", "fill another table with the embed job"),
    "unknown_model": Kind(
        "wrong",
        "the table `models` does not know the encoder of this table, so search cannot build it",
        "run the embed job when the source has a new item: it writes the model down",
    ),
    "model_dim": Kind("wrong", "the table `models` gives the encoder another vector length", "fill another table with the embed job"),
    "mixed_fingerprints": Kind(
        "wrong",
        "rows that a run of another encoder wrote: their vectors do not compare with the others; examples are runs",
        "delete them with lance.dataset(TABLE).delete(\"_run = 'RUN'\"), then run the embed job",
    ),
    "unknown_runs": Kind(
        "wrong",
        "rows of runs that the ledger does not know: nothing says which encoder made them; examples are runs",
        "find out who wrote them; delete them with lance.dataset(TABLE).delete(\"_run = 'RUN'\"), then run the embed job",
    ),
    "unfinished_runs": Kind("note", "runs that started, never ended, and no later run was done", "if none is running now, run the embed job"),
    "failed_runs": Kind(
        "note", "runs that failed, and no later run of the same source was done", "see their report in the ledger; run the embed job"
    ),
    # what lies beside the table
    "staged_receipts": Kind("note", "rows that were staged and not committed", "the next embed run takes them over"),
    "dead_receipts": Kind(
        "note",
        "receipts of staged rows that no run will take over: the rows are in the table, the files are gone, or the encoder is another",
        f"nothing, or {AGAIN}",
        "deletes those older than an hour; a younger one may be a running job's",
    ),
    "leftovers": Kind(
        "note",
        "journals, receipts that cannot be read and scratch tables: a running job's, or left by one that was killed",
        f"nothing, or {AGAIN}; a run sweeps them after a week, too",
        "writes down when they were first met, and deletes those that were met more than orphans_older_than_days ago",
    ),
    "contradicted_notes": Kind(
        "wrong",
        "containers whose rows are not those that the last complete run left, though no later run changed them",
        REEMBED,
        "deletes the notes, so that the next embed run reads these containers again",
    ),
    "outdated_notes": Kind(
        "note",
        "notes on containers whose rows a later run changed: the next embed run reads these containers again",
        f"nothing, or {AGAIN}",
        "deletes the notes",
    ),
    "stale_rejects": Kind("note", "rejects of items that stand in the table in the same version", AGAIN, "deletes these rejects"),
    "duplicate_rejects": Kind("note", "ids that stand in more than one reject", AGAIN, "keeps the newest reject of each id"),
    # files
    "missing_files": Kind(
        "wrong",
        "files that the table's newest version refers to and that are gone",
        "restore them from a backup, or an older version of the table; else fill another table",
    ),
    "unreadable_files": Kind("wrong", "data files that cannot be read", "restore them from a backup, or an older version of the table"),
    "orphaned_files": Kind(
        "note",
        "data, deletion and index files that no version of the table refers to, older than orphans_older_than_days",
        AGAIN,
        "deletes these files",
    ),
    "unreferenced_files": Kind(
        "note",
        "younger files that no version refers to: a running job's, or one's that was killed",
        "nothing; they count as orphaned when they are older than orphans_older_than_days",
    ),
    "unknown_files": Kind(
        "note",
        "the table has rows, and none of the data files in its folder seems to belong to them: a shallow clone, or a folder by two names",
        "open the table by the name that Lance gives it, see lance.dataset(TABLE).tracked_files(); until then no file is judged or deleted",
    ),
    "small_fragments": Kind("note", "fragments with few rows: every scan opens each of them", "compact the table"),
    "unindexed_rows": Kind(
        "note", "rows that an index does not hold yet; examples are index: rows", "run the index job", "extends these indices; builds and drops none"
    ),
    # against the source
    "missing_items": Kind("wrong", "items that the source lists and the table lacks", "run the embed job"),
    "changed_items": Kind("wrong", "items that the table holds in another version than the source", "run the embed job"),
    "vanished_items": Kind("note", "rows whose item the source lists no more", "run the embed job with sync.vanished=delete to delete them"),
    "unread_containers": Kind("note", "containers that only reading can compare with the table's rows", "run the embed job"),
    "other_vectors": Kind(
        "wrong",
        "sampled items whose vector, made again, is another than the table's; examples are id: cosine",
        "fill another table with the embed job, and compare the two",
    ),
    "not_made_again": Kind("note", "sampled items that could not be read or embedded this time", "look at these items in the source"),
}


class Finding(Model):
    """Something that is wrong with a table, or worth knowing."""

    code: str
    severity: Literal["wrong", "note"]
    count: int
    what: str
    examples: list[str]
    do: str
    repair: str | None
    """What a repair does about it; null if it does nothing."""

    def __str__(self) -> str:
        examples = f" [{', '.join(self.examples)}]" if self.examples else ""
        return f"{self.severity}: {self.code} ({self.count}): {self.what}{examples}. To do: {self.do}"


def found(code: str, count: int, examples: Sequence[Any] = ()) -> list[Finding]:
    """The finding of a code, or nothing if `count` is zero."""
    if count == 0:
        return []
    kind = KINDS[code]
    shown = [str(example) for example in examples[:MAX_EXAMPLES]]
    return [Finding(code=code, severity=kind.severity, count=count, what=kind.what, examples=shown, do=kind.do, repair=kind.repair)]


def wrong_first(findings: list[Finding]) -> list[Finding]:
    """The findings in the order in which a person should read them."""
    return sorted(findings, key=lambda finding: finding.severity == "note")
