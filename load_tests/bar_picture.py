"""Measured values as a picture of bars."""

from __future__ import annotations

from collections.abc import Mapping

from scone.model_store.svg import COLOURS, box, line, picture, text

WIDTH = 720
_LEFT, _RIGHT = 210, 70
_TOP, _ROW, _GAP = 40, 20, 34
_OTHERS = "#b0b0b0"

Bars = Mapping[str, float]


def draw_bars(groups: Mapping[str, Bars], *, title: str, ours: str) -> str:
    """An SVG with one horizontal bar a value, each group to its own scale, its values beside its bars.

    Args:
        groups: by what was measured, with its unit; all values are positive.
        ours: how names of bars begin that are coloured.
    """
    parts = [text(WIDTH / 2, 22, title, size=14)]
    y = _TOP
    for measured, bars in groups.items():
        y += _GAP
        parts.append(text(_LEFT, y - 8, measured, anchor="start", size=13))
        longest = max(bars.values())
        for name, value in bars.items():
            width = (WIDTH - _LEFT - _RIGHT) * value / longest
            colour = COLOURS[0] if name.startswith(ours) else _OTHERS
            parts.append(text(_LEFT - 8, y + _ROW * 0.6, name, anchor="end"))
            parts.append(box(_LEFT, y, width, _ROW * 0.75, colour))
            parts.append(text(_LEFT + width + 6, y + _ROW * 0.6, _number(value), anchor="start"))
            y += _ROW
        parts.append(line(_LEFT, y - _ROW * len(bars) - 4, _LEFT, y, "#000000"))
    return picture(WIDTH, y + _ROW, parts)


def _number(value: float) -> str:
    """With three digits that count."""
    return f"{float(f'{value:.3g}'):,g}"
