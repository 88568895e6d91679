"""What look-up is measured against: the paper's recipe re-made, and other ways to the same rows.

The paper (arXiv 2502.01637) gives no code: its recipe is taken to be a dict over token tuples and a matrix in
RAM, and on disk one LMDB get for each length tried, from several threads.
"""

from __future__ import annotations

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, Self

import lmdb
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.direct_reader import DirectReader
from scone.cache.lookup_workload import MAX_N
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import TableFiles

I64 = NDArray[np.int64]
_ROWS_PER_WRITE = 1 << 14


class DictMatch:
    """Longest key first, one dict probe for each length."""

    def __init__(self, fgrams: FGramSet) -> None:
        self.rows_by_key: dict[tuple[int, ...], int] = {}
        for begin in range(0, len(fgrams), 1 << 16):
            part = slice(begin, begin + (1 << 16))
            keys = zip(fgrams.tokens[part].tolist(), fgrams.lengths[part].tolist(), strict=True)
            self.rows_by_key.update((tuple(f[:n]), begin + i) for i, (f, n) in enumerate(keys))

    def match(self, tokens: list[int]) -> list[int]:
        """The row of the longest f-gram that ends at each position, -1 where there is none."""
        probe = self.rows_by_key.get
        found = []
        for end in range(1, len(tokens) + 1):
            row = -1
            for n in range(min(MAX_N, end), 1, -1):
                row = probe(tuple(tokens[end - n : end]), -1)
                if row >= 0:
                    break
            found.append(row)
        return found

    def match_last(self, texts: list[list[int]]) -> list[int]:
        """The same for the last position of each text."""
        probe = self.rows_by_key.get
        found = []
        for tokens in texts:
            row = -1
            for n in range(min(MAX_N, len(tokens)), 1, -1):
                row = probe(tuple(tokens[-n:]), -1)
                if row >= 0:
                    break
            found.append(row)
        return found


class RowSource(Protocol):
    """One way to rows in a file; opened for a measurement and closed after it."""

    def rows(self, row_ids: I64) -> object: ...

    def close(self) -> None: ...


class MemmapRows:
    """`np.memmap` and fancy indexing, as most would begin."""

    def __init__(self, files: TableFiles) -> None:
        manifest = files.manifest
        shape = (manifest.num_fgrams, manifest.row_bytes)
        self._rows = np.memmap(files.rows_path, np.uint8, "r", int(files.block_offsets[0]), shape)

    def rows(self, row_ids: I64) -> NDArray[np.uint8]:
        return self._rows[row_ids]

    def close(self) -> None:
        del self._rows


class TorchFileRows:
    """A mapped torch tensor and `index_select`."""

    def __init__(self, files: TableFiles) -> None:
        manifest = files.manifest
        # 16-bit values, whatever they mean; the header is a whole number of rows only for some widths
        self._dim = manifest.row_bytes // 2
        begin = int(files.block_offsets[0]) // 2
        size = begin + manifest.num_fgrams * self._dim
        flat = torch.from_file(str(files.rows_path), shared=True, size=size, dtype=torch.int16)
        self._matrix = flat[begin:].view(manifest.num_fgrams, self._dim)

    def rows(self, row_ids: I64) -> Tensor:
        return self._matrix.index_select(0, torch.from_numpy(row_ids))

    def close(self) -> None:
        del self._matrix


class EngramRows:
    """`engramdb.Store` of the package engramdb-python: rows of fixed width by id; it matches nothing."""

    def __init__(self, folder: Path, files: TableFiles) -> None:
        engramdb: Any = importlib.import_module("engramdb")
        self._store = engramdb.Store(str(folder), 1, files.manifest.num_fgrams, files.manifest.row_bytes)

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("engramdb") is not None

    @staticmethod
    def write(folder: Path, files: TableFiles) -> Path:
        """Its file: the rows without a header. One of an earlier run is used."""
        path = folder / "shard_000.bin"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".partial")
            with open(draft, "wb") as file:
                for first in range(0, len(files.page_sums), _ROWS_PER_WRITE):
                    file.write(files.read_pages(first, first + _ROWS_PER_WRITE).data)
            os.replace(draft, path)
        return path

    def rows(self, row_ids: I64) -> bytes:
        fetched: bytes = self._store.fetch(row_ids.tolist())
        return fetched

    def close(self) -> None:
        self._store.close()


class LmdbPerProbe:
    """The paper's disk table: an f-gram's token ids are the key, its row the value; one get for each length.

    Each thread has a stretch of the prompt and a read transaction of its own.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        self._env = lmdb.open(
            str(path), subdir=False, readonly=True, lock=False, readahead=False, max_readers=256
        )
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    @staticmethod
    def write(path: Path, fgrams: FGramSet, files: TableFiles) -> Path:
        """Loads it in key order, LMDB's best case; one of an earlier run is used."""
        if path.exists():
            return path
        keys = fgrams.tokens.astype(">u4").tobytes()
        width = 4 * fgrams.max_n
        lengths = fgrams.lengths.tolist()
        order = sorted(range(len(fgrams)), key=lambda i: keys[i * width : i * width + 4 * lengths[i]])
        # In key order the rows lie anywhere: one by one through a mapping, each would be a wait for the disk.
        reader = DirectReader(files, depth=128)
        rows = torch.empty(_ROWS_PER_WRITE, files.manifest.dim, dtype=files.manifest.row_codec.torch_dtype)
        values = rows.view(torch.uint8).numpy()
        draft = path.with_suffix(".partial")
        draft.unlink(missing_ok=True)
        map_bytes = len(fgrams) * (3 * files.manifest.row_bytes + 4096) + (1 << 30)  # address space, not disk
        options = {"subdir": False, "lock": False, "sync": False, "writemap": True}
        with lmdb.open(str(draft), map_size=map_bytes, **options) as env:
            for first in range(0, len(order), _ROWS_PER_WRITE):
                part = order[first : first + _ROWS_PER_WRITE]
                reader.read_into(np.array(part, np.int64), 0, len(fgrams), rows[: len(part)])
                with env.begin(write=True) as txn:
                    for i, value in zip(part, values, strict=False):
                        txn.put(keys[i * width : i * width + 4 * lengths[i]], value.data, append=True)
            env.sync(True)
        reader.close()
        os.replace(draft, path)
        return path

    def read(self, tokens: list[int]) -> list[bytes | None]:
        """The row of the longest f-gram that ends at each position."""
        key = np.array(tokens, ">u4").tobytes()
        if self._pool is None:
            return self._read_range(key, 0, len(tokens))
        borders = np.linspace(0, len(tokens), self._num_threads + 1).astype(int).tolist()
        parts = self._pool.map(self._read_range, [key] * self._num_threads, borders, borders[1:])
        return [row for part in parts for row in part]

    def _read_range(self, key: bytes, begin: int, end: int) -> list[bytes | None]:
        found = []
        with self._env.begin() as txn:
            for stop in range(begin + 1, end + 1):
                row = None
                for n in range(min(MAX_N, stop), 1, -1):
                    row = txn.get(key[4 * (stop - n) : 4 * stop])
                    if row is not None:
                        break
                found.append(row)
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
