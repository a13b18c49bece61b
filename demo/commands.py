"""Commands as a user would type them, run and shown by the demonstrations."""

import json
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("demo/output")


def tessera(*arguments: str, log: Path | None = None) -> dict:
    """Show a command, run it, return its report. `log`: where what it says goes; of that only Tessera's own lines are shown."""
    print(f"\n$ tessera {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "jobs", *arguments]
    if log is None:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        status, said = done.returncode, done.stdout
    else:
        status, said = _told(command, log)
    if status:
        raise SystemExit(status)
    report: dict = json.loads(said)
    report["wall_s"] = time.monotonic() - started
    return report


def _told(command: list[str], log: Path) -> tuple[int, str]:
    """Run a command; its status and its report, which is the one line of its stdout."""
    with log.open("w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            file.write(line)
            file.flush()
            _, _, own = line.partition(" pipeline.")
            if own or line.startswith(("config:", "failed:")):
                print(f"  {own.partition(': ')[2] or line}", end="", flush=True)
        said = process.stdout.read()
    if process.returncode:
        print(f"  failed; all that was said is in {log}", file=sys.stderr)
    return process.returncode, said


def show_run(report: dict) -> None:
    """The counts of an embedding run, which add up."""
    parts = [f"{report[name]} {name}" for name in ("unchanged", "written", "replaced", "rejected", "failed")]
    print(f"  {report['listed']} listed = {' + '.join(parts)}   ({report['wall_s']:.1f} s)")


def show_hits(report: dict) -> None:
    """The hits of each query, best first."""
    for number, query in enumerate(report["queries"]):
        asked = query.get("text") or query.get("image")
        where = f"   where {query['where']}" if query.get("where") else ""
        print(f"  {asked}{where}")
        for hit in (hit for hit in report["hits"] if hit["_query"] == number):
            price = f"   {hit['price']:.2f}" if "price" in hit else ""
            print(f"      {hit['similarity']:.2f}  {hit['text']}{price}")
