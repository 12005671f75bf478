"""Curves as SVG, in the colours of the page that holds them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

__all__ = ["STROKES", "curves"]

STROKES = "abcdef"  # classes of lines; the page's style gives each a colour
MOST_POINTS = 600  # points a curve: about as many as it has pixels
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 860.0, 220.0, 48.0, 24.0, 18.0

Points = Sequence[tuple[float, float]]


def curves(series: Mapping[str, Points], span: tuple[float, float] | None = None, over: str = "steps") -> str:
    """An SVG of up to six named series of (x, y); `span` fixes the y axis, `over` names the x axis."""
    kept = {name: _thinned(points) for name, points in list(series.items())[: len(STROKES)]}
    if max((len(points) for points in kept.values()), default=0) < 2:
        return '<p class="soft">fewer than two logged steps</p>'
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    left, right = min(xs), max(xs)
    low, high = span or (min(ys), max(ys))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1.0):
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - MARGIN) * (value - left) / (right - left or 1)

    def y(value: float) -> float:
        return MARGIN + (HEIGHT - BOTTOM - MARGIN) * (1 - (value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img">']
    for tick in _ticks(low, high):
        at = y(tick)
        parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - MARGIN:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{at + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(left, right):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6:g}" text-anchor="middle">{tick:.6g}</text>')
    for stroke, points in zip(STROKES, kept.values(), strict=False):
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="{stroke}" points="{line}"/>')
    legend = " &nbsp; ".join(
        f'<span class="key-{stroke}">&#9632; {html.escape(name)}</span>'
        for stroke, name in zip(STROKES, kept, strict=False)
    )
    return f"<p>{legend} <span class='soft'>over {over}</span></p>" + "".join(parts) + "</svg>"


def _thinned(points: Points) -> Points:
    return points[:: max(1, math.ceil(len(points) / MOST_POINTS))]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between `low` and `high`; one where they are the same."""
    if not high > low:
        return [low]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(u * power for u in (1, 2, 2.5, 5, 10) if u * power >= raw)
    first = math.ceil(low / unit)
    return [unit * k for k in range(first, math.floor(high / unit) + 1)]
