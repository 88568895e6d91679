"""Elements of pictures: SVG, written here, so that the same numbers give the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Told apart by colour-blind people too (Okabe and Ito); the first is for what matters most."""


def picture(width: float, height: float, elements: Iterable[str]) -> str:
    """A file with these elements on white."""
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif"'
        ' font-size="12">'
    )
    ground = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([start, ground, *elements, "</svg>", ""])


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    """A straight one."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def text(x: float, y: float, content: str, anchor: str = "middle", size: int = 12) -> str:
    """`anchor` says which end of the text lies at the place: start, middle or end."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(content)}</text>"


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A rectangle, filled."""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {size} fill="{colour}"/>'
