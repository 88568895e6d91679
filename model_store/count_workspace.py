"""Where a count keeps what may outgrow memory: keys by partition, ids by position, finished scans.

In memory for a small corpus, in a folder for a large one. The folder also lets a count that was ended go on:
each finished scan is kept until the set is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IDENTITY_NAME = "count.json"


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The n-grams of one length that passed, in lexicographic order.

    Attributes:
        keys: (num_grams,) int64, sorted; the id of an n-gram is its place here.
        counts: (num_grams,) int64.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]


class KeyPartitions:
    """Keys dealt by hash, so that equal keys meet. `add` may be called by several threads."""

    def __init__(self, num_partitions: int, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._parts: list[list[NDArray[np.int64]]] = [[] for _ in range(num_partitions)]
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, keys: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
        """Takes the keys of a chunk; partition p is keys[bounds[p] : bounds[p + 1]]."""
        with self._lock:
            for p in range(len(self)):
                part = keys[bounds[p] : bounds[p + 1]]
                if self._folder is None:
                    self._parts[p].append(part)
                elif len(part):
                    with open(self._folder / f"{p}.keys", "ab") as file:
                        part.tofile(file)

    def take(self, p: int) -> NDArray[np.int64]:
        """All keys of one partition, which is then forgotten."""
        if self._folder is None:
            parts, self._parts[p] = self._parts[p], []
            return np.concatenate([np.zeros(0, np.int64), *parts])
        path = self._folder / f"{p}.keys"
        if not path.exists():
            return np.zeros(0, np.int64)
        keys = np.fromfile(path, np.int64)
        path.unlink()
        return keys


class CountWorkspace:
    """The storage of one count; a context manager that removes its folder when the count succeeds."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        """Keeps everything in memory if `folder` is None.

        A folder left behind by a count of the same `identity` is used again, any other one is emptied.
        """
        self.folder = folder
        if folder is None:
            return
        description = folder / _IDENTITY_NAME
        wanted = json.dumps(identity, sort_keys=True)
        if not description.exists() or description.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            description.write_text(wanted)

    def __enter__(self) -> CountWorkspace:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self.folder is not None and error_type is None:
            shutil.rmtree(self.folder)

    def partitions(self, num_partitions: int) -> KeyPartitions:
        """Empty partitions for the keys of one scan."""
        return KeyPartitions(num_partitions, None if self.folder is None else self.folder / "keys")

    def new_ids(self, n: int, size: int) -> NDArray[np.int32]:
        """(size,) the ids of n-grams by position, to be written; those of shorter ones are forgotten."""
        if self.folder is None:
            return np.full(size, -1, np.int32)
        (self.folder / f"ids-{n - 2}.i32").unlink(missing_ok=True)
        if size == 0:
            return np.zeros(0, np.int32)
        return np.memmap(self.folder / f"ids-{n}.i32", np.int32, "w+", shape=(size,))

    def keep(self, n: int, level: Level) -> None:
        """Records that the scan for `n` is finished, its ids included."""
        if self.folder is not None:
            partial = self.folder / "level.partial"
            with open(partial, "wb") as file:
                np.savez(file, keys=level.keys, counts=level.counts)
            os.replace(partial, self.folder / f"level-{n}.npz")

    def kept(self, n: int, size: int) -> tuple[Level, NDArray[np.int32]] | None:
        """What an earlier run kept of scan `n`: the level, and ids by position (none after the last scan)."""
        if self.folder is None or not (path := self.folder / f"level-{n}.npz").exists():
            return None
        with np.load(path) as arrays:
            level = Level(arrays["keys"], arrays["counts"])
        ids_path = self.folder / f"ids-{n}.i32"
        has_ids = size > 0 and ids_path.exists()
        return level, np.memmap(ids_path, np.int32, "r") if has_ids else np.zeros(0, np.int32)
