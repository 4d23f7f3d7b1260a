"""Small charts as inline SVG. Colours and fonts come from the page's style sheet, so they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from resonance.evaluate.metrics import Rate

WIDTH = 360  # units of the drawing; narrow, so that text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 34
MAX_POINTS = 300  # a curve is averaged down to this many


@dataclass(frozen=True, slots=True)
class IntervalRow:
    """One group with its rates before, where there is a before, and after."""

    label: str
    base: Rate | None
    tuned: Rate


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (step, value) under a name. `style` is the CSS class "a" or "b". `whiskers`: intervals (step, low, high)."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    whiskers: Sequence[tuple[float, float, float]] = ()


def interval_chart(description: str, rows: Sequence[IntervalRow]) -> str:
    """For each group the rate before (hollow) and after (filled) with their intervals, on an axis from 0 in percent."""
    row_height, first = 54, 18
    height = first + row_height * len(rows) + 22
    reached = [
        v for row in rows for rate in (row.base, row.tuned) if rate for v in (rate.value, rate.high) if v is not None
    ]
    top = _nice_top(min(max([*reached, 0.1]), 2.0))  # one runaway loop must not squeeze everything else
    left, span = 12, WIDTH - 12 - 22

    def x(value: float) -> float:
        return left + span * min(value / top, 1.0)

    bottom = first + row_height * len(rows)
    parts = []
    for tick in _ticks(top):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{first - 8}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{100 * tick:g}%</text>'
        )
    for i, row in enumerate(rows):
        y = first + row_height * i
        parts.append(f'<text x="{left}" y="{y + 5}">{escape(row.label)}</text>')
        for rate, style, offset in ((row.base, "a", 19), (row.tuned, "b", 34)):
            if rate is None or rate.value is None:
                continue
            if rate.low is not None and rate.high is not None:
                parts.append(
                    f'<line class="whisker {style}" x1="{x(rate.low):.1f}" x2="{x(rate.high):.1f}" '
                    f'y1="{y + offset}" y2="{y + offset}"/>'
                )
            parts.append(f'<circle class="dot {style}" cx="{x(rate.value):.1f}" cy="{y + offset}" r="5"/>')
    return _svg(description, height, parts)


def line_chart(description: str, x_label: str, curves: Sequence[Curve], percent: bool = False) -> str:
    """Curves over training steps on an axis from 0."""
    height = 210
    curves = [replace(c, points=_thin([p for p in c.points if math.isfinite(p[1])])) for c in curves]
    curves = [c for c in curves if c.points]
    last = max((p[0] for c in curves for p in c.points), default=1.0) or 1.0
    top = _nice_top(
        max([*(p[1] for c in curves for p in c.points), *(w[2] for c in curves for w in c.whiskers)] or [1.0])
    )
    width, depth = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + width * point[0] / last, TOP + depth * (1 - max(point[1], 0.0) / top)

    parts = []
    for tick in _ticks(top):
        y = at((0, tick))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{100 * tick:g}%" if percent else f"{tick:g}"
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in _ticks(last):
        if tick <= last:
            parts.append(
                f'<text class="tick" x="{at((tick, 0))[0]:.1f}" y="{height - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
            )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    for curve in curves:
        corners = [at(point) for point in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        for step, low, high in curve.whiskers:
            (x, bottom), (_x, above) = at((step, low)), at((step, high))
            parts.append(
                f'<line class="whisker {curve.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{above:.1f}"/>'
            )
        parts.append(f'<polyline class="curve {curve.style}" points="{path}"/>')
        if len(corners) <= 40:
            parts += [f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in corners]
    return _svg(description, height, parts)


def _svg(description: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(description)}">'
        + "".join(parts)
        + "</svg>"
    )


def _step(top: float) -> float:
    """A round distance that divides an axis up to `top` in two to five parts."""
    power = 10.0 ** math.floor(math.log10(top))
    return next(m * power for m in (0.2, 0.5, 1.0, 2.0) if top / (m * power) <= 5)


def _nice_top(value: float) -> float:
    """The end of an axis that holds `value`: a whole number of steps."""
    value = max(value, 1e-9)
    step = _step(value)
    return float(f"{step * math.ceil(value / step - 1e-9):.6g}")


def _ticks(top: float) -> list[float]:
    step = _step(top)
    return [float(f"{step * i:.6g}") for i in range(math.floor(top / step + 1e-9) + 1)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]
