"""One file of the disk tier: its entries say where LMDB has the bytes, and it ages by its own turnover."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scone.cache.recycled_layout import Entry, chunk_key
from scone.cache.recycled_shard import RecycledShard
from tests.cache.recycled_states import record, worth


def test_entries_name_the_pages_where_lmdb_has_the_chunks(tmp_path: Path) -> None:
    """In a fresh file, in one whose pages were used before, and in a copy."""
    rng = random.Random(0)
    shard = RecycledShard(tmp_path / "file", 16 << 20)
    for number in range(60):
        shard.write([(record(number, rng.choice((2304, 20_000, 300_000, 737_280))), worth(number))], [])
        if number % 3 == 2:
            shard.delete([record(rng.randrange(number), 0).name])
    shard.copy_to(tmp_path / "copy", 16 << 20)
    copy = RecycledShard(tmp_path / "copy", 16 << 20)
    assert copy.usage() == shard.usage()
    assert copy.usage()["blocks"][0] > 20
    for one in (shard, copy):
        raw = one.path.read_bytes()
        with one._env.begin(buffers=True) as txn:
            for _, value in txn.cursor(one._states.entries):
                entry = Entry.from_bytes(value)
                for number, offset in enumerate(entry.offsets.tolist()):
                    chunk = txn.get(chunk_key(entry.state_id, number), db=one._states.chunks)
                    assert chunk is not None
                    assert raw[offset : offset + len(chunk)] == bytes(chunk)
                    assert raw[offset - 16 : offset - 8] == (offset // 4096).to_bytes(8, "little")
        one.close()


def test_a_file_ages_by_what_is_offered_to_it(tmp_path: Path) -> None:
    """Also by what is refused; written down, and kept where the file is copied or opened again."""

    def clock(shard: RecycledShard) -> float:
        with shard._env.begin() as txn:
            return shard._clock(txn)

    shard = RecycledShard(tmp_path / "file", 16 << 20)
    for number in range(8):
        shard.write([(record(number, 1 << 20), worth(1))], [])
    assert clock(shard) == pytest.approx(0.5, rel=1e-3)
    shard.touch({record(0, 0).name: 7})
    with shard._env.begin() as txn:
        entry = Entry.from_bytes(shard._states.entry(txn, record(0, 0).name) or b"")
    assert entry.worth.uses == pytest.approx(clock(shard) + 1), "as two uses just now"
    for number in range(8, 24):
        shard.write([(record(number, 1 << 20), worth(-number))], [])
    assert clock(shard) == pytest.approx(1.5, rel=1e-3)
    assert shard.held([record(23, 0).name]) == [False]
    before = clock(shard)
    shard.copy_to(tmp_path / "copy", 16 << 20)
    copy = RecycledShard(tmp_path / "copy", 16 << 20)
    assert clock(copy) == pytest.approx(before)
    shard.close()
    copy.close()
