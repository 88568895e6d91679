from __future__ import annotations

from scone.server.engine.kv_blocks import BlockPool


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
