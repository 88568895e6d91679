"""How fast a disk reads: large reads past the page cache."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

PROBE_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_NUM_THREADS = 2
"""More threads or larger reads give no more on the machine of docs/recycled.md."""


def probe_disk(folder: Path) -> float | None:
    """Bytes per second of the disk that `folder` is on; None: it cannot be told there.

    Takes PROBE_BYTES of it meanwhile, in a file without a name.
    """
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            for _ in range(PROBE_BYTES // _READ_BYTES):  # bytes that no file system makes smaller
                os.write(fd, os.urandom(_READ_BYTES))
            os.fsync(fd)
            return direct_read_speed([Path(f"/proc/self/fd/{fd}")])
        finally:
            os.close(fd)
    except OSError as error:
        logger.info("how fast the disk of %s reads cannot be measured: %s", folder, error)
        return None


def direct_read_speed(paths: Sequence[Path]) -> float:
    """Bytes per second of reading these files, which are on the disk, from end to end; raises OSError."""
    reads = [(path, offset) for path in paths for offset in range(0, path.stat().st_size, _READ_BYTES)]

    def read(part: Sequence[tuple[Path, int]]) -> int:
        buffer, num_bytes = mmap.mmap(-1, _READ_BYTES), 0
        for path, offset in part:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                num_bytes += os.preadv(fd, [buffer], offset)
            finally:
                os.close(fd)
        return num_bytes

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        began = time.perf_counter()
        num_bytes = sum(pool.map(read, [reads[i::_NUM_THREADS] for i in range(_NUM_THREADS)]))
        return num_bytes / (time.perf_counter() - began)
