"""Runs the demonstration step by step and shows each command as a user would type it."""

import json
import subprocess
import sys
import time
from pathlib import Path

from demo import assets

OUTPUT = Path("demo/output")


def tessera(*arguments: str) -> dict:
    """Show a command, run it, return its report."""
    print(f"\n$ tessera {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "jobs", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    report: dict = json.loads(done.stdout)
    report["wall_s"] = time.monotonic() - started
    return report


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


def main() -> None:
    """Fetch, embed, search, and run again."""
    assets.fetch()
    OUTPUT.mkdir(exist_ok=True)
    sets = ["photos"] + (["products"] if Path("demo/assets/products/products.csv").exists() else [])
    for name in sets:
        show_run(tessera("embed", f"demo/{name}.yaml"))
    for name in sets:
        show_hits(tessera("search", f"demo/{name}-search.yaml"))
        tessera("search", f"demo/{name}-search.yaml", f"sheet=demo/output/{name}.png")
    print("\nThe same job again: nothing to do, and no new version of the table.")
    again = tessera("embed", "demo/photos.yaml")
    show_run(again)
    print(f"\nOpen {', '.join(str(OUTPUT / f'{name}.html') for name in sets)} in a browser to see what was found.")


if __name__ == "__main__":
    main()
