"""Longest f-gram match: which stored f-gram, if any, ends at each token.

`Matcher` runs natively (native/match.cpp) or, without the extension, on `match_reference`, its oracle: same
results bit for bit. Knows the bucket index, not the files around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.kernels import fgram_hash
from scone.kernels.errors import DamagedDataError
from scone.kernels.extension import native
from scone.kernels.row_target import IdTarget

MAX_N = 16
"""The longest f-gram the kernels look for; the paper uses 5."""

_NO_FAULT = -1
_PAGE_FAULT = -2
FAULTS = -3
"""Where a native function returns a number of rows: FAULTS - fault, if there is one."""
_ENDS = np.zeros(2, np.int64)

Matches = tuple[NDArray[np.int64], NDArray[np.int8]]
"""Row ids (-1 where nothing matched) and matched lengths (1 where nothing matched)."""


@dataclass(frozen=True, eq=False)
class BucketIndex:
    """The index as it lies in memory.

    Attributes:
        buckets: (num_buckets,) of fgram_hash.BUCKET_DTYPE; must outlive its matchers.
        closed: the (n-1)-token prefix and suffix of every f-gram are stored too, so that nothing is looked
            for where one of them is absent.
    """

    buckets: NDArray[np.void]
    num_home_buckets: int
    seed: int
    fp_bits: int
    max_n: int
    closed: bool


class Matcher:
    """Longest matches against one index. Thread-safe; the native one releases the GIL.

    Attributes:
        index: what is searched.
        native: what the native functions take; None without the extension.

    Args:
        num_matched: (MAX_N + 1,) int64, to which the positions matched are added by matched length; matchers
            may share it.
    """

    def __init__(self, index: BucketIndex, num_matched: NDArray[np.int64] | None = None) -> None:
        self._num_matched = np.zeros(MAX_N + 1, np.int64) if num_matched is None else num_matched
        self.index = index
        self.native: Any = None
        if native is not None:
            self.native = native.Matcher(
                index.buckets.view(np.uint8).reshape(-1),
                index.num_home_buckets,
                len(index.buckets),
                *fgram_hash.lane_seeds(index.seed),
                index.fp_bits,
                index.max_n,
                index.closed,
                self._num_matched,
            )

    def match(self, tokens: NDArray[Any], starts: NDArray[np.int64] | None = None) -> Matches:
        """Matches every position of one or several sequences.

        Args:
            tokens: (n,) int32 or int64; a negative token ends every f-gram that would reach across it.
            starts: (num_sequences + 1,) int64, where each sequence begins, then n; None: one sequence.

        Raises:
            DamagedDataError: a bucket does not fit its check bits or cannot be read.
        """
        rows = np.empty(len(tokens), np.int64)
        lengths = np.empty(len(tokens), np.int8)
        if starts is None:
            starts = np.array((0, len(tokens)), np.int64)
        if self.native is None:
            return self._counted(match_reference(self.index, tokens, starts))
        raise_fault(self.native.match(np.ascontiguousarray(tokens), starts, rows, lengths))
        return rows, lengths

    def match_last(self, windows: NDArray[Any]) -> Matches:
        """Matches the last position of each window.

        Args:
            windows: (batch, width) int32 or int64, newest token last, padded with -1 on the left.

        Raises:
            DamagedDataError: a bucket does not fit its check bits or cannot be read.
        """
        batch, width = windows.shape
        if self.native is None:
            starts = np.arange(batch + 1, dtype=np.int64) * width
            all_rows, all_lengths = match_reference(
                self.index, windows.reshape(-1), starts, consecutive=False
            )
            return self._counted((all_rows[width - 1 :: width], all_lengths[width - 1 :: width]))
        rows = np.empty(batch, np.int64)
        lengths = np.empty(batch, np.int8)
        fault = self.native.match_last(windows, rows, lengths)
        if fault != _NO_FAULT:
            raise_fault(fault)
        return rows, lengths

    def match_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        out: IdTarget,
    ) -> int:
        """Appends the row id at the last position of each sequence of token ids to its list of row ids.

        Args:
            out: takes the ids that are not -1, and whose they are.

        Returns:
            How many are not -1.

        Raises:
            DamagedDataError: a bucket does not fit its check bits or cannot be read; nothing was appended.
        """
        if self.native is None:
            width = self.index.max_n
            windows = [[-1] * (width - len(tokens)) + tokens[-width:] for tokens in sequences]
            found = self.match_last(np.array(windows, np.int64).reshape(len(sequences), width))[0]
            for row_id, its_row_ids in zip(found.tolist(), row_ids, strict=True):
                its_row_ids.append(row_id)
            where = np.flatnonzero(found >= 0)
            out.row_ids[: len(where)], out.places[: len(where)] = found[where], where
            return len(where)
        assert native is not None
        num_wanted: int = native.match_newest(self.native, sequences, row_ids, out.native)
        if num_wanted < 0:
            raise_fault(FAULTS - num_wanted)
        return num_wanted

    def _counted(self, matches: Matches) -> Matches:
        self._num_matched += np.bincount(matches[1], minlength=MAX_N + 1)
        return matches


def match_reference(
    index: BucketIndex, tokens: NDArray[Any], starts: NDArray[np.int64], *, consecutive: bool = True
) -> Matches:
    """The oracle of Matcher.match, length by length for all positions at once.

    In a closed set a position goes on to n only if an f-gram of n - 1 tokens ends there and, if `consecutive`
    (not in match_last), another one token earlier. That changes a result only where fingerprints collide.
    """
    num_tokens = len(tokens)
    rows = np.full(num_tokens, -1, np.int64)
    lengths = np.ones(num_tokens, np.int8)
    first = np.repeat(starts[:-1], np.diff(starts))
    positions = np.arange(num_tokens)
    tokens = tokens.astype(np.int64)
    seed_a, seed_b = fgram_hash.lane_seeds(index.seed)
    lane_a = np.full(num_tokens, seed_a, np.uint64)
    lane_b = np.full(num_tokens, seed_b, np.uint64)
    reaches = np.ones(num_tokens, bool)
    for n in range(1, index.max_n + 1):
        at = np.maximum(positions - (n - 1), 0)
        reaches &= (positions - (n - 1) >= first) & (tokens[at] >= 0) & (tokens[at] < 1 << 31)
        if n > 2 and index.closed:
            reaches &= lengths == n - 1
            if consecutive:
                reaches &= np.roll(lengths, 1) >= n - 1
        token = np.where(reaches, tokens[at], 0)
        lane_a = fgram_hash.extend(lane_a, token, fgram_hash.MULTIPLIER_A)
        lane_b = fgram_hash.extend(lane_b, token, fgram_hash.MULTIPLIER_B)
        if n >= 2:
            found = find_reference(index, lane_a[reaches], lane_b[reaches])
            longer = positions[reaches][found >= 0]
            rows[longer] = found[found >= 0]
            lengths[longer] = n
    return rows, lengths


def find_reference(
    index: BucketIndex, lane_a: NDArray[np.uint64], lane_b: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Row ids of the hashed f-grams, -1 where absent; raises DamagedDataError."""
    found = np.full(len(lane_a), -1, np.int64)
    fingerprints = fgram_hash.fingerprints(lane_b, index.fp_bits)
    bucket_ids = fgram_hash.home_buckets(lane_a, index.num_home_buckets)
    searching = np.arange(len(lane_a))
    while len(searching):
        wanted = bucket_ids[searching]
        if np.any(wanted >= len(index.buckets)):
            raise_fault(int(wanted.max()))
        buckets = index.buckets[wanted]
        damaged = fgram_hash.bucket_checks(buckets) != buckets["meta"] >> 8
        if np.any(damaged):
            raise_fault(int(wanted[damaged][0]))
        hits = (buckets["fingerprint"] == fingerprints[searching, None]) & (
            buckets["row"] != fgram_hash.EMPTY_ROW
        )
        hit = hits.any(axis=1)
        found[searching[hit]] = buckets["row"][hit, hits[hit].argmax(axis=1)]
        further = ~hit & fgram_hash.passes(buckets, fingerprints[searching])
        searching = searching[further]
        bucket_ids[searching] += 1
    return found


def raise_fault(fault: int) -> None:
    """Raises DamagedDataError for what a native matcher returned, unless that is no fault."""
    if fault == _PAGE_FAULT:
        raise DamagedDataError("the index cannot be read: its file was truncated or the disk failed")
    if fault >= 0:
        raise DamagedDataError(f"bucket {fault} of the index is damaged: it does not fit its check bits")
