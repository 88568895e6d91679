"""`scone inspect`: what a table holds, and its first f-grams."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files
from scone.model_store.table_writer import FGRAMS_NAME
from scone.server.settings import Command, Resolved, Setting, parse_bool


def run(settings: Resolved) -> int:
    facts = inspect_table(settings.table, settings.fgrams)
    if settings.json:
        print(json.dumps(facts))
        return 0
    fgrams = facts.pop("fgrams")
    files = facts.pop("files")
    for name, value in facts.items():
        print(f"{name:20} {value:,}" if type(value) is int else f"{name:20} {value}")
    for name, entry in files.items():
        print(f"  {name:18} {entry['num_bytes']:,} bytes")
    for fgram in fgrams:
        print(f"row {fgram['row_id']}: count {fgram['count']:,}, tokens {fgram['tokens']}")
    return 0


def inspect_table(path: Path, num_fgrams: int) -> dict[str, Any]:
    """The manifest, f-grams by length, and the first `num_fgrams` of them; raises TableError."""
    manifest = open_table_files(path).manifest
    fgrams = FGramSet.load(path / FGRAMS_NAME)
    by_length = np.bincount(fgrams.lengths, minlength=fgrams.max_n + 1)[2:].tolist()
    return asdict(manifest) | {
        "total_bytes": sum(entry.num_bytes for entry in manifest.files.values()),
        "fgrams_by_length": dict(enumerate(by_length, start=2)),
        "fgrams": [
            {
                "row_id": row_id,
                "count": int(fgrams.counts[row_id]),
                "tokens": fgrams.tokens[row_id, : fgrams.lengths[row_id]].tolist(),
            }
            for row_id in range(min(num_fgrams, len(fgrams)))
        ],
    }


COMMAND = Command(
    name="inspect",
    help="show what a table holds",
    settings=(
        Setting(name="table", kind=Path, positional=True, required=True, help="folder of the table"),
        Setting(name="json", kind=parse_bool, default=False, help="print one JSON object"),
        Setting(name="fgrams", kind=int, default=0, help="how many of the most frequent f-grams to list"),
    ),
    run=run,
)
