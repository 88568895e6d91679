"""The JSON object that a benchmark in this process ends with: when, where, on what model; its results."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def record_run(
    model: str, threads: int, results: Sequence[Mapping[str, Any]], out: Path | None, **more: float
) -> None:
    """Prints it as one line and writes it to `out`, if that is given."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "model": Path(model).name,
        "threads": threads,
        **more,
        "results": results,
    }
    print(json.dumps(document))
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
