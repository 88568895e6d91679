"""One generation of the served table: an open folder that nobody changes any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from scone.cache import FGramTable, TableConfig
from scone.cache.stats import TableStats
from scone.model_store.errors import TableError
from scone.model_store.manifest import MANIFEST_NAME
from scone.model_store.table_writer import FGRAMS_NAME


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """What the model sees for one token; row_id is -1 where that is the token's own embedding."""

    matched_len: int
    row_id: int
    count: int | None
    tier: str | None


class TableGeneration:
    """An open table and its f-grams' counts.

    Attributes:
        folder: where it lay when it was opened; a later generation may have taken its place since.
        number: 1 for the table the server started with.
        identity: device and inode of the manifest: the same for the same files, wherever they lie.
    """

    def __init__(
        self, folder: Path, number: int, config: TableConfig | None, stats: TableStats | None = None
    ) -> None:
        """Opens the table, counting into `stats` if given; raises TableError."""
        self.folder = folder
        self.number = number
        self.identity = file_identity(folder)  # before: what comes later will then look newer
        self.table = FGramTable.open(folder, config, stats)
        try:
            # Kept open: by its path, another generation's may be found later.
            self._fgrams = safe_open(folder / FGRAMS_NAME, framework="numpy")
        except (OSError, SafetensorError) as error:
            self.table.close()
            raise TableError(f"cannot open the f-grams of the table {folder}: {error}") from None
        self._changed = threading.Condition()
        self._num_holders = 0

    @contextmanager
    def hold(self) -> Iterator[TableGeneration]:
        """The generation stays open for so long."""
        with self._changed:
            self._num_holders += 1
        try:
            yield self
        finally:
            with self._changed:
                self._num_holders -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Waits until nobody holds it; nobody may begin to afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_holders)
        self.table.close()

    def explain(self, input_ids: Sequence[int]) -> list[TokenMatch]:
        """What each token of a sequence matches, with corpus counts. Reads the disk; raises RowReadError."""
        row_ids, matched_len = self.table.match(input_ids)
        tiers = self.table.tier_of(row_ids).tolist()
        counts = self._counts(sorted(set(row_ids[row_ids >= 0].tolist())))
        return [
            TokenMatch(n, row_id, counts.get(row_id), tier or None)
            for n, row_id, tier in zip(matched_len.tolist(), row_ids.tolist(), tiers, strict=True)
        ]

    def check_readable(self) -> None:
        """Reads one row; raises RowReadError."""
        self.table.rows([0])

    def _counts(self, row_ids: Sequence[int]) -> dict[int, int]:
        """Corpus counts by row id, read one by one: a large set's counts do not fit into memory."""
        counts = self._fgrams.get_slice("counts")  # type: ignore[no-untyped-call]
        return {row_id: int(counts[row_id : row_id + 1][0]) for row_id in row_ids}


def file_identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of the manifest in `folder`; None if there is none."""
    try:
        status = (folder / MANIFEST_NAME).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
