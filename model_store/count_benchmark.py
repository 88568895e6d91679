"""Measures counting: seconds, CPU seconds and peak memory, against `np.unique` over packed keys.

    python -m scone.model_store.count_benchmark --tokens 30000000

Progress goes to stderr; the last line of stdout is one JSON object. Both ways are checked to count the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scone.kernels.extension import native
from scone.model_store.count import count_fgrams
from scone.model_store.errors import CorpusError
from scone.model_store.fgram_set import MIN_N, FGramSet
from scone.model_store.token_corpus import TokenCorpus

_PACKED_BITS = 16  # four ids of a vocabulary below 65,536 in one int64
_DOCUMENT_TOKENS = 2000

_Result = TypeVar("_Result")


def made_up_corpus(num_tokens: int, seed: int = 0) -> TokenCorpus:
    """Tokens that repeat as text does: phrases drawn from a Zipf law, of tokens drawn from another.

    Independent tokens would be no test: almost none of their 3- and 4-grams occurs five times.
    """
    rng = np.random.default_rng(seed)
    num_phrases, phrase_tokens = 200_000, 8
    phrases = (rng.zipf(1.2, (num_phrases, phrase_tokens)) % 49_152).astype(np.int32)
    chosen = rng.zipf(1.15, num_tokens // phrase_tokens + 1) % num_phrases
    tokens = phrases[chosen].reshape(-1)[:num_tokens]
    offsets = np.append(np.arange(0, num_tokens, _DOCUMENT_TOKENS), num_tokens)
    return TokenCorpus(tokens, offsets.astype(np.int64))


def benchmark(corpus: TokenCorpus, *, max_n: int, top: int, memory_bytes: int | None) -> dict[str, Any]:
    """Counts once with `count_fgrams` and, for max_n <= 4, once with `np.unique`."""
    corpus.hash  # noqa: B018 - read once, so that neither way pays for hashing
    with tempfile.TemporaryDirectory() as folder:
        fgrams, measured = _measured(
            lambda: count_fgrams(
                corpus,
                max_n=max_n,
                min_count=5,
                top=top,
                tokenizer_hash="",
                memory_bytes=memory_bytes,
                work=Path(folder) / "work",
            )
        )
    result: dict[str, Any] = {
        "benchmark": "count",
        "num_tokens": corpus.num_tokens,
        "max_n": max_n,
        "num_fgrams": len(fgrams),
        "memory_limit_bytes": memory_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens_per_second": round(corpus.num_tokens / measured["seconds"]),
        **measured,
    }
    if max_n * _PACKED_BITS <= 64 and int(corpus.tokens.max(initial=0)) < 1 << _PACKED_BITS:
        counts, sorting = _measured(lambda: _unique_counts(corpus, max_n))
        _check(fgrams, counts)
        result["np_unique"] = sorting
    return result | {
        "native": native is not None,
        "num_cpus": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _measured(work: Callable[[], _Result]) -> tuple[_Result, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


def _unique_counts(corpus: TokenCorpus, max_n: int) -> list[NDArray[np.int64]]:
    """For each n the sorted counts of all n-grams within documents."""
    document = np.repeat(np.arange(corpus.num_documents), np.diff(corpus.offsets))
    counts = []
    for n in range(MIN_N, max_n + 1):
        size = corpus.num_tokens - n + 1
        keys = corpus.tokens[:size].astype(np.int64)
        for i in range(1, n):
            keys = (keys << _PACKED_BITS) | corpus.tokens[i : i + size]
        within = document[:size] == document[n - 1 :]
        counts.append(np.unique(keys[within], return_counts=True)[1].astype(np.int64))
    return counts


def _check(fgrams: FGramSet, counts: list[NDArray[np.int64]]) -> None:
    """The set's counts are the largest of all that occur five times or more."""
    together = np.concatenate(counts)
    ranked = np.sort(together[together >= 5])[::-1][: len(fgrams)]
    assert np.array_equal(ranked, fgrams.counts), "count_fgrams and np.unique disagree"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scone.model_store.count_benchmark")
    parser.add_argument("--tokens", type=int, default=30_000_000, help="size of the made-up corpus")
    parser.add_argument("--corpus", type=Path, help="a tokenised corpus (.npz) instead")
    parser.add_argument("--max-n", type=int, default=4)
    parser.add_argument("--top", type=int, default=1_000_000)
    parser.add_argument("--memory", type=float, help="GiB; a corpus that needs more is counted on disk")
    arguments = parser.parse_args(argv)
    try:
        given = arguments.corpus
        corpus = TokenCorpus.load(given) if given else made_up_corpus(arguments.tokens)
    except CorpusError as error:
        print(f"count_benchmark: {error}", file=sys.stderr)
        return 1
    memory_bytes = None if arguments.memory is None else int(arguments.memory * 2**30)
    print(json.dumps(benchmark(corpus, max_n=arguments.max_n, top=arguments.top, memory_bytes=memory_bytes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
