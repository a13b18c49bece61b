"""What a run over unchanged slides costs, beside the first one, and after one was replaced: `python -m benchmarks.slides_rerun [SLIDES]`.

Small Aperio slides of four scales and four stains, from real pixels where demo.slide_assets has them; hashing encoder; whole
processes, imports included. Prints one JSON line.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from demo.assets import ASSETS
from demo.packages import Unavailable
from demo.slide_assets import fetch_slides
from tests.slides.build import drawn_textures, real_textures, render, some_scene, write_svs

MPPS = (0.25, 0.3001, 0.4603, 0.5)


def main() -> None:
    """First run, rerun, and a run after one slide was replaced in place."""
    num_slides = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    textures = _textures()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_slides):
            slide(Path(folder) / "slides" / f"{number:04}.svs", number, textures)
        job = Path(folder) / "job.yaml"
        job.write_text(
            f"slides: {{uri: {folder}/slides}}\n"
            "grids: [{mpp: 0.5, tile_px: 128}]\n"
            "encoder: {target: 'pipeline.encoders.hashing:Hashing', args: {dim: 64}}\n"
            f"table: {{uri: {folder}/db, name: t}}\n"
        )
        first, again = timed(job), timed(job)
        slide(Path(folder) / "slides" / "0000.svs", num_slides, textures)
        replaced = timed(job)
    print(json.dumps({"slides": num_slides, "first": first, "rerun": again, "one_replaced": replaced, "ratio": again["s"] / first["s"]}))


def _textures() -> dict[str, np.ndarray]:
    try:
        return real_textures(fetch_slides(ASSETS))
    except Unavailable:
        return drawn_textures()


def slide(path: Path, number: int, textures: dict[str, np.ndarray]) -> None:
    """One small slide, another one for each number."""
    path.parent.mkdir(exist_ok=True)
    mpp = MPPS[number % len(MPPS)]
    scene = some_scene(list(textures), width_um=512, height_um=256, seed=number)
    write_svs(path, render(scene, textures, mpp=mpp, stain=number // len(MPPS) % 4).image, mpp=mpp)


def timed(job: Path) -> dict[str, Any]:
    """Wall seconds of one run, and what it opened and embedded."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "jobs.slides", str(job)], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    seconds = round(time.perf_counter() - started, 2)
    return {"s": seconds, "opened": report["opened"], "unchanged": report["unchanged"], "tiles_written": report["tiles"]["written"]}


if __name__ == "__main__":
    main()
