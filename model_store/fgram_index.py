"""Builds the bucket index `index.bin`: from an f-gram's hash to its row, one cache line per look-up.

Memory stays bounded however large the set is: the buckets are made stretch by stretch, each from one more
pass over the f-grams. Knows no rows. Format: FORMAT.md, "index.bin".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from scone.kernels import fgram_hash
from scone.kernels.fgram_hash import BUCKET_DTYPE, EMPTY_ROW, FLAG_PASSED, SLOTS_PER_BUCKET
from scone.kernels.match import MAX_N
from scone.model_store.errors import TableError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_header import HEADER_BYTES, INDEX_MAGIC, TableHeader

MAX_ROWS = EMPTY_ROW
"""Rows are 32 bits wide in the index, and the last value marks an empty slot."""

KEYS_PER_HOME_BUCKET = 4
"""Load 0.8: a key takes 16 bytes, and the search for an absent f-gram 1.3 cache lines."""

_MAX_SEEDS = 64
_KEYS_PER_STRETCH = 8 << 20
_KEYS_PER_SCAN = 1 << 20


@dataclass(frozen=True, slots=True)
class IndexShape:
    """What the builder had to choose: see TableManifest."""

    hash_seed: int
    num_home_buckets: int
    num_buckets: int


@dataclass(frozen=True, slots=True)
class _Keys:
    """Placed keys, sorted by slot."""

    home: NDArray[np.int64]
    slot: NDArray[np.int64]
    fingerprint: NDArray[np.uint64]
    row: NDArray[np.uint32]

    def select(self, chosen: NDArray[np.bool_]) -> _Keys:
        return _Keys(self.home[chosen], self.slot[chosen], self.fingerprint[chosen], self.row[chosen])


class _Collision(Exception):
    """Two f-grams that the index could not tell apart under this seed."""


def check_indexable(fgrams: FGramSet) -> None:
    """Raises TableError if no index can hold the set."""
    if not len(fgrams):
        raise TableError("the f-gram set is empty: count a larger corpus, or lower --min-count")
    if len(fgrams) > MAX_ROWS:
        raise TableError(
            f"the f-gram set holds {len(fgrams)} f-grams, an index at most {MAX_ROWS}: lower --top"
        )
    if fgrams.max_n > MAX_N:
        raise TableError(
            f"the f-gram set has f-grams of up to {fgrams.max_n} tokens, an index at most {MAX_N}"
        )


def build_index(fgrams: FGramSet, path: Path, table_id: str, fp_bits: int = 64) -> IndexShape:
    """Writes index.bin; the f-gram of rank r leads to row r. Same set, same bytes.

    Raises:
        TableError: the set cannot be indexed.
    """
    check_indexable(fgrams)
    num_home_buckets = -(-len(fgrams) // KEYS_PER_HOME_BUCKET)
    for seed in range(_MAX_SEEDS):
        try:
            with open(path, "wb") as file:
                file.write(bytes(HEADER_BYTES))
                num_buckets = _write_buckets(file, fgrams, num_home_buckets, seed, fp_bits)
                numbers = (num_home_buckets, num_buckets, seed, fp_bits, len(fgrams))
                file.seek(0)
                file.write(TableHeader(INDEX_MAGIC, table_id, numbers).to_bytes())
            return IndexShape(seed, num_home_buckets, num_buckets)
        except _Collision:
            continue
    raise TableError(
        f"two f-grams share a fingerprint of {fp_bits} bits under each of {_MAX_SEEDS} seeds:"
        " raise fp_bits (64 never fails), or the set holds an f-gram twice"
    )


def _write_buckets(file: BinaryIO, fgrams: FGramSet, num_home_buckets: int, seed: int, fp_bits: int) -> int:
    """Writes all buckets in order and returns their number; raises _Collision."""
    num_stretches = -(-len(fgrams) // _KEYS_PER_STRETCH)
    borders = [num_home_buckets * i // num_stretches for i in range(num_stretches + 1)]
    carried = _no_keys()
    for begin, end in pairwise(borders):
        own = _keys_at_home(fgrams, begin, end, num_home_buckets, seed, fp_bits)
        keys = _join(carried, _place(own, first_slot=_next_slot(carried, begin)))
        _check_distinct(keys)
        file.write(_fill(keys, begin, end).tobytes())
        carried = keys.select(keys.slot // SLOTS_PER_BUCKET >= end)
    # What did not fit lies beyond the last home bucket, so that a search never wraps around.
    num_buckets = max(
        num_home_buckets, _next_slot(carried, 0) // SLOTS_PER_BUCKET + 1 if len(carried.row) else 0
    )
    file.write(_fill(carried, num_home_buckets, num_buckets).tobytes())
    return num_buckets


def _keys_at_home(
    fgrams: FGramSet, begin: int, end: int, num_home_buckets: int, seed: int, fp_bits: int
) -> _Keys:
    """The keys whose search begins in buckets [begin, end), by home and then by row; not yet placed."""
    found = list(_scan(fgrams, begin, end, num_home_buckets, seed, fp_bits))
    home = np.concatenate([part[0] for part in found])
    order = np.argsort(home, kind="stable")
    fingerprint = np.concatenate([part[1] for part in found])[order]
    row = np.concatenate([part[2] for part in found])[order]
    return _Keys(home[order], np.empty(0, np.int64), fingerprint, row)


def _scan(
    fgrams: FGramSet, begin: int, end: int, num_home_buckets: int, seed: int, fp_bits: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint32]]]:
    for first in range(0, len(fgrams), _KEYS_PER_SCAN):
        part = slice(first, first + _KEYS_PER_SCAN)
        lane_a, lane_b = fgram_hash.hash_fgrams(fgrams.tokens[part], fgrams.lengths[part], seed)
        home = fgram_hash.home_buckets(lane_a, num_home_buckets)
        mine = (home >= begin) & (home < end)
        rows = np.arange(first, first + len(home), dtype=np.uint32)[mine]
        yield home[mine], fgram_hash.fingerprints(lane_b[mine], fp_bits), rows


def _place(keys: _Keys, first_slot: int) -> _Keys:
    """Gives each key, sorted by home, the first free slot at or after its home bucket's first."""
    order = np.arange(len(keys.home))
    earliest = keys.home * SLOTS_PER_BUCKET - order
    if len(earliest):
        earliest[0] = max(int(earliest[0]), first_slot)
    return _Keys(keys.home, np.maximum.accumulate(earliest) + order, keys.fingerprint, keys.row)


def _check_distinct(keys: _Keys) -> None:
    """Raises _Collision if a search for one key would meet another with the same fingerprint first."""
    bucket = keys.slot // SLOTS_PER_BUCKET
    order = np.lexsort((keys.slot, keys.fingerprint))
    earlier, later = order[:-1], order[1:]
    same = keys.fingerprint[earlier] == keys.fingerprint[later]
    if np.any(same & (keys.home[later] <= bucket[earlier])):
        raise _Collision


def _fill(keys: _Keys, begin: int, end: int) -> NDArray[np.void]:
    """Buckets [begin, end) with those of `keys` that lie in them."""
    buckets = np.zeros(end - begin, BUCKET_DTYPE)
    buckets["row"] = EMPTY_ROW
    bucket = keys.slot // SLOTS_PER_BUCKET
    here = bucket < end
    at = (bucket[here] - begin, keys.slot[here] % SLOTS_PER_BUCKET)
    buckets["fingerprint"][at] = keys.fingerprint[here]
    buckets["row"][at] = keys.row[here]
    buckets["meta"] = _flags(keys.select(bucket > keys.home), begin, end)
    buckets["meta"] |= fgram_hash.bucket_checks(buckets) << 8
    return buckets


def _flags(moved: _Keys, begin: int, end: int) -> NDArray[np.uint32]:
    """Of buckets [begin, end), passed by those of the keys with home <= bucket < place."""
    flags = np.zeros(end - begin, np.uint32)
    pass_flags = fgram_hash.pass_flags(moved.fingerprint)
    for flag in np.unique(pass_flags):
        passing = moved.select(pass_flags == flag)
        # +1 where such a span begins, -1 where it ends
        spans = np.zeros(end - begin + 1, np.int64)
        np.add.at(spans, np.clip(passing.home - begin, 0, None), 1)
        np.add.at(spans, np.minimum(passing.slot // SLOTS_PER_BUCKET, end) - begin, -1)
        flags[np.cumsum(spans[:-1]) > 0] |= flag | FLAG_PASSED
    return flags


def _next_slot(keys: _Keys, default_bucket: int) -> int:
    return int(keys.slot[-1]) + 1 if len(keys.slot) else default_bucket * SLOTS_PER_BUCKET


def _no_keys() -> _Keys:
    return _Keys(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint32))


def _join(first: _Keys, second: _Keys) -> _Keys:
    return _Keys(
        np.concatenate((first.home, second.home)),
        np.concatenate((first.slot, second.slot)),
        np.concatenate((first.fingerprint, second.fingerprint)),
        np.concatenate((first.row, second.row)),
    )
