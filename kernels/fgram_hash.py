"""Suffix hashes and buckets of the f-gram index: the arithmetic, in NumPy, that every matcher shares.

An f-gram is hashed from its newest token backwards, so that all suffixes of a history come out of one walk.
Two independent 64-bit lanes: lane A says where an f-gram lies, lane B is its fingerprint. With one lane for
both, an absent f-gram would be taken for a stored one with probability num_fgrams * 2**-64 instead of about
6 * 2**-64. Native twin: native/fgram_hash.hpp. Layout: model_store/FORMAT.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MULTIPLIER_A = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_B = np.uint64(0xD6E8FEB86659FD93)
CHECK_MULTIPLIERS = np.array(
    [
        0xA24BAED4963EE407,
        0x9FB21C651E98DF25,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD1B54A32D192ED03,
        0xAEF17502108EF2D9,
        0xF1357AEA2E62A9C5,
        0x8CB92BA72F3D8DD7,
    ],
    np.uint64,
)

SLOTS_PER_BUCKET = 5
EMPTY_ROW = 0xFFFFFFFF
FLAG_PASSED = 1

BUCKET_DTYPE = np.dtype([("fingerprint", "<u8", 5), ("row", "<u4", 5), ("meta", "<u4")])
"""One bucket of index.bin, 64 bytes; `meta` is check << 8 | flags."""

U64 = NDArray[np.uint64]


def lane_seeds(seed: int) -> tuple[int, int]:
    """The start states of both lanes (splitmix64 of the seed)."""
    return _splitmix64(seed), _splitmix64(seed + 0x5C0E)


def extend(state: U64, tokens: NDArray[np.integer], multiplier: np.uint64) -> U64:
    """Takes each state one token further back; tokens are non-negative."""
    x: U64 = (state ^ (tokens.astype(np.uint64) + np.uint64(1))) * multiplier
    return x ^ (x >> np.uint64(32))


def hash_fgrams(tokens: NDArray[np.int32], lengths: NDArray[np.uint8], seed: int) -> tuple[U64, U64]:
    """(n, max_n) left-aligned f-grams -> lanes A and B, uint64 (n,) each."""
    seed_a, seed_b = lane_seeds(seed)
    lane_a = np.full(len(lengths), seed_a, np.uint64)
    lane_b = np.full(len(lengths), seed_b, np.uint64)
    rows = np.arange(len(lengths))
    for back in range(tokens.shape[1]):
        # the token `back` places before the newest, for f-grams long enough to have one
        alive = rows[lengths > back]
        token = tokens[alive, lengths[alive].astype(np.int64) - 1 - back]
        lane_a[alive] = extend(lane_a[alive], token, MULTIPLIER_A)
        lane_b[alive] = extend(lane_b[alive], token, MULTIPLIER_B)
    return lane_a, lane_b


def home_buckets(lane_a: U64, num_home_buckets: int) -> NDArray[np.int64]:
    """The bucket where the search for each f-gram begins."""
    product: U64 = (lane_a >> np.uint64(32)) * np.uint64(num_home_buckets)
    return (product >> np.uint64(32)).astype(np.int64)


def fingerprints(lane_b: U64, fp_bits: int) -> U64:
    """The top `fp_bits` of lane B."""
    return lane_b >> np.uint64(64 - fp_bits)


def pass_flags(fingerprints: U64) -> NDArray[np.uint32]:
    """(n,): the flag that each key sets, besides FLAG_PASSED, in the buckets that its search passes."""
    flags: NDArray[np.uint32] = np.uint32(2) << np.minimum(fingerprints & np.uint64(7), 6).astype(np.uint32)
    return flags


def passes(buckets: NDArray[np.void], fingerprints: U64) -> NDArray[np.bool_]:
    """Whether the search for each fingerprint may have to go on after its bucket, (n,) of BUCKET_DTYPE.

    Tables written before 2026-11-26 have no flag but FLAG_PASSED.
    """
    flags = buckets["meta"] & 0xFF
    further: NDArray[np.bool_] = (flags & pass_flags(fingerprints) != 0) | (flags == FLAG_PASSED)
    return further


def bucket_checks(buckets: NDArray[np.void]) -> NDArray[np.uint32]:
    """24 bits for each bucket of BUCKET_DTYPE, over everything in it but themselves."""
    words = np.ascontiguousarray(buckets).view("<u8").reshape(-1, 8).copy()
    words[:, 7] &= np.uint64(0x000000FF_FFFFFFFF)
    total: U64 = (words * CHECK_MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    return (total >> np.uint64(40)).astype(np.uint32)


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
