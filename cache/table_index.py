"""The index of an open table: searched in its file, and in memory once a copy is there."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from scone.cache.errors import RowReadError
from scone.cache.memory_budget import MemoryBudget, Share
from scone.cache.ram_index import RamIndex
from scone.cache.stats import TableStats
from scone.cache.table_config import INDEX
from scone.kernels.errors import DamagedDataError
from scone.kernels.match import BucketIndex, Matcher, Matches
from scone.model_store.table_files import TableFiles


class TableIndex:
    """Finds the longest f-gram, as `Matcher` does; raises RowReadError where that raises DamagedDataError.

    Attributes:
        matcher: of what is searched now.
    """

    def __init__(self, files: TableFiles, stats: TableStats) -> None:
        self.matcher = Matcher(files.index, stats.num_matched)
        self._files = files
        self._stats = stats
        self._copy: RamIndex | None = None
        self._share: Share | None = None

    def load(self, memory: MemoryBudget | None) -> None:
        """Has the index copied into memory, if somebody else has not been faster to take it."""
        if memory is not None:
            self._share = memory.join(INDEX)
            if not self._share.reserve(self._files.index.buckets.nbytes, 0.0):
                return
        self._copy = RamIndex(self._files, self._search)

    def wait_loaded(self, timeout: float | None = None) -> None:
        """Waits until the copy is in use or has failed, if one was asked for."""
        if self._copy is not None:
            self._copy.wait_loaded(timeout)

    def match(self, tokens: NDArray[Any]) -> Matches:
        try:
            return self.matcher.match(tokens)
        except DamagedDataError as error:
            raise self.read_error(error) from None

    def match_last(self, windows: NDArray[Any]) -> Matches:
        try:
            return self.matcher.match_last(windows)
        except DamagedDataError as error:
            raise self.read_error(error) from None

    def read_error(self, error: DamagedDataError) -> RowReadError:
        """What to raise for an `error` of `matcher`."""
        return RowReadError(f"{self._files.path}: {error}; check the table with `scone verify`")

    def close(self) -> None:
        """Ends the copying; no other call may be under way or follow."""
        if self._copy is not None:
            self._copy.close()
        if self._share is not None:
            self._share.leave()

    def _search(self, index: BucketIndex) -> None:
        self.matcher = Matcher(index, self._stats.num_matched)
