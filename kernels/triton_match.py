"""Longest match and gather on CUDA in one kernel: hash every suffix, probe the buckets, keep the longest
match, fetch its row from wherever it lies, host memory that the device can read included.

Triton twin of kernels/match.py, equal to it bit for bit. Tested in Triton's interpreter and compiled for
sm_80, sm_90 and sm_100, and by `make test-cuda` on a GPU; not used by the server, which matches on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

DAMAGED_ROW = -2
"""Row id where a bucket did not fit its check bits."""

_WORDS = tl.constexpr(8)  # 64-bit words of a bucket
_SLOTS = tl.constexpr(5)
_ROWS_AT = tl.constexpr(10)  # the first row id, in 32-bit words
_META_AT = tl.constexpr(15)
_EMPTY = tl.constexpr(0xFFFFFFFF)
_PASSED = tl.constexpr(1)
_MULTIPLIER_A = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_B = tl.constexpr(0xD6E8FEB86659FD93)
_CHECKS = tl.constexpr(
    (
        0xA24BAED4963EE407,
        0x9FB21C651E98DF25,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD1B54A32D192ED03,
        0xAEF17502108EF2D9,
        0xF1357AEA2E62A9C5,
        0x8CB92BA72F3D8DD7,
    )
)


@triton.jit
def extend(state, token, MULTIPLIER: tl.constexpr):
    """One token further back; see kernels/fgram_hash.py."""
    x = (state ^ (token.to(tl.uint64) + 1)) * tl.full((1,), MULTIPLIER, tl.uint64)
    return x ^ (x >> 32)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def find(words, bucket, fingerprint, searching):
    """Row ids (n,) of hashed f-grams: -1 where absent, -2 where a bucket is damaged."""
    found = tl.full(bucket.shape, -1, tl.int64)
    halves = words.to(tl.pointer_type(tl.uint32))
    while tl.reduce(searching.to(tl.int32), 0, either) != 0:
        total = tl.full(bucket.shape, 0, tl.uint64)
        for i in tl.static_range(_WORDS):
            word = tl.load(words + bucket * _WORDS + i, mask=searching, other=0)
            if i == _WORDS - 1:
                word = word & 0x000000FFFFFFFFFF
            total += word * tl.full((1,), _CHECKS[i], tl.uint64)
        meta = tl.load(halves + bucket * (2 * _WORDS) + _META_AT, mask=searching, other=0)
        damaged = searching & ((total >> 40).to(tl.uint32) != (meta >> 8))
        hit = damaged
        found = tl.where(damaged, -2, found)
        for i in tl.static_range(_SLOTS):
            stored = tl.load(words + bucket * _WORDS + i, mask=searching, other=0)
            row = tl.load(halves + bucket * (2 * _WORDS) + _ROWS_AT + i, mask=searching, other=_EMPTY)
            here = searching & (hit == 0) & (stored == fingerprint) & (row != _EMPTY)
            found = tl.where(here, row.to(tl.int64), found)
            hit = hit | here
        flags = meta & 0xFF
        pass_flag = tl.full(bucket.shape, 2, tl.uint32) << tl.minimum(fingerprint & 7, 6).to(tl.uint32)
        searching = searching & (hit == 0) & (((flags & pass_flag) != 0) | (flags == _PASSED))
        bucket += 1
    return found


@triton.jit
def match_gather_kernel(
    tokens,  # int64*: sequences end to end
    firsts,  # int64*: (n,) where the sequence of each position begins
    lasts,  # int64*: (n,) the positions to match, as places in `tokens`
    words,  # uint64*: the index's buckets
    seeds,  # uint64*: (2,) start states of the lanes
    num_home_buckets,  # uint64
    rows_address,  # int64: the rows, end to end, 2 bytes a value
    out_row_ids,  # int64*: (n,)
    out_lengths,  # int8*: (n,)
    out,  # uint16*: (n, DIM); untouched where nothing matched
    num_positions,
    FP_SHIFT: tl.constexpr,
    MAX_N: tl.constexpr,
    CLOSED: tl.constexpr,  # whether the suffix of every f-gram is stored too
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_positions
    first = tl.load(firsts + i, mask=inside, other=0)
    last = tl.load(lasts + i, mask=inside, other=0)
    lane_a = tl.full((BLOCK,), 0, tl.uint64) + tl.load(seeds)
    lane_b = tl.full((BLOCK,), 0, tl.uint64) + tl.load(seeds + 1)
    row_id = tl.full((BLOCK,), -1, tl.int64)
    length = tl.full((BLOCK,), 1, tl.int32)
    reaches = inside
    for n in tl.static_range(1, MAX_N + 1):
        at = last - (n - 1)
        reaches = reaches & (at >= first)
        token = tl.load(tokens + at, mask=reaches, other=-1)
        reaches = reaches & (token >= 0) & (token < 0x80000000)
        lane_a = extend(lane_a, token, _MULTIPLIER_A)
        lane_b = extend(lane_b, token, _MULTIPLIER_B)
        if n >= 2:
            bucket = ((lane_a >> 32) * num_home_buckets.to(tl.uint64)) >> 32
            found = find(words, bucket.to(tl.int64), lane_b >> FP_SHIFT, reaches)
            row_id = tl.where((found != -1) & (row_id != -2), found, row_id)
            length = tl.where(found >= 0, n, length)
            if CLOSED:
                reaches = reaches & (found >= 0)
    tl.store(out_row_ids + i, row_id, mask=inside)
    tl.store(out_lengths + i, length.to(tl.int8), mask=inside)
    rows = rows_address.to(tl.pointer_type(tl.uint16))
    for begin in range(0, DIM, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        wanted = (row_id >= 0)[:, None] & (column < DIM)[None, :]
        values = tl.load(rows + row_id[:, None] * DIM + column[None, :], mask=wanted, other=0)
        tl.store(out + i[:, None] * DIM + column[None, :], values, mask=wanted)
