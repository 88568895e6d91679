"""Names of computed states: chained hashes of everything that a state depends on.

Keys and values of a block of tokens depend on all token ids up to its end, on the model and how it is
computed, and on the rows that replaced token embeddings. The rows are a function of the token ids, the
tokenizer and the table, so (identity, salt, token ids) names a state exactly: what has the same name is the
same state, in this process, in another one, or after a restart.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass

IDENTITY_VERSION = 2
"""Raised whenever the same name could come to mean another state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateIdentity:
    """What states depend on besides token ids and salt.

    Attributes:
        model_hash: of the weights, as the checkpoint gives it.
        tokenizer_hash: the same of the tokenizer.
        table_id: of the f-gram table (over its f-grams and rows), "" without one.
        row_codec: how its rows are stored; another codec gives other rows.
        state_dtype: type of the stored values.
        layout: their order and shape, as in "kv:30x2x3x64".
        rope: the rotary embedding's parameters.
        compute: backend and weight formats, where they change the bits.
        adapter: of weights added to the model's, "" without.
    """

    model_hash: str
    tokenizer_hash: str
    table_id: str = ""
    row_codec: str = ""
    state_dtype: str = ""
    layout: str = ""
    rope: str = ""
    compute: str = ""
    adapter: str = ""

    def root(self, salt: str | None) -> bytes:
        """What the first name of a chain is chained to; 32 bytes.

        The salt keeps callers apart who must not learn from timing what others have sent.
        """
        digest = hashlib.sha256()
        # Length-prefixed, so that no two different tuples give the same bytes.
        for part in (str(IDENTITY_VERSION), *astuple(self), salt or ""):
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
