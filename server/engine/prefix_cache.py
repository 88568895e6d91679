"""Chained hashes that name KV blocks by everything their content depends on.

The keys and values of a block depend on all token ids up to its end, on the model, and on the rows
that replaced token embeddings. The rows are a function of the token ids, the tokenizer and the table,
so (root, token ids) names the content exactly. The salt keeps callers apart who must not learn from
timing what others have sent.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_hash(model_hash: str, tokenizer_hash: str, table_id: str, salt: str | None) -> bytes:
    """What the first block's hash is chained to; 32 bytes."""
    # Length-prefixed, so that no two different quadruples give the same bytes.
    digest = hashlib.sha256()
    for part in (model_hash, tokenizer_hash, table_id, salt or ""):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def extend_block_hashes(
    hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int
) -> None:
    """Appends to `hashes` until it names the first `num_blocks` full blocks of `token_ids`."""
    for block in range(len(hashes), num_blocks):
        parent = hashes[block - 1] if block else root
        tokens = array("q", token_ids[block * block_size : (block + 1) * block_size])
        assert len(tokens) == block_size
        hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
