"""Attention over keys and values that lie in blocks scattered over a cache.

The torch oracle; it runs on any device. Cache layout, for one layer:
(num_blocks, num_kv_heads, block_size, head_dim), so that the keys of one head in one block are one
contiguous run. A token's slot is `block_id * block_size + place in the block`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the queries of one step belong and which keys each may see.

    Sequence s owns queries `query_starts[s] : query_starts[s + 1]`, which are the last ones of its
    `context_lens[s]` tokens; its keys lie in the blocks `block_tables[s]`, in order.

    Attributes:
        query_starts: (num_seqs + 1,) int32.
        context_lens: (num_seqs,) int32, this step's tokens included.
        block_tables: (num_seqs, max_blocks) int32; what lies past the context is never read.
        slots: (num_tokens,) integers, where this step's keys and values go.
        tiles: (3, num_tiles) int32, for kernels that run by tiles: sequence, first query, number of queries.
        one_query_a_tile: no tile has more, as where all sequences decode.
        num_wanted: (num_seqs,) int32: hidden states are asked for of so many last queries of each sequence,
            and a forward pass may leave anything in place of the others; None: of all.
        states: (num_slots, num_layers, block_size, dim), where a forward pass that can keeps layers' inputs.
        state_rows: (num_tokens,) int32 `slot * block_size + place` among them, -1: those of this token are
            not asked for; None: of no token.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    tiles: Tensor | None = None
    one_query_a_tile: bool = False
    num_wanted: Tensor | None = None
    states: Tensor | None = None
    state_rows: Tensor | None = None


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Stores k and v (num_tokens, num_kv_heads, head_dim) in one layer's cache, rounded to its type."""
    blocks, places = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[blocks, :, places] = k.to(k_cache.dtype)
    v_cache[blocks, :, places] = v.to(v_cache.dtype)


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """Causal attention of q (num_tokens, num_heads, head_dim), one sequence at a time; same shape."""
    out = torch.empty_like(q)
    block_size = k_cache.shape[2]
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    for seq, context in enumerate(contexts):
        begin, end = starts[seq], starts[seq + 1]
        blocks = batch.block_tables[seq, : -(-context // block_size)].long()
        # (num_kv_heads, context, head_dim)
        keys = k_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context].to(q.dtype)
        values = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context].to(q.dtype)
        positions = torch.arange(context - (end - begin), context, device=q.device)
        visible = torch.arange(context, device=q.device) <= positions.unsqueeze(1)
        attended = scaled_dot_product_attention(
            q[begin:end].transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
        )
        out[begin:end] = attended[0].transpose(0, 1)
    return out
