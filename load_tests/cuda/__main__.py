"""What a model with a table does on a GPU: `python -m load_tests.cuda [--model GGUF]`, or `make bench-cuda`

The engine itself, in process, without HTTP: decode steps of 1 to 128 sequences by CUDA graphs and by
single launches, and the time to the first token of prompts of 2,000 tokens; without a table, and with one
whose rows lie in device memory, in RAM, on disk in the page cache, and on disk with the page cache dropped
before each run. Rows are random, 1M of SmolLM2's 576 values unless told otherwise; keys are counted from
made-up text with the skew of real text. Without `--model`, weights of SmolLM2-135M's shape are random, which
costs the same time. So that f-grams are met as in text, sequences are made to follow it: one more small
launch a step, table or not.

`step_ms` is what a step takes, from scheduling to the last delta; `graph_ms` a replay alone, on the device,
with empty contexts; `period_ms` what passes from one token of a sequence to its next. Medians. transformers'
`generate` is measured beside, with weights of the same shape, where it is installed. A part that fails says
why and the rest goes on. Figures are printed when they are known; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from load_tests.cuda.bench import LONG_PROMPT, SHORT_PROMPT, TABLES, Bench
from load_tests.cuda.report import Report, machine
from load_tests.cuda.smollm2_shape import SMOLLM2_135M
from load_tests.cuda.transformers_decode import transformers_decode


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.cuda", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="GGUF file or folder (default: random weights of SmolLM2-135M's shape)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this out")
    parser.add_argument("--parts", nargs="+", default=["decode", "first_token", "transformers"])
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--tokens", type=int, default=65, help="tokens that each sequence generates")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=SMOLLM2_135M.num_layers)
    parser.add_argument("--corpus-tokens", type=int, default=4_000_000)
    parser.add_argument("--kv-cache-bytes", type=int, default=4 << 30)
    parser.add_argument(
        "--limit", type=float, default=150.0, help="seconds after which nothing more is begun"
    )
    parser.add_argument("--work", help="folder for the table, which is kept (default: a new one, removed)")
    parser.add_argument("--out", help="file for the JSON object")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        options.tables = [t for t in options.tables if t != "device"]
    return options


def measure(bench: Bench, options: argparse.Namespace, report: Report) -> None:
    """All parts that are asked for, one after the other."""
    on_gpu = options.device == "cuda"
    kinds = ["graphs", "eager"] if on_gpu else ["torch"]
    for kind in kinds:
        report.take("start", kind, partial(bench.start, kind))
    if on_gpu:
        report.take("graph_ms", "by_size", bench.graph_times)
    if set(options.tables) != {"none"}:
        report.take("start", "table", lambda: {"rows": options.rows, "path": bench.table_path.name})
    if "decode" in options.parts:
        pairs = [(kind, "none") for kind in kinds] + [(kinds[0], t) for t in options.tables if t != "none"]
        for kind, table in pairs:
            for num in options.seqs:
                report.take(f"decode {kind} {table}", str(num), partial(bench.decode, kind, table, num))
    if "first_token" in options.parts:
        for table in options.tables:
            report.take("first_token", table, partial(bench.first_token, kinds[0], table, 5))
    if "transformers" in options.parts and on_gpu:
        for num in (1, 8, 32):
            decode = partial(transformers_decode, num, SHORT_PROMPT, options.tokens)
            report.take("transformers", str(num), decode)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    report = Report(options.limit)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode(False):
        work = Path(options.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        bench = Bench(options, work)
        print(f"model: {bench.weights}, {time.monotonic() - began:.1f} s", flush=True)
        measure(bench, options, report)
        bench.close()
    result = {
        "benchmark": "cuda",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "weights": bench.weights,
        "dim": bench.decoder.config.dim,
        "rows": options.rows,
        "prompt_tokens": {"decode": SHORT_PROMPT, "first_token": LONG_PROMPT},
        **report.figures,
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
