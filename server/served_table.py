"""The f-gram table that the server answers with, and what /v1/tables and /v1/fgrams/match say of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from scone.cache import FGramTable, TableConfig
from scone.model_store.table_writer import FGRAMS_NAME


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """What the model sees for one token; row_id is -1 where that is the token's own embedding."""

    matched_len: int
    row_id: int
    count: int | None
    tier: str | None


class ServedTable:
    """One generation of the table; `close` it when no request uses it any more.

    Attributes:
        generation: 1 for the table the server started with.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: TableConfig | None = None, *, generation: int = 1
    ) -> None:
        """Opens the table; raises TableError."""
        self.path = Path(path)
        self.name = self.path.resolve().name
        self.generation = generation
        self.table = FGramTable.open(path, config)

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

    def close(self) -> None:
        self.table.close()

    def _counts(self, row_ids: Sequence[int]) -> dict[int, int]:
        """Corpus counts by row id, read one by one: a large set's counts do not fit into memory."""
        with safe_open(self.path / FGRAMS_NAME, framework="numpy") as fgrams:
            counts = fgrams.get_slice("counts")
            return {row_id: int(counts[row_id : row_id + 1][0]) for row_id in row_ids}
