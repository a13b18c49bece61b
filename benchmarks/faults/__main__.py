"""Run the faults: `python -m benchmarks.faults` all of them, `python -m benchmarks.faults NAME ...` some.

Each fault runs in a process of its own, and prints a line of JSON for each route. The lines are kept in results.jsonl, and the table
of docs/guarantees.md is made of them. All take about half an hour on two busy cores.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.faults import disk, items, page, processes, races, reruns
from benchmarks.faults.page import RESULTS, Fault

LIMIT_S = 1800
"""Of a fault that hangs. On busy cores a start of Ray takes most of a minute, and `driver_killed` needs eight."""

EMBED, KILLED, COMMIT = "tests/jobs/test_embed.py", "tests/jobs/test_embed_killed.py", "tests/table/test_commit.py"
GUARANTEES = "tests/test_guarantees.py"

PROOFS: dict[Fault, list[str]] = {
    reruns.written_at_all: [f"{EMBED}::test_every_item_is_in_the_table_with_the_encoders_vector"],
    reruns.written_onto_a_table: [f"{COMMIT}::test_contents_tell_sources_apart"],
    reruns.run_again: [f"{EMBED}::test_rerun_changes_nothing_and_adds_no_version"],
    reruns.source_changed: [f"{EMBED}::test_new_changed_and_vanished_items_fall_out_of_one_subtraction"],
    reruns.another_encoder: [
        f"{EMBED}::test_another_encoder_is_refused_before_anything_is_written",
        "tests/test_search.py::test_a_foreign_encoder_is_refused",
    ],
    items.corrupt_photo: [f"{EMBED}::test_bad_items_are_rejects_with_a_reason_and_take_nobody_along"],
    items.killing_item: [
        f"{EMBED}::test_an_item_that_kills_its_worker_is_found_and_rejected",
        f"{EMBED}::test_a_hanging_item_cannot_outlive_its_time",
    ],
    processes.actors_killed: [
        f"{KILLED}::test_a_killed_encoder_actor_costs_nothing_but_time",
        f"{KILLED}::test_a_worker_killed_after_its_file_was_written_leaves_no_second_copy",
    ],
    processes.driver_killed: [
        f"{KILLED}::test_a_driver_killed_half_way_is_finished_by_the_rerun",
        "tests/jobs/test_chaos.py::test_drivers_and_workers_killed_ten_times_leave_what_one_run_would",
    ],
    processes.checkpoint_resumed: [f"{EMBED}::test_staged_work_of_a_dead_run_is_adopted"],
    processes.two_jobs_at_once: [f"{KILLED}::test_two_jobs_started_together_on_an_empty_table_lose_and_repeat_nothing"],
    reruns.write_failed_once: [f"{GUARANTEES}::test_a_write_that_fails_is_told_and_leaves_nothing_half_done"],
    disk.disk_full: [f"{GUARANTEES}::test_a_write_that_fails_is_told_and_leaves_nothing_half_done"],
    races.upserts: [f"{COMMIT}::test_many_threads_with_overlapping_work_leave_each_row_once"],
    races.read_check_append: [f"{COMMIT}::test_what_another_job_wrote_meanwhile_is_not_written_again"],
    races.committed_twice: [f"{COMMIT}::test_a_receipt_committed_twice_adds_nothing"],
    races.cleaned_up: [f"{GUARANTEES}::test_the_proof_of_a_commit_outlives_the_cleanup_of_old_versions"],
    races.commit_lock: [
        f"{COMMIT}::test_processes_that_commit_at_once_lose_and_repeat_nothing",
        f"{COMMIT}::test_an_engine_that_accepts_a_stale_commit_is_refused",
    ],
}
"""Every fault, and the tests that hold Tessera to it."""

HERE = "--here"


def main() -> None:
    """The command."""
    names = {fault.__name__: fault for fault in PROOFS}
    wanted = [argument for argument in sys.argv[1:] if argument != HERE] or list(names)
    if unknown := [name for name in wanted if name not in names]:
        sys.exit(f"no such fault: {', '.join(unknown)}; there are {', '.join(names)}")
    if HERE in sys.argv:
        run_here(names[wanted[0]])
        return
    broken = []
    for name in wanted:
        lines = run_apart(name)
        if lines is None:
            broken.append(name)
            continue
        print(lines, end="", flush=True)
        kept = [line for line in RESULTS.read_text().splitlines(keepends=True) if json.loads(line)["fault"] != name] if RESULTS.exists() else []
        RESULTS.write_text("".join(kept) + lines)
    page.write(PROOFS)
    if broken:
        sys.exit(f"did not run to their end, and keep their old outcomes: {', '.join(broken)}")


def run_here(fault: Fault) -> None:
    """One fault in this process, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for outcome in fault(Path(folder)):
            print(page.line(fault, outcome), flush=True)


def run_apart(name: str) -> str | None:
    """One fault in a process of its own; its lines, or None if it broke off. Ended with all it started after LIMIT_S seconds."""
    namespace = disk.NAMESPACE if name == disk.disk_full.__name__ else []
    command = [*namespace, sys.executable, "-m", "benchmarks.faults", name, HERE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        lines, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        lines, _ = process.communicate()
    if process.returncode:
        print(f"{name} did not run to its end (exit {process.returncode}, limit {LIMIT_S} s)", file=sys.stderr)
        return None
    return "".join(line for line in lines.splitlines(keepends=True) if line.startswith("{"))  # Ray's workers print here too


if __name__ == "__main__":
    main()
