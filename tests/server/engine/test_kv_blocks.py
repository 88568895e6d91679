from __future__ import annotations

from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.prefix_cache import extend_block_hashes, root_hash


def test_released_blocks_are_found_until_they_are_reused() -> None:
    pool = BlockPool(3, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"first")
    pool.register(second, b"second")
    pool.release([second, first])  # the last block of a sequence first
    assert pool.num_free == 3
    assert pool.find([b"first", b"second"]) == [first, second]
    third = pool.allocate()  # the one without content goes first
    assert third not in (first, second)
    assert pool.allocate() == second
    assert pool.find([b"first", b"second"]) == [first]
    pool.share(first)
    assert pool.num_free == 0
    assert pool.find([b"first"]) == [first]


def test_a_second_block_of_equal_content_stays_unknown() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find([b"same"]) == [first]
    pool.forget(second)
    assert pool.find([b"same"]) == [first]
    pool.forget(first)
    assert pool.find([b"same"]) == []


def test_hashes_tell_apart_all_that_matters() -> None:
    roots = [
        root_hash("m", "t", "x", None),
        root_hash("mt", "", "x", None),
        root_hash("m", "t", "y", None),
        root_hash("m", "t", "x", "salt"),
    ]
    hashes: list[list[bytes]] = []
    for root in roots:
        hashes.append([])
        extend_block_hashes(hashes[-1], root, [1, 2, 3, 4, 5], 2, 2)
    other: list[bytes] = []
    extend_block_hashes(other, roots[0], [1, 2, 3, 5], 2, 2)
    assert other[0] == hashes[0][0]
    assert other[1] != hashes[0][1]
    shifted: list[bytes] = []
    extend_block_hashes(shifted, roots[0], [3, 4, 3, 4], 2, 2)
    flat = [h for chain in hashes for h in chain] + [other[1], *shifted]
    assert len(set(flat)) == len(flat)
    again = hashes[0][:1]
    extend_block_hashes(again, roots[0], [1, 2, 3, 4, 5], 2, 2)
    assert again == hashes[0]
