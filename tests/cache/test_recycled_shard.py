"""One file of the disk tier: its entries say where LMDB has the bytes, and it ages by its own turnover."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


HOLDS_A_WRITE = """
import select, sys
from pathlib import Path
from scone.cache.recycled_shard import RecycledShard
shard = RecycledShard(Path(sys.argv[1]), 16 << 20)
with shard._env.begin(write=True):
    print("begun", flush=True)
    print("told" if select.select([sys.stdin], [], [], 10)[0] else "gave up")
"""


def test_who_waits_to_open_a_file_stops_no_other_thread(tmp_path: Path) -> None:
    """Or two processes that open two files each could wait for each other for ever."""
    RecycledShard(tmp_path / "file", 16 << 20).close()
    command = [sys.executable, "-c", HOLDS_A_WRITE, str(tmp_path / "file")]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer,
        ThreadPoolExecutor(1) as pool,
    ):
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        opening = pool.submit(RecycledShard, tmp_path / "file", 16 << 20)
        with pytest.raises(TimeoutError):
            opening.result(0.5)
        out, _ = writer.communicate("go on")
        assert out == "told\n"
        opening.result().close()


GROWS_A_FILE = """
import sys
from pathlib import Path
from scone.cache.recycled_shard import RecycledShard
from tests.cache.recycled_states import record, worth
shard = RecycledShard(Path(sys.argv[1]), 16 << 20)
print("open", flush=True)
for number in map(int, sys.stdin):
    print(shard.write([(record(number, 200_000), worth())], []), flush=True)
"""


def test_a_file_that_grows_while_it_is_opened_was_not_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever its size is looked at, another process writes right after that."""
    path = tmp_path / "file"
    command = [sys.executable, "-c", GROWS_A_FILE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        numbers = iter(range(100))
        stat = Path.stat

        def stat_before_a_write(file: Path, **words: bool) -> os.stat_result:
            result = stat(file, **words)
            if file == path:
                print(next(numbers), file=writer.stdin, flush=True)
                assert writer.stdout is not None
                assert "stored" in writer.stdout.readline()
            return result

        monkeypatch.setattr(Path, "stat", stat_before_a_write)
        shard = RecycledShard(path, 16 << 20)
        writer.communicate()
    assert shard.held([record(0, 0).name, record(1, 0).name]) == [True, True]
    shard.close()


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
