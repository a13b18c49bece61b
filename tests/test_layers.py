"""Who may import whom: schemas <- pipeline <- jobs, and heavy packages only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for folder in ("schemas", "pipeline", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
HEAVY = {"ray", "torch", "lancedb"}
PURE = ["config", "command", "media", "plan", "known", "storage", "compute", "report", "tiles"]


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names} | names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    names = imported(path)
    layer = path.relative_to(ROOT).parts[0]
    assert not names & {"tests", "benchmarks", "demo"}
    if layer == "schemas":
        assert not names & ({"pipeline", "jobs"} | HEAVY)
    if layer == "pipeline":
        assert "jobs" not in names
    if layer == "jobs":
        assert "torch" not in names
        assert not {name for name in names if name.startswith("jobs.")}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_heavy(name):
    assert not imported(ROOT / "pipeline" / f"{name}.py") & HEAVY


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline" / "encoders").glob("*.py")), ids=lambda path: path.name)
def test_encoders_know_no_ray(path):
    assert not imported(path) & {"ray", "lancedb", "lance"}


def test_a_run_with_nothing_to_do_loads_neither_ray_nor_torch():
    code = "import sys, jobs.embed, pipeline.readers.images, pipeline.encoders.hashing; print(sorted({'ray', 'torch', 'lancedb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
