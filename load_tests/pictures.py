"""Draws docs/pictures from load_tests/results: `python -m load_tests.pictures`, in the repository's root."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from load_tests.bar_picture import draw_bars

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def rivals_picture(result: dict[str, Any]) -> str:
    """Of `load_tests.rivals`: tokens a second of each server, medians over rounds."""
    measured = {
        "32": "32 sequences at once, tokens/s",
        "8": "8 sequences, tokens/s",
        "1": "1 sequence, tokens/s",
        "prefill": "a prompt of some 500 tokens, tokens/s",
    }
    servers = {
        "scone auto": "scone, 4 bits",
        "scone fp32": "scone, float32",
        "llama.cpp batches": "llama.cpp, 4 bits",
        "vLLM": "vLLM, float32",
        "transformers": "transformers, float32",
    }
    groups = {
        title: {server: result["medians"][name][key] for name, server in servers.items()}
        for key, title in measured.items()
    }
    return draw_bars(groups, title=f"SmolLM2-135M over HTTP, {_where(result)}", ours="scone")


def lookup_picture(result: dict[str, Any]) -> str:
    """Of `scone bench lookup`: tokens or rows a second, ours and each rival's that does the same work."""
    us, cold = result["us_per_token"], result["cold"]["rows_per_second"]
    best_loop = cold[result["cold"]["best_bare_loop"]]
    groups = {
        "longest match of 2,048 tokens, million tokens/s": {
            "scone": 1 / us["match_prompt"]["ours"],
            "Python dict, as in the paper": 1 / us["match_prompt"]["dict"],
        },
        "match and rows in RAM, million tokens/s": {
            "scone": 1 / us["rows_prompt"]["ours"],
            "dict and torch matrix": 1 / us["rows_prompt"]["dict_and_matrix"],
        },
        "rows of a cold prompt from the disk, thousand rows/s": {
            "scone": cold["ours_direct"] / 1e3,
            "bare loop of direct reads": best_loop / 1e3,
            "LMDB, 16 threads": cold["lmdb_get_per_probe_16_threads"] / 1e3,
            "np.memmap": cold["np_memmap"] / 1e3,
        },
    }
    rows = f"{result['num_rows']:,} f-grams of {result['row_bytes']:,} bytes"
    return draw_bars(groups, title=f"{rows}, {_where(result)}", ours="scone")


def recycled_picture(result: dict[str, Any]) -> str:
    """Of `scone bench recycled`: how soon the first token of a known prompt comes."""
    first = result["first_token"]["kv"]
    names = {
        "computed": "nowhere: computed",
        "disk": "known, on the disk",
        "page_cache": "known, in the page cache",
        "memory": "known, in the KV cache",
    }
    bars = {name: first["seconds_to_first_token"][key] * 1e3 for key, name in names.items()}
    group = (
        f"time to the first token of a prompt of {first['prompt_tokens']:,} tokens whose beginning is ..., ms"
    )
    return draw_bars({group: bars}, title=f"SmolLM2-135M, {_where(result)}", ours="known")


DRAWN = {
    "rivals.svg": (rivals_picture, "rivals-2026-11-26.json"),
    "lookup.svg": (lookup_picture, "lookup-1m-2048-2026-11-27-lmdb.json"),
    "recycled.svg": (recycled_picture, "recycled-2026-11-26-bfloat16.json"),
}
"""By file name of the picture, what draws it from which result."""


def drawn(name: str) -> str:
    """The picture as it should be."""
    draw, result = DRAWN[name]
    return draw(json.loads((RESULTS / result).read_text()))


def _where(result: dict[str, Any]) -> str:
    return f"2 CPU cores, {result['date'][:10]}"


def main() -> int:
    PICTURES.mkdir(exist_ok=True)
    for name in DRAWN:
        (PICTURES / name).write_text(drawn(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
