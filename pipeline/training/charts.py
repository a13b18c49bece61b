"""Charts as inline SVG: curves over steps, and histograms. Text in, text out; colours are the page's (`report.STYLE`)."""

import html as escaping
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 24
MOST_POINTS = 400
"""Points that a curve is drawn with: more than the chart has pixels to show."""
SMOOTH = 0.9
"""Share of the mean that stays from one point to the next, where a curve is smoothed."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line: its name in the legend, and its points (step, value)."""

    name: str
    points: Points
    smooth: bool = False
    """Whether a moving mean is drawn over the points, which are then pale."""


def curves(title: str, drawn: Sequence[Curve], *, steps: int, marks: Sequence[int] = (), dots: bool = False) -> str:
    """A chart of one or more curves over 0 to `steps`. `marks`: steps at which a broken vertical line stands. `dots`: a dot for each point."""
    drawn = [Curve(curve.name, thinned(_finite(curve.points)), curve.smooth) for curve in drawn]
    values = [value for curve in drawn for _, value in curve.points]
    if not values:
        return ""
    low, high, ticks = scale(min(values), max(values))
    parts = [_rows(low, high, ticks), _steps(steps)]
    parts += [f'<line class="mark" x1="{_x(at, steps):.1f}" x2="{_x(at, steps):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for at in marks]
    for number, curve in enumerate(drawn):
        where = [(_x(step, steps), _y(value, low, high)) for step, value in curve.points]
        if curve.smooth and len(where) > 20:
            parts.append(_line(where, f"pale c{number}"))
            where = [(_x(step, steps), _y(value, low, high)) for step, value in smoothed(curve.points)]
        parts.append(_line(where, f"c{number}"))
        if dots:
            told = [f"{curve.name}: {value:.4g} at step {step:g}" for step, value in curve.points]
            parts += [
                f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escaping.escape(words)}</title></circle>'
                for (x, y), words in zip(where, told, strict=True)
            ]
    latest = [(curve.name, curve.points[-1][1]) for curve in drawn if curve.points]
    return _figure(title, latest, parts)


def histogram(title: str, sides: Sequence[tuple[str, Sequence[float]]], *, low: float, high: float) -> str:
    """Shares of values in equal bins from `low` to `high`, of several sets over each other."""
    shares = [(name, [count / max(1.0, float(sum(counts))) for count in counts]) for name, counts in sides]
    most = max((max(values) for _, values in shares), default=0.0)
    _, top, ticks = scale(0.0, most or 1.0)
    parts = [_rows(0.0, top, ticks)]
    for place in range(5):
        value = low + (high - low) * place / 4
        parts.append(_bottom(LEFT + (WIDTH - LEFT - RIGHT) * place / 4, f"{value:g}"))
    for number, (_, values) in enumerate(shares):
        wide = (WIDTH - LEFT - RIGHT) / len(values)
        edges = [(LEFT + (place + side) * wide, _y(value, 0.0, top)) for place, value in enumerate(values) for side in (0, 1)]
        closed = [(edges[0][0], _y(0, 0.0, top)), *edges, (edges[-1][0], _y(0, 0.0, top))]
        parts.append(f'<polygon class="c{number}" points="{_told(closed)}"/>')
    middles = [low + (high - low) * (place + 0.5) / len(shares[0][1]) for place in range(len(shares[0][1]))]
    means = [(name, sum(share * at for share, at in zip(values, middles, strict=True))) for name, values in shares]
    return _figure(title, means, parts)


def scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """The ends of an axis that holds both values, and three to six round numbers on it."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [at * step for at in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS of them, evenly taken, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(place * (len(points) - 1) / (MOST_POINTS - 1))] for place in range(MOST_POINTS)]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """An exponential moving mean, without the pull of its beginning (Kingma and Ba, arXiv 1412.6980, section 3)."""
    mean, weight, found = 0.0, 0.0, []
    for step, value in points:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + (1 - SMOOTH)
        found.append((step, mean / weight))
    return found


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _x(step: float, steps: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _line(where: Points, kind: str) -> str:
    return f'<polyline class="{kind}" points="{_told(where)}"/>'


def _told(where: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in where)


def _rows(low: float, high: float, ticks: Sequence[float]) -> str:
    drawn = []
    for value in ticks:
        y = _y(value, low, high)
        drawn.append(f'<line class="row" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{0 if abs(value) < 1e-12 else value:.4g}</text>')
    return "".join(drawn)


def _steps(steps: int) -> str:
    return "".join(_bottom(_x(value, steps), f"{value:g}") for value in scale(0, max(1, steps))[2] if 0 <= value <= steps)


def _bottom(x: float, words: str) -> str:
    return f'<text x="{min(x, WIDTH - RIGHT):.1f}" y="{HEIGHT - 6}" text-anchor="{"end" if x > WIDTH - 30 else "middle"}">{words}</text>'


def _figure(title: str, values: Sequence[tuple[str, float]], parts: Sequence[str]) -> str:
    legend = " ".join(
        f'<span class="c{number}"><i></i>{escaping.escape(name)} <b>{value:.4g}</b></span>' for number, (name, value) in enumerate(values)
    )
    drawn = "".join(parts)
    name = escaping.escape(title, quote=True)
    return (
        f'<figure><figcaption><h3>{name}</h3><p class="legend">{legend}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{drawn}</svg></figure>'
    )
