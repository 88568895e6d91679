"""Curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scone.model_store.svg import COLOURS, line, picture, text

WIDTH, HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 48

Points = Sequence[tuple[float, float]]


def draw_curves(curves: Mapping[str, Points], *, title: str, x_label: str, y_label: str) -> str:
    """An SVG with one line a curve and a legend; curves without points are left out.

    Raises:
        ValueError: no curve has points.
    """
    drawn = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        raise ValueError("there is nothing to draw: no curve has points")
    xs, ys = zip(*(point for points in drawn.values() for point in points), strict=True)
    x_axis, y_axis = (
        _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT),
        _Axis(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP),
    )
    parts = [
        text(WIDTH / 2, 20, title, size=14),
        text((WIDTH + _LEFT) / 2, HEIGHT - 10, x_label),
        f'<g transform="translate(14 {HEIGHT / 2}) rotate(-90)">{text(0, 0, y_label)}</g>',
    ]
    for x in x_axis.ticks:
        at = x_axis.place(x)
        parts.append(line(at, _TOP, at, HEIGHT - _BOTTOM, "#dddddd"))
        parts.append(text(at, HEIGHT - _BOTTOM + 18, f"{x:g}"))
    for y in y_axis.ticks:
        at = y_axis.place(y)
        parts.append(line(_LEFT, at, WIDTH - _RIGHT, at, "#dddddd"))
        parts.append(text(_LEFT - 6, at + 4, f"{y:g}", anchor="end"))
    for i, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend_y = _TOP + 16 + 16 * i
        parts.append(line(WIDTH - 200, legend_y - 4, WIDTH - 180, legend_y - 4, colour, width=2))
        parts.append(text(WIDTH - 174, legend_y, name, anchor="start"))
    return picture(WIDTH, HEIGHT, parts)


class _Axis:
    """A range of values over a range of places, with round ticks."""

    def __init__(self, least: float, most: float, begin: float, end: float) -> None:
        span = (most - least) or 1.0
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        first, last = math.floor(least / step), math.ceil(most / step)
        last = max(last, first + 1)
        self.ticks = [round(step * i, 12) for i in range(first, last + 1)]
        self._begin, self._scale = begin, (end - begin) / (self.ticks[-1] - self.ticks[0])

    def place(self, value: float) -> float:
        return self._begin + (value - self.ticks[0]) * self._scale
