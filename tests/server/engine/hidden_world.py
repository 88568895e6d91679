"""What tests of blocks that are kept as hidden states share."""

from __future__ import annotations

from scone.cache.recycled_store import RecycledStore

from .recycled_world import BLOCK_SIZE

STATE_BYTES = 3 * BLOCK_SIZE * 64 * 4
"""Of a block's hidden states, and of its keys and values: 3 layers, 64 wide, 4 heads of 16."""

KV_BYTES = 2 * STATE_BYTES


def blocks_on_disk(store: RecycledStore) -> tuple[int, int]:
    """Their number, and the bytes of their payloads."""
    usage = next(u for u in store.usage() if (u.kind, u.tier) == ("blocks", "disk"))
    return usage.num_entries, usage.num_bytes
