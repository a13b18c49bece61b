"""Tiles of a slide, as RGB arrays, per second of CPU time: ours, OpenSlide, and tiffslide, pyvips and cuCIM where they are installed.

    python -m benchmarks.slide_reading                      # a slide of 16384 x 12288 px out of real pixels; JSON lines and a Markdown table
    python -m benchmarks.slide_reading --slide my.svs       # your own: every tile of its level 0

Each reader opens the slide anew and reads all tissue tiles row by row, on one thread. The readers take turns after every 64 tiles, and
of each such batch the fastest round counts, so that what else the machine does falls on all alike. CPU time of the whole process, so a
reader's own threads flatter nobody; opening, which for ours is also the comparison with OpenSlide, is given by itself.
Ours are compared with OpenSlide's pixels on every tile, and the run fails if one differs; of the others the largest difference on every
tenth is printed.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from demo.packages import Unavailable
from demo.slide_assets import fetch_slides
from pipeline.slides.opening import open_slide
from tests.slides.build import Piece, Scene, drawn_textures, real_textures, render, write_svs

GRIDS = {"aligned": (256, 0), "shifted by 100 px": (256, 100), "512 to 256": (512, 0), "512 to 256, shifted": (512, 100)}
"""Side of what is read, and where the grid begins, in px of level 0."""
BATCH = 64
WANTED = 4.0
"""How many times OpenSlide's tiles per second the fast reader must give, on every grid."""
Read = Callable[[int, int, int], np.ndarray]


def main() -> None:
    """Read, compare, print. Exits with 1 where the fast reader is under WANTED times OpenSlide."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    readers = {name: reader for name, reader in READERS.items() if installed(name)}
    with tempfile.TemporaryDirectory() as folder:
        path, places = (args.slide, None) if args.slide else build(Path(folder))
        found = []
        for grid, (side, start) in GRIDS.items():
            tiles = list(grid_of(path, side=side, start=start)) if places is None else places(side, start)
            found += measure(readers, path, grid, tiles, side=side, rounds=args.rounds)
    print(table(found))
    slow = [row for row in found if row["reader"] == "tessera" and row["ratio"] < WANTED]
    raise SystemExit(f"under {WANTED} times OpenSlide: {slow}" if slow else 0)


def installed(name: str) -> bool:
    """Whether a reader's package, with what it needs, is here; says so if not."""
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        print(f"without {name}: {error}", file=sys.stderr)
        return False
    return True


def build(folder: Path) -> tuple[Path, Callable[[int, int], list[tuple[int, int]]]]:
    """A slide of tissue on glass, and what gives the places of its tissue tiles for a side and a start."""
    try:
        textures = real_textures(fetch_slides())
    except Unavailable as error:
        print(f"drawn pixels in place of real ones: {error}", file=sys.stderr)
        textures = drawn_textures()
    pieces = tuple(Piece(name, 1024 + 2048 * i, 1536, 950) for i, name in enumerate(sorted(textures)[:2]))
    canvas = render(Scene(4096, 3072, pieces), textures, mpp=0.5)
    # Four times the same: long rows of tiles, as on a real slide, are what a reader's memory is put to the test by.
    image, labels = np.tile(canvas.image, (2, 2, 1)), np.tile(canvas.labels, (2, 2))
    path = write_svs(folder / "slide.svs", image)

    def places(side: int, start: int) -> list[tuple[int, int]]:
        scale = canvas.mpp / canvas.label_um
        chosen = []
        for y in range(start, image.shape[0] - side + 1, side):
            for x in range(start, image.shape[1] - side + 1, side):
                part = labels[int(y * scale) : int((y + side) * scale), int(x * scale) : int((x + side) * scale)]
                if (part > 0).mean() >= 0.25:
                    chosen.append((x, y))
        return chosen

    return path, places


def grid_of(path: Path, *, side: int, start: int) -> Iterator[tuple[int, int]]:
    """All places of level 0."""
    info = open_slide(str(path)).info
    for y in range(start, info.height - side + 1, side):
        for x in range(start, info.width - side + 1, side):
            yield x, y


def measure(readers: dict[str, Callable[[Path], Read]], path: Path, grid: str, tiles: list[tuple[int, int]], *, side: int, rounds: int) -> list[dict]:
    """One row a reader: tiles per second of CPU, ratio to OpenSlide, largest difference from its pixels."""
    differs = {name: difference(readers[name](path), readers["OpenSlide"](path), tiles[:: 1 if name == "tessera" else 10], side) for name in readers}
    assert differs["tessera"] == 0, f"the fast reader differs from OpenSlide by {differs['tessera']} on the {grid} grid"
    times = [one_round(readers, path, tiles, side=side) for _ in range(rounds)]
    least = {name: [min(batch) for batch in zip(*(of[name] for of in times), strict=True)] for name in readers}
    rates = {name: len(tiles) / sum(batches[1:]) for name, batches in least.items()}
    rows = [
        {
            "grid": grid,
            "reader": name,
            "tiles": len(tiles),
            "tiles_per_cpu_s": round(rate),
            "ratio": round(rate / rates["OpenSlide"], 2),
            "opening_ms": round(1000 * least[name][0], 1),
            "max_difference": differs[name],
        }
        for name, rate in rates.items()
    ]
    print("\n".join(map(json.dumps, rows)), flush=True)
    return rows


def one_round(readers: dict[str, Callable[[Path], Read]], path: Path, tiles: list[tuple[int, int]], *, side: int) -> dict[str, list[float]]:
    """CPU seconds of each reader: of opening, then of each batch of tiles."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    opened = {}
    for name, reader in readers.items():
        started = time.process_time()
        opened[name] = reader(path)
        times[name].append(time.process_time() - started)
    for start in range(0, len(tiles), BATCH):
        for name, read in opened.items():
            started = time.process_time()
            for x, y in tiles[start : start + BATCH]:
                pixels = read(x, y, side)
                if side != 256:
                    cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_AREA)
            times[name].append(time.process_time() - started)
    return times


def difference(read: Read, reference: Read, tiles: list[tuple[int, int]], side: int) -> int:
    """Largest difference of a grey level, over all tiles."""
    return max(int(np.abs(read(x, y, side).astype(int) - reference(x, y, side)[..., :3]).max()) for x, y in tiles)


def table(rows: list[dict]) -> str:
    """Tiles per second of CPU time and the ratio to OpenSlide, a line a reader."""
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    lines = ["| reader | " + " | ".join(grids) + " | opening, ms | largest difference |", "|---" * (len(grids) + 3) + "|"]
    for name in dict.fromkeys(row["reader"] for row in rows):
        own = {row["grid"]: row for row in rows if row["reader"] == name}
        cells = [f"{own[grid]['tiles_per_cpu_s']:,} ({own[grid]['ratio']:.1f}x)" for grid in grids]
        opening = min(row["opening_ms"] for row in own.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {opening} | {max(row['max_difference'] for row in own.values())} |")
    return "\n".join(lines)


# ---- readers: a path to a function of x, y and side at level 0 ----


def _fast(path: Path) -> Read:
    slide = open_slide(str(path))
    assert slide.info.reader.startswith("tiled-jpeg"), slide.info.notes
    return lambda x, y, side: slide.read_rgb((x, y), level=0, size=(side, side), white=(255, 255, 255))


def _openslide(path: Path) -> Read:
    import openslide

    slide = openslide.OpenSlide(path)
    return lambda x, y, side: np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"))


def _tiffslide(path: Path) -> Read:
    import tiffslide

    slide = tiffslide.TiffSlide(path)
    return lambda x, y, side: slide.read_region((x, y), 0, (side, side), as_array=True)


def _pyvips(path: Path) -> Read:
    import pyvips

    image = pyvips.Image.tiffload(str(path), page=0)
    region = pyvips.Region.new(image)
    return lambda x, y, side: np.frombuffer(region.fetch(x, y, side, side), np.uint8).reshape(side, side, image.bands)


def _cucim(path: Path) -> Read:
    from cucim import CuImage

    image = CuImage(str(path))
    return lambda x, y, side: np.asarray(image.read_region((x, y), (side, side), 0))


READERS: dict[str, Callable[[Path], Read]] = {"OpenSlide": _openslide, "tessera": _fast, "tiffslide": _tiffslide, "pyvips": _pyvips, "cuCIM": _cucim}
MODULES = {"OpenSlide": "openslide", "tessera": "simplejpeg", "tiffslide": "tiffslide", "pyvips": "pyvips", "cuCIM": "cucim"}


if __name__ == "__main__":
    main()
