"""The console command: `tessera JOB [JOB.yaml] [key.sub=value ...]`. Imports nothing but the job that it runs."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

USAGE = """usage: tessera JOB [JOB.yaml] [key.sub=value ...] [--check | --plan]

{jobs}

tessera JOB --help    what the job does
tessera JOB --keys    every key of its job file
tessera --version
"""


def jobs() -> dict[str, str]:
    """Every job and the first line of its docstring, read without importing it."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0] for file in files}


def main() -> None:
    """Run the job that the first argument names."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    known = jobs()
    if name in known:
        sys.argv = [name, *arguments]
        importlib.import_module(f"jobs.{name}").main()
    elif name == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"tessera {version('tessera')}\n")
    elif name in ("-h", "--help", "help"):
        sys.stdout.write(_usage(known))
    else:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"there is no job {name!r}{f'; did you mean {close[0]!r}?' if close else ''}; the jobs are {', '.join(known)}\n"
        sys.stderr.write(hint if name else _usage(known))
        raise SystemExit(2)


def _usage(known: dict[str, str]) -> str:
    return USAGE.format(jobs="\n".join(f"  {job:<10} {line}" for job, line in known.items()))


if __name__ == "__main__":
    main()
