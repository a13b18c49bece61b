"""The training core needs torch alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_training_core_loads_neither_ray_nor_a_table_nor_transformers():
    names = sorted(
        f"pipeline.training.{path.stem}" for path in (ROOT / "pipeline" / "training").glob("*.py") if path.stem not in ("__init__", "loop")
    )
    assert len(names) > 10
    code = f"import sys, {', '.join(names)}; print(sorted({{'ray', 'lance', 'lancedb', 'pyarrow', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
