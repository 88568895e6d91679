"""Prompts for a load test: stretches of real text that every machine has, Python's own standard library.

It knows nothing of HTTP or of tokens: lengths are in characters, the server says how many tokens that was.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def read_library(folder: Path | None = None, max_chars: int = 4_000_000) -> str:
    """The source text of the standard library's top level, in file order, at most `max_chars`."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= max_chars:
            break
    return text[:max_chars]


def prompts(text: str, min_chars: int, max_chars: int, seed: int) -> Iterator[str]:
    """Endless stretches of `text` from random places, lengths uniform in [min_chars, max_chars].

    The same seed gives the same prompts. Raises ValueError if the text is shorter than the longest stretch.
    """
    if not 1 <= min_chars <= max_chars <= len(text):
        raise ValueError(
            f"prompt lengths {min_chars} to {max_chars} do not fit: "
            f"wanted 1 <= MIN <= MAX <= {len(text)} characters"
        )
    draw = random.Random(seed)
    while True:
        length = draw.randint(min_chars, max_chars)
        start = draw.randint(0, len(text) - length)
        yield text[start : start + length]
