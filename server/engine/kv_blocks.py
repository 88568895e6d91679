"""The pool of KV blocks: who holds which, and which free ones still hold a known prefix.

Bookkeeping only; the tensors are the model runner's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1.

    A block with a hash keeps its content when it is released and can be taken again by that hash
    until it is allocated for something else, least recently released first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, those with a reusable prefix included."""
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self) -> int:
        """A block of unspecified content with one holder; the caller checks `num_free` first."""
        block_id, _ = self._free.popitem(last=False)
        self.forget(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Adds a holder; takes the block off the free list if it had none."""
        if self._ref_counts[block_id] == 0:
            del self._free[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drops one holder of each. Give a sequence's last block first: it is then reused first."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released but has no holder"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                # A block without a known prefix is worth nothing: it goes before all that have one.
                if block_id not in self._hash_of:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Makes the block findable; where another block has that hash already, the other stays."""
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Makes the block unfindable: its content is to change, or is not to be trusted."""
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def find(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `block_hashes`; does not hold them."""
        found = []
        for block_hash in block_hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of `block_ids` have no holder."""
        return sum(self._ref_counts[b] == 0 for b in block_ids)
