"""Attention over paged keys and values on CUDA: prompts and single tokens in one launch, exact lengths.

Triton twin of `paged_attention.paged_attention_reference`. A tile is up to `queries_per_tile` neighbouring
queries of one sequence; a program takes a tile and a head of the keys, with all heads of the queries that
share it, and walks the tile's context through its block table (the online softmax of FlashAttention, arXiv
2205.14135). Where few tiles would leave the device idle, a context is split among programs and the parts are
put together afterwards (Flash-Decoding). Sums are float32; nothing depends on the host but the tensors'
addresses, so that a CUDA graph may hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.paged_attention import PagedBatch

KEYS_PER_ROUND = 64
TILE_ROWS = 64
"""Queries times heads that share keys, of a tile of a prompt."""

FEWEST_ROWS = 16
"""Of a tensor core's matrix; what a tile of one query is filled up to."""

MOST_SPLITS = 16
PROGRAMS_WANTED = 264
"""Two for each multiprocessor of an H100."""


# Else compiled anew for 1, for multiples of 16 and for other numbers and addresses.
@triton.jit(
    do_not_specialize=["num_tokens", "tile_stride"],
    do_not_specialize_on_alignment=["highest", "total", "positions", "tiles", "block_tables"],
)
def attention_kernel(
    q,  # (num_tokens, any): heads of a token side by side, q_stride apart
    k_cache,  # (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    v_cache,
    out,  # (num_tokens, num_heads, HEAD_DIM); if IS_SPLIT float32 (splits, num_tokens, num_heads, HEAD_DIM)
    highest,  # float32 (splits, num_tokens, num_heads), used if IS_SPLIT
    total,
    positions,  # int32*: (num_tokens,)
    tiles,  # int32*: (3, num_tiles): sequence, first query, number of queries
    block_tables,  # int32*: (num_seqs, any)
    q_stride,
    tile_stride,
    table_stride,
    num_tokens,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries to one of keys
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tl.load(tiles + tile)
    begin = tl.load(tiles + tile_stride + tile)
    count = tl.load(tiles + 2 * tile_stride + tile)
    first = tl.load(positions + begin)
    context = tl.where(count > 0, first + count, 0)

    row = tl.arange(0, ROWS)
    query, member = row // GROUP_PADDED, row % GROUP_PADDED
    is_row = (query < count) & (member < GROUP)
    head = kv_head * GROUP + member
    column = tl.arange(0, DIM_PADDED)
    is_column = column < HEAD_DIM
    token = (begin + query).to(tl.int64)
    queries = tl.load(
        q + token[:, None] * q_stride + head[:, None] * HEAD_DIM + column[None, :],
        mask=is_row[:, None] & is_column[None, :],
        other=0.0,
    )

    rounds = (context + KEYS - 1) // KEYS
    splits = tl.num_programs(2)
    per_split = ((rounds + splits - 1) // splits) * KEYS
    start = split * per_split
    end = tl.minimum(context, start + per_split)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.zeros((ROWS, DIM_PADDED), tl.float32)
    for key in range(start, end, KEYS):
        at = key + tl.arange(0, KEYS)
        is_key = at < end
        block = tl.load(
            block_tables + seq.to(tl.int64) * table_stride + at // BLOCK_SIZE, mask=is_key, other=0
        )
        place = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        offsets = place[:, None] * HEAD_DIM + column[None, :]
        mask = is_key[:, None] & is_column[None, :]
        keys = tl.load(k_cache + offsets, mask=mask, other=0.0)
        values = tl.load(v_cache + offsets, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        visible = (at[None, :] <= (first + query)[:, None]) & is_key[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
        weights = tl.exp(scores - m_used[:, None])
        decay = tl.exp(m - m_used)
        s = s * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        m = m_new

    num_heads = NUM_KV_HEADS * GROUP
    target = (split.to(tl.int64) * num_tokens + token) * num_heads + head
    mask = is_row[:, None] & is_column[None, :]
    if not IS_SPLIT:
        acc = acc / tl.where(s > 0, s, 1.0)[:, None]
    else:
        tl.store(highest + target, m, mask=is_row)
        tl.store(total + target, s, mask=is_row)
    tl.store(out + target[:, None] * HEAD_DIM + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_splits"], do_not_specialize_on_alignment=["highest", "total"])
def combine_kernel(
    parts,  # float32 (num_splits, num_rows, HEAD_DIM), num_rows = num_tokens * num_heads
    highest,  # float32 (num_splits, num_rows)
    total,
    out,  # (num_rows, HEAD_DIM)
    num_rows,
    num_splits,
    SPLITS: tl.constexpr,  # num_splits at most
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, DIM_PADDED)
    is_split = split < num_splits
    m = tl.load(highest + split * num_rows + row, mask=is_split, other=float("-inf"))
    s = tl.load(total + split * num_rows + row, mask=is_split, other=0.0)
    m_all = tl.max(m, 0)
    weights = tl.exp(m - tl.where(m_all == float("-inf"), 0.0, m_all))
    s_all = tl.sum(weights * s, 0)
    offsets = (split * num_rows + row)[:, None] * HEAD_DIM + column[None, :]
    acc = tl.load(parts + offsets, mask=is_split[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    merged = tl.sum(acc * weights[:, None], 0) / tl.where(s_all > 0, s_all, 1.0)
    tl.store(out + row * HEAD_DIM + column, merged.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def queries_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """Neighbouring queries that one program can take."""
    heads_together: int = triton.next_power_of_2(num_heads // num_kv_heads)
    return max(1, TILE_ROWS // heads_together)


def splits_for(num_tiles: int, num_kv_heads: int) -> int:
    """Programs that share a context: a power of two, more of them the fewer tiles there are."""
    splits = 1
    while 2 * splits * num_tiles * num_kv_heads <= PROGRAMS_WANTED and splits < MOST_SPLITS:
        splits *= 2
    return splits


def num_stages(row_bytes: int) -> int:
    """Rounds of keys and values of so many bytes a row that are loaded ahead within shared memory."""
    return 3 if row_bytes <= 128 else 2 if row_bytes <= 256 else 1


def paged_attention(
    q: Tensor,
    positions: Tensor,
    batch: PagedBatch,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
) -> None:
    """Writes the causal attention of q (num_tokens, num_heads, head_dim) to `out`, contiguous, same shape.

    Args:
        q: heads of a token side by side; tokens may lie further apart.
        positions: (num_tokens,) int32.
        batch: with tiles; one of no queries is passed over, and its rows of `out` are undefined. Where
            each has one query, contexts may be split.
        k_cache, v_cache: of one layer, this step's keys and values stored.
    """
    assert batch.tiles is not None
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    num_tiles = batch.tiles.shape[1]
    splits = splits_for(num_tiles, num_kv_heads) if batch.one_query_a_tile else 1
    group_padded = triton.next_power_of_2(group)
    rows = max(FEWEST_ROWS if batch.one_query_a_tile else TILE_ROWS, group_padded)
    dim_padded = triton.next_power_of_2(head_dim)
    shape = (splits, num_tokens, num_heads)
    highest, total, parts = positions, positions, out  # two that are not written
    if splits > 1:
        highest, total = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
        parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
    attention_kernel[(num_tiles, num_kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        parts,
        highest,
        total,
        positions,
        batch.tiles,
        batch.block_tables,
        q.stride(0),
        batch.tiles.stride(0),
        batch.block_tables.stride(0),
        num_tokens,
        head_dim**-0.5,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=group_padded,
        ROWS=rows,
        KEYS=KEYS_PER_ROUND,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIM_PADDED=dim_padded,
        IS_SPLIT=splits > 1,
        num_stages=num_stages(dim_padded * q.element_size()),
    )
    if splits > 1:
        combine_kernel[(num_tokens * num_heads,)](
            parts,
            highest,
            total,
            out,
            num_tokens * num_heads,
            splits,
            SPLITS=MOST_SPLITS,
            HEAD_DIM=head_dim,
            DIM_PADDED=dim_padded,
        )
