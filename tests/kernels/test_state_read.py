"""A state read from parts of a file to rows of memory: the native way, its oracle, what they refuse."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from scone.kernels.checksum import crc32c
from scone.kernels.extension import native
from scone.kernels.state_read import read_state, read_state_reference, will_need

GAP = 16
FILE_BYTES = 1 << 20

needs_native = pytest.mark.skipif(native is None, reason="the native extension was not built")


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).integers(0, 256, FILE_BYTES, np.uint8).tobytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> Iterator[int]:
    path: Path = tmp_path_factory.mktemp("state") / "file"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def places(*pairs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    offsets, sizes = np.array(pairs, np.int64).reshape(-1, 2).T.copy()
    return offsets, sizes


@pytest.mark.parametrize(
    ("shape", "num_ids", "tail_bytes"),
    [((60, 1228), 33, 81), ((1, 73_000), 0, 0), ((5, 4096), 4096, 1), ((1, 0), 7, 7), ((3000, 7), 2, 0)],
)
@pytest.mark.parametrize("seed", range(4))
@needs_native
def test_parts_in_any_number_fill_rows_anywhere(
    file: int, data: bytes, shape: tuple[int, int], num_ids: int, tail_bytes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    in_file = num_ids + shape[0] * shape[1] - tail_bytes
    num_cuts = min(int(rng.integers(0, 12)), max(0, in_file - 1))
    cuts = np.sort(rng.choice(np.arange(1, max(2, in_file)), num_cuts, replace=False))
    sizes = np.diff([0, *cuts, in_file]) if in_file else np.empty(0, np.int64)
    pairs, at = [], 100
    for size in sizes.tolist():  # some of them follow each other, as chunks on neighbouring pages do
        pairs.append((at, size))
        at += size + int(rng.choice((GAP, GAP, 5000)))
    tail = rng.integers(0, 256, tail_bytes, np.uint8)
    wanted = b"".join(data[offset : offset + size] for offset, size in pairs) + tail.tobytes()
    expected_sums = [
        crc32c(wanted[begin : min(begin + 4096, len(wanted))]) for begin in range(num_ids, len(wanted), 4096)
    ]
    for read in (read_state, read_state_reference):
        memory = np.zeros((shape[0], 3, shape[1]), np.uint8)
        ids, payload = np.empty(num_ids, np.uint8), memory[:, 1]
        sums = read(file, *places(*pairs), GAP, tail, ids, payload, 4096)
        assert ids.tobytes() + payload.tobytes() == wanted
        assert sums.tolist() == expected_sums
        assert not memory[:, ::2].any(), "nothing else was written to"


@pytest.mark.parametrize("read", [read_state, read_state_reference])
def test_what_is_not_there_is_an_error(file: int, read: Callable[..., np.ndarray]) -> None:
    nothing, out = np.empty(0, np.uint8), np.empty((1, 5000), np.uint8)
    with pytest.raises(OSError, match="the file ended early") as raised:
        read(file, *places((FILE_BYTES - 4000, 5000)), GAP, nothing, nothing, out, 4096)
    assert raised.value.errno == errno.EIO
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(-1, *places((0, 5000)), GAP, nothing, nothing, out, 4096)


@needs_native
def test_what_does_not_fit_is_refused(file: int) -> None:
    nothing, out = np.empty(0, np.uint8), np.empty((2, 50), np.uint8)
    for pairs, rows in (
        ([(0, 99)], out),
        ([(0, 101)], out),
        ([(-1, 100)], out),
        ([(0, 100), (200, 0)], out),
        ([(0, 100)], np.empty((50, 4), np.uint8)[:, ::2]),
    ):
        with pytest.raises(ValueError, match=r"state|row"):
            read_state(file, *places(*pairs), GAP, nothing, nothing, rows, 4096)


def test_reading_ahead_changes_nothing(file: int, data: bytes) -> None:
    will_need(file, *places((0, 5000), (5016, 300), (90_000, 70_000), (FILE_BYTES - 10, 500)), GAP)
    assert os.pread(file, 100, 90_000) == data[90_000:90_100]
