"""Would it pay to read ahead the rows of stored continuations of the newest tokens?

An f-gram that ends at the next token often begins with the f-grams that end at this one. So before the next
token is known, the rows of the most frequent continuations of all stored suffixes could be read. This counts,
on text that was held out, how many of the rows that come next would then be there, and how many would have
been read for nothing. Measured once and not built: docs/lookup.md has the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.cache.fgram_table import FGramTable
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_writer import FGRAMS_NAME
from scone.model_store.token_corpus import TokenCorpus

I64 = NDArray[np.int64]
CONTINUATIONS = (1, 2, 4, 8, 16, 64)
BATCHES = (1, 8, 32)
_SHORTEST_CONTEXT = 2
"""A single token has hundreds of continuations; their rows would be read for nothing but a few."""


def benchmark_continuations(table: Path, heldout: TokenCorpus, *, num_tokens: int) -> dict[str, Any]:
    """Coverage and cost of reading ahead the first m continuations of every context, for several m.

    Args:
        table: a table on disk; `heldout`: text to follow, of which `num_tokens` are taken.

    Returns:
        For each m: `rows_covered` (share of the rows wanted next), `rows_read_per_token`,
        `rows_read_per_row_covered`, and the share of decode steps of so many sequences that would find all of
        their rows.
    """
    fgrams = FGramSet.load(table / FGRAMS_NAME)
    tokens = heldout.tokens[:num_tokens].astype(np.int64)
    with FGramTable.open(table) as opened:
        row_ids, _ = opened.match(tokens)
        contexts = _contexts(opened, fgrams)
        num_continuations = np.bincount(contexts[contexts >= 0], minlength=len(fgrams))
        fan_outs = _fan_outs(opened, tokens, num_continuations)
    ranks = _ranks(contexts)
    matched = row_ids >= 0
    result: dict[str, Any] = {"num_tokens": len(tokens), "matched_share": round(float(matched.mean()), 3)}
    for most in CONTINUATIONS:
        covered = np.zeros(len(tokens), np.bool_)
        covered[matched] = (contexts[row_ids[matched]] >= 0) & (ranks[row_ids[matched]] < most)
        num_read = sum(int(np.minimum(fan_out, most).sum()) for fan_out in fan_outs)
        result[f"first_{most}"] = {
            "rows_covered": round(float(covered.sum() / matched.sum()), 3),
            "rows_read_per_token": round(num_read / len(tokens), 2),
            "rows_read_per_row_covered": round(num_read / max(1, int(covered.sum())), 1),
        } | {f"steps_of_{batch}_covered": _covered_steps(~matched | covered, batch) for batch in BATCHES}
    return result


def _contexts(table: FGramTable, fgrams: FGramSet) -> I64:
    """For each f-gram the row of its context, the f-gram without its last token; -1 if that is one token."""
    contexts = np.full(len(fgrams), -1, np.int64)
    for length in range(_SHORTEST_CONTEXT + 1, fgrams.max_n + 1):
        its = np.flatnonzero(fgrams.lengths == length)
        if len(its):
            windows = np.ascontiguousarray(fgrams.tokens[its, : length - 1])
            contexts[its] = table.match_last(windows)[0]
    return contexts


def _ranks(contexts: I64) -> I64:
    """The place of each f-gram among those of its context; rows lie by falling count, so the first is 0."""
    order = np.argsort(contexts, kind="stable")
    begins = np.flatnonzero(np.diff(contexts[order], prepend=-2))
    sizes = np.diff(np.append(begins, len(order)))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(begins, sizes)
    return ranks


def _fan_outs(table: FGramTable, tokens: I64, num_continuations: I64) -> list[I64]:
    """For each length of context, how many continuations those have that end at a position."""
    fan_outs = []
    for length in range(_SHORTEST_CONTEXT, table.max_n):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, length)
        row_ids, lengths = table.match_last(windows)
        fan_outs.append(num_continuations[row_ids[lengths == length]])
    return fan_outs


def _covered_steps(covered: NDArray[np.bool_], batch: int) -> float:
    """The share of steps in which nobody waits, of sequences that are anywhere in the text."""
    places = np.random.default_rng(0).integers(0, len(covered), (10_000, batch))
    return round(float(covered[places].all(axis=1).mean()), 4)
