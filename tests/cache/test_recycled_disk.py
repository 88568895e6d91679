"""The disk tier: its files stay within the budget, whoever writes, is killed, or damages them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest

from scone.cache.errors import CacheError
from scone.cache.recycled_disk import RecycledDisk
from scone.cache.recycled_header import HEADER_NAME, NUM_SHARDS
from scone.cache.recycled_record import Record, id_bytes, state_key
from scone.cache.recycled_shard import RecycledShard
from scone.cache.recycled_stats import RecycledStats
from tests.cache.damage import flip_bit
from tests.cache.recycled_process import NUM_DISK_HITS
from tests.cache.recycled_states import BYTES, record, worth

BUDGET = 64 << 20
PROCESS = Path(__file__).with_name("recycled_process.py")


def num_bytes_of(folder: Path) -> int:
    return sum(os.stat(file).st_size for file in folder.iterdir())


def assert_held(disk: RecycledDisk, wanted: Record, *, may_miss: bool = False) -> bool:
    found = disk.read(wanted.name, None)
    if found is None:
        assert may_miss
        return False
    assert found[0].fault(wanted.ids) is None
    assert (found[0].payload == wanted.payload).all()
    return True


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[RecycledDisk]:
    disk = RecycledDisk(tmp_path / "store", BUDGET, RecycledStats())
    yield disk
    disk.close()


@contextmanager
def watched(folder: Path, limit: Callable[[], int]) -> Iterator[None]:
    """Looks at the size of all files all the time."""
    stop, over = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            try:
                size = num_bytes_of(folder)
            except FileNotFoundError:
                continue
            if size > limit():
                over.append(size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not over, f"the files took {max(over)} bytes"


def test_states_of_every_size_come_back(disk: RecycledDisk) -> None:
    records = [
        record(n, size) for n, size in enumerate((0, 1, 1931, 1932, 2007, 2008, 4071, 4072, 16_400, 737_280))
    ]
    assert set(disk.write([(r, worth()) for r in records]).values()) == {"stored"}
    assert set(disk.write([(r, worth()) for r in records]).values()) == {"held"}
    for wanted in records:
        assert_held(disk, wanted)
        out = np.zeros(len(wanted.payload), np.uint8)
        found = disk.read(wanted.name, out)
        assert found is not None
        assert found[0].payload is out
        assert (out == wanted.payload).all()
    assert disk.held([records[0].name, record(99, 1).name, records[5].name]) == [True, False, True]
    assert disk.usage()["blocks"] == (len(records), sum(len(r.payload) for r in records))


@pytest.mark.parametrize("seed", [0, 1])
def test_files_never_exceed_the_budget(disk: RecycledDisk, tmp_path: Path, seed: int) -> None:
    """Far more is written than fits, in mixed sizes; budgets change meanwhile."""
    rng = random.Random(seed)
    sizes: dict[int, int] = {}
    limit = [BUDGET]
    with watched(tmp_path / "store", lambda: limit[0]):
        for round_number in range(70):
            batch = []
            for _ in range(8):
                number = len(sizes)
                sizes[number] = rng.choice((500, 2304, 20_000, 300_000, 737_280))
                batch.append((record(number, sizes[number]), worth(rng.random() + number / 10)))
            disk.write(batch)
            for number in rng.sample(range(len(sizes)), 8):
                assert_held(disk, record(number, sizes[number]), may_miss=True)
            if round_number % 16 == 15:
                larger = rng.choice((BUDGET, BUDGET * 3 // 2))
                limit[0] = max(limit[0], larger)  # files of the larger budget are there until all is done
                disk.set_budget(larger)
                assert num_bytes_of(tmp_path / "store") <= larger
                limit[0] = larger
    assert sum(disk._stats.evictions.values()) > 50
    held = [number for number in sizes if assert_held(disk, record(number, sizes[number]), may_miss=True)]
    assert min(held) > 20, "the least worth are gone"
    assert max(held) == len(sizes) - 1


def test_a_smaller_budget_gives_bytes_back_and_keeps_what_is_worth_most(tmp_path: Path) -> None:
    disk = RecycledDisk(tmp_path, 2 * BUDGET, RecycledStats())
    records = [record(number, 250_000) for number in range(430)]
    for begin in range(0, len(records), 16):
        part = records[begin : begin + 16]
        disk.write([(r, worth(begin + i)) for i, r in enumerate(part)])
    full = num_bytes_of(tmp_path)
    assert full > 1.6 * BUDGET
    with watched(tmp_path, lambda: 2 * BUDGET):
        disk.set_budget(BUDGET)
    assert num_bytes_of(tmp_path) <= BUDGET
    held = disk.held([r.name for r in records])
    # One shard may have made room for the copies of the others; elsewhere the best half is there.
    assert sum(held[-200:]) > 140
    assert sum(held[:150]) == 0
    for wanted, is_held in zip(records, held, strict=True):
        if is_held:
            assert_held(disk, wanted)
    disk.close()


def test_a_store_opened_with_a_smaller_budget_keeps_what_fits(tmp_path: Path) -> None:
    disk = RecycledDisk(tmp_path, 2 * BUDGET, RecycledStats())
    for number in range(430):
        disk.write([(record(number, 250_000), worth(number))])
    disk.close()
    disk = RecycledDisk(tmp_path, BUDGET, RecycledStats())
    assert num_bytes_of(tmp_path) <= BUDGET
    assert sum(disk.held([record(number, 0).name for number in range(230, 430)])) > 140
    disk.close()


def test_states_worth_less_are_refused(disk: RecycledDisk) -> None:
    for number in range(200):
        disk.write([(record(number, 500_000), worth(10))])
    assert disk.write([(record(900, 500_000), worth(1))]) == {record(900, 1).name: "refused"}
    assert disk.write([(record(901, 500_000), worth(11))]) == {record(901, 1).name: "stored"}
    assert disk.write([(record(902, 4_000_000), worth(99))]) == {record(902, 1).name: "refused"}  # too large


def test_used_states_stay(disk: RecycledDisk) -> None:
    for number in range(100):
        disk.write([(record(number, 250_000), worth())])
    kept = [record(number, 0).name for number in range(0, 100, 20)]
    disk.touch(dict.fromkeys(kept, 3))
    for number in range(100, 300):
        disk.write([(record(number, 250_000), worth(1))])
    assert all(disk.held(kept))
    assert not disk.held([record(1, 0).name])[0]


def test_a_stuck_reader_costs_writes_and_nothing_else(disk: RecycledDisk, tmp_path: Path) -> None:
    """A process that never ends its snapshot (stopped, say): no page is freed, and nothing fails or grows."""
    for number in range(150):
        disk.write([(record(number, 300_000), worth(number))])
    files = sorted((tmp_path / "store").glob("shard-*.lmdb"))
    child = (
        "import lmdb, sys, time\n"
        "envs = [lmdb.open(f, subdir=False, readonly=True, max_readers=254) for f in sys.argv[1:]]\n"
        "txns = [env.begin() for env in envs]\n"
        "print('open', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", child, *map(str, files)], stdout=subprocess.PIPE) as stuck:
        assert stuck.stdout is not None
        assert stuck.stdout.readline() == b"open\n"
        results: list[str] = []
        for number in range(200, 330):
            results += disk.write([(record(number, 300_000), worth(number))]).values()
            assert num_bytes_of(tmp_path / "store") <= BUDGET
        stuck.kill()
    assert "failed" in results
    disk.refresh()  # forgets the reader
    assert disk.write([(record(500, 300_000), worth(500))]) == {record(500, 1).name: "stored"}


OTHER_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_recycled_disk import *
other = RecycledDisk(Path(sys.argv[1]), None, RecycledStats())
assert_held(other, record(1, 5000))
other.set_budget(2 * BUDGET)
for number in range(2, 200):
    other.write([(record(number, 500_000), worth(number))])
print("written", flush=True)
sys.stdin.readline()
other.clear()
"""


def test_processes_follow_each_other(disk: RecycledDisk, tmp_path: Path) -> None:
    """What another process writes is read; its budget and its clearing hold here too."""
    folder = tmp_path / "store"
    disk.write([(record(1, 5000), worth())])
    words = [sys.executable, "-c", OTHER_PROCESS, str(folder), str(PROCESS.parent)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "written\n"
        assert disk.disk_bytes == 2 * BUDGET
        assert num_bytes_of(folder) > BUDGET
        assert_held(disk, record(199, 500_000))
        assert disk.write([(record(900, 500_000), worth(900))]) == {record(900, 1).name: "stored"}
        other.communicate("\n", timeout=60)
    assert other.returncode == 0
    assert disk.usage()["blocks"] == (0, 0)
    assert disk.write([(record(1, 5000), worth())]) == {record(1, 1).name: "stored"}
    disk.refresh()
    assert num_bytes_of(folder) < 1 << 20


def test_processes_write_read_evict_and_shrink_at_once(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, str(PROCESS), str(tmp_path), str(seed), "2", str(96 << 20), "shrink"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    results = [(*child.communicate(timeout=120), child.returncode) for child in children]
    for out, err, code in results:
        assert code == 0, err
        assert " damaged 0 " in out
        assert int(out.split("disk ")[1].split()[0]) >= NUM_DISK_HITS, "what it and others had written"
    assert num_bytes_of(tmp_path) <= 96 << 20


@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.heavy)])
def test_killed_processes_leave_a_store_that_opens(tmp_path: Path, rounds: int) -> None:
    words = [sys.executable, str(PROCESS), str(tmp_path), "0", str(rounds), str(96 << 20)]
    result = subprocess.run([*words, "crash"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    # Whatever is there now is right: the process checks each state that it reads.
    again = subprocess.run([*words[:4], "1", words[5]], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert " damaged 0 " in again.stdout
    assert num_bytes_of(tmp_path) <= 96 << 20


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    disk = RecycledDisk(tmp_path, BUDGET, RecycledStats())
    rng = np.random.default_rng(0)
    for number in range(12):
        name = state_key("blocks", bytes([number]) * 32)
        target = Record.make(name, b"ids", rng.integers(0, 256, 30_000, np.uint8))
        disk.write([(target, worth())])
        begin = int(rng.integers(0, 16_000))
        assert flip_bit(tmp_path, target.payload[begin : begin + 64].tobytes())
        found = disk.read(name, None)
        assert found is not None
        assert (found[0].payload != target.payload).sum() == 1
        assert found[0].fault(b"ids") == "checksum"
    disk.close()


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    disk = RecycledDisk(tmp_path, BUDGET, RecycledStats())
    records = [record(number, 30_000) for number in range(64)]
    disk.write([(r, worth()) for r in records])
    disk.close()
    damaged, cut = sorted(tmp_path.glob("shard-*.lmdb"))[:2]
    damaged.write_bytes(os.urandom(damaged.stat().st_size))
    os.truncate(cut, cut.stat().st_size // 8192 * 4096)
    stats = RecycledStats()
    disk = RecycledDisk(tmp_path, BUDGET, stats)
    assert stats.damaged_files == 2
    held = disk.held([r.name for r in records])
    assert 30 < sum(held) < 64, "six of eight files are as they were"
    assert disk.write([(r, worth()) for r in records])[records[0].name] in ("held", "stored")
    assert all(disk.held([r.name for r in records]))
    disk.close()


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    RecycledDisk(tmp_path, BUDGET, RecycledStats()).close()
    header = tmp_path / HEADER_NAME
    content = bytearray(header.read_bytes())
    content[16] = 99
    header.write_bytes(content)
    with pytest.raises(CacheError, match=r"format version 99, this program has 2: remove them with"):
        RecycledDisk(tmp_path, BUDGET, RecycledStats())
    header.write_bytes(b"something else")
    with pytest.raises(CacheError, match="not the header of a store"):
        RecycledDisk(tmp_path, BUDGET, RecycledStats())


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot open the store"):
        RecycledDisk(tmp_path / "file", BUDGET, RecycledStats())
    with pytest.raises(CacheError, match="disk_bytes is 1000, wanted at least"):
        RecycledDisk(tmp_path / "store", 1000, RecycledStats())


def test_a_full_file_system_fails_writes_and_nothing_else(
    disk: RecycledDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write([(record(1, 5000), worth())])
    monkeypatch.setattr(
        "scone.cache.shard_states.ShardStates.put",
        lambda *_: (_ for _ in ()).throw(lmdb.DiskError("No space left on device")),
    )
    assert disk.write([(record(2, 5000), worth())]) == {record(2, 1).name: "failed"}
    assert_held(disk, record(1, 5000))


def test_leftovers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    RecycledDisk(tmp_path, BUDGET, RecycledStats()).close()
    shutil.copy(tmp_path / "shard-0.0.lmdb", tmp_path / "shard-0.7.lmdb")
    RecycledDisk(tmp_path, BUDGET, RecycledStats()).close()
    assert not (tmp_path / "shard-0.7.lmdb").exists()
    assert (tmp_path / "shard-0.0.lmdb").exists()


@pytest.mark.parametrize(
    ("num_tokens", "num_bytes", "number", "most"),
    [
        (16, 737_280, 40, 1.01),
        (16, 368_640, 80, 1.02),
        (500, 1_152_000, 20, 1.02),
        (500, 2304, 800, 2.0),
        (500, 4000, 800, 1.5),
    ],
)
def test_storage_overhead(tmp_path: Path, num_tokens: int, num_bytes: int, number: int, most: float) -> None:
    """What docs/recycled.md says a state takes."""
    disk = RecycledDisk(tmp_path, 1 << 30, RecycledStats())
    ids = id_bytes(np.arange(num_tokens, dtype=np.int32))
    empty = used_bytes(disk)
    rng = random.Random(0)
    records = [
        Record.make(state_key("blocks", rng.randbytes(32)), ids, BYTES[:num_bytes]) for _ in range(number)
    ]
    disk.write([(r, worth(rng.random())) for r in records])
    assert 1.0 < (used_bytes(disk) - empty) / number / num_bytes < most
    disk.close()


def used_bytes(disk: RecycledDisk) -> int:
    return sum(disk._run(place, RecycledShard.used_bytes, 0) for place in range(NUM_SHARDS))
