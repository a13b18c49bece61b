"""Surveys of many slides as Ray tasks, one slide each. A slide that kills or hangs its worker costs that slide only.

A task ends its own process when it is overdue, by a timer in C that native code cannot hold up; it starts anew as long as bytes of
the slide arrive from a store. A slide whose process ended is
tried again when no other is being looked at: then its neighbours cannot have been the reason, such as memory that ran out. One that
could not be read is tried again after all others: what a disk or a store could not do for a moment is not held against it.
"""

import faulthandler
import functools
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.slides.inventory import Listed
from pipeline.slides.ledger import slide_rows
from pipeline.slides.survey import Look, failed, survey, with_tiles
from pipeline.stores import CredentialsRefused

log = logging.getLogger(__name__)

Job = tuple[Listed, Mapping[str, Any] | None, bool]
"""A slide, its row so far, and whether it has to be opened: without, only its tiles are counted anew."""

MAY_PASS = ("error", "unreadable")
"""Reasons that a disk or a store in trouble may be behind."""


def survey_all(jobs: Sequence[Job], look: Look, *, timeout_s: float) -> Iterator[dict[str, Any]]:
    """The SLIDE row of each slide, in any order. Ray must be running. Raises CredentialsRefused."""
    told = ray.put(look)
    task: Any = ray.remote(num_cpus=1, max_retries=0)(_survey)
    suspects: list[Job] = []
    again: set[str] = set()
    pending: dict[ray.ObjectRef[Any], Job] = {}
    waiting = list(reversed(jobs))
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    while waiting or pending:
        while waiting and len(pending) < at_once:
            job = waiting.pop()
            pending[task.remote(job, told, timeout_s)] = job
        [done], _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(done)
        row = _result(done, job, look)
        if row is None:
            suspects.append(job)
        elif row["reason"] in MAY_PASS and job[0].uri not in again:
            log.warning("%s: %s; it is tried once more, after the others", job[0].uri, row["detail"])
            again.add(job[0].uri)
            waiting.insert(0, job)
        else:
            yield row
    for job in suspects:
        log.warning("%s: its worker died or hung; it is tried once more, alone", job[0].uri)
        row = _result(task.remote(job, told, timeout_s), job, look)
        detail = (
            f"the worker process died, or took longer than limits.slide_timeout_s={timeout_s:g}, twice, the second time with no other slide about"
        )
        yield row or failed(job[0], look, before=job[1], reason="worker_died", detail=detail)


def _result(done: "ray.ObjectRef[Any]", job: Job, look: Look) -> dict[str, Any] | None:
    """The row; None if the process died."""
    try:
        row: dict[str, Any] = ray.get(done)
    except RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
        if isinstance(cause, CredentialsRefused):  # no slide's fault, and the others would say the same
            raise cause from error
        return failed(job[0], look, before=job[1], reason="error", detail=f"{type(cause).__name__}: {cause}")
    except RayError:
        return None
    return row


def _survey(job: Job, look: Look, timeout_s: float) -> dict[str, Any]:
    listed, before, opens = job
    alive = functools.partial(faulthandler.dump_traceback_later, timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)
    alive()
    try:
        started = time.monotonic()
        row = survey(listed, look, before=before, alive=alive) if opens or before is None else with_tiles(_kept(listed, look), look, listed)
        log.info("surveyed %s: %s, %.1f s", listed.uri, row["status"], time.monotonic() - started)
        return row
    finally:
        faulthandler.cancel_dump_traceback_later()


def _kept(listed: Listed, look: Look) -> dict[str, Any]:
    """The row as it is, with its mask, under the slide's name of today."""
    [row] = slide_rows(look.at, source=look.source, units=[listed.uri])
    return row | {"slide_id": listed.slide_id, "run": look.run}
