"""The report of an embedding run: counts that add up, where the time went, and whether it is good enough."""

from dataclasses import dataclass, field

from pipeline.config import ConfigError, JobFailed
from pipeline.media import Limits

CONFIG_ERROR = f"{ConfigError.__module__}.{ConfigError.__qualname__}: "
"""How the traceback of a worker that has met one begins its last line."""


@dataclass
class EmbedReport:
    """What a run did. listed = unchanged + written + replaced + rejected + failed."""

    job: str = "embed"
    status: str = "done"
    run: str = ""
    table: str = ""
    fingerprint: str = ""
    listed: int = 0
    unchanged: int = 0
    written: int = 0
    replaced: int = 0
    rejected: int = 0
    failed: int = 0
    vanished: int | None = None
    """Rows whose item is no longer listed; null if part of the source failed, or the run ended before they were looked for."""
    unread: int = 0
    """Containers that could not be read whole: their rows stay, and the next run tries them again."""
    deleted: int = 0
    overtaken: int = 0
    """Of `unchanged`: another job committed them while this one computed them."""
    adopted: int = 0
    """Items whose vectors an earlier run had staged."""
    rejects: dict[str, int] = field(default_factory=dict)
    """This run's new rejects, by reason."""
    errors: list[str] = field(default_factory=list)
    """Why chunks failed."""
    rows_in_table: int | None = 0
    """Null if the table could not be read at the end."""
    table_version: int | None = 0
    commits: int = 0
    seconds: float = 0.0
    seconds_to_first_chunk: float | None = None
    """From the start of the workers to their first receipt: what start-up costs."""
    items_per_s: float | None = None
    """Items that went through the workers, per second after the first chunk."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that worker threads spent in each stage, added up."""
    ceiling: str | None = None
    """The stage that took the most thread time, and how busy the threads were."""


def problem_of(report: EmbedReport, limits: Limits) -> str | None:
    """Why a finished run is not good enough; None if it is."""
    if report.failed:
        return f"{report.failed} items failed: {report.errors[0] if report.errors else 'the run stopped early'}"
    if report.rejected > limits.max_rejects * report.listed:
        return too_many_rejects(report.rejected, report.listed, limits)
    return None


def cause_of(error: Exception) -> str:
    """Why a run ended, in one line. Ray's errors carry the worker's traceback, with its cause in the last line."""
    if isinstance(error, ConfigError | JobFailed):
        return str(error)
    lines = str(error).strip().splitlines()
    return lines[-1].strip().removeprefix(CONFIG_ERROR) if len(lines) > 1 else f"{type(error).__name__}: {error}"


def explains_itself(error: Exception) -> bool:
    """Whether its message, or a worker's, says what to do: a traceback would only hide it."""
    return isinstance(error, ConfigError | JobFailed) or str(error).strip().rpartition("\n")[2].startswith(CONFIG_ERROR)


def too_many_rejects(rejected: int, listed: int, limits: Limits) -> str:
    """What to do when the gate closes."""
    return (
        f"{rejected} of {listed} items are rejected ({rejected / max(1, listed):.2%}), more than limits.max_rejects={limits.max_rejects:g}; "
        "the reasons are in the table's rejects; what was embedded is committed. Mend the items, or raise limits.max_rejects; what is "
        "rejected as missing or unreadable is tried again by the next run, the rest where an item's version changes or with sync.retry_rejects=true"
    )
