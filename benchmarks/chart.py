"""A chart of `benchmarks.gradcache`: peak memory over the number of pairs, both axes logarithmic, drawn with Pillow."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 620, 420, 80, 50, 20, 60
COLOURS = {"plain": "#c0392b", "ours": "#1f77b4", "theirs": "#7f8c8d"}
LABELS = {"plain": "plain step", "ours": "GradCache", "theirs": "sentence-transformers"}


def draw(found: list[dict], path: Path) -> None:
    """One panel for each kind of pairs, side by side, as PNG."""
    kinds = list(dict.fromkeys(row["kind"] for row in found))
    image = Image.new("RGB", (WIDTH * len(kinds), HEIGHT), "white")
    for place, kind in enumerate(kinds):
        image.paste(panel([row for row in found if row["kind"] == kind], f"one step of {kind} pairs"), (place * WIDTH, 0))
    image.save(path, optimize=True)


def panel(rows: list[dict], title: str) -> Image.Image:
    """The lines of all methods, with a grid of powers of two (pairs) and of ten (MiB)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    pairs = sorted({row["pairs"] for row in rows})
    low, high = 10, 10 ** math.ceil(math.log10(max(row["peak_mib"] for row in rows)))

    def at(num_pairs: int, mib: float) -> tuple[float, float]:
        x = math.log(num_pairs / pairs[0]) / math.log(pairs[-1] / pairs[0])
        y = math.log(max(mib, low) / low) / math.log(high / low)
        return LEFT + x * (WIDTH - LEFT - RIGHT - 30), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    pen.text((LEFT, 14), f"{title}: peak memory beyond the start, MiB", "black", font)
    for num_pairs in pairs:
        pen.line([at(num_pairs, low), at(num_pairs, high)], "#e5e5e5")
        pen.text((at(num_pairs, low)[0], HEIGHT - BOTTOM + 8), f"{num_pairs:,}", "black", font, anchor="ma")
    for power in range(1, round(math.log10(high)) + 1):
        pen.line([at(pairs[0], 10**power), at(pairs[-1], 10**power)], "#e5e5e5")
        pen.text((LEFT - 8, at(pairs[0], 10**power)[1]), f"{10**power:,}", "black", font, anchor="rm")
    pen.text((LEFT, HEIGHT - 24), "pairs in the batch; chunks of 128 rows", "black", font)
    for place, (method, colour) in enumerate(COLOURS.items()):
        points = [at(row["pairs"], row["peak_mib"]) for row in rows if row["method"] == method]
        pen.line(points, colour, 3)
        for x, y in points:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        pen.text((LEFT + 190 * place, 34), LABELS[method], colour, font)
    return image
