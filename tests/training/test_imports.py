"""The losses and GradCache need torch alone."""

import subprocess
import sys
from pathlib import Path

CORE = ["check", "distillation", "gradcache", "infonce", "matryoshka", "siglip", "sum", "triplet"]


def test_the_training_core_loads_neither_ray_nor_a_table_nor_transformers():
    code = (
        f"import sys, {', '.join(f'pipeline.training.{name}' for name in CORE)}; "
        "print(sorted({'ray', 'lance', 'lancedb', 'pyarrow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.strip() == "[]"
