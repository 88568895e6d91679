"""Which rows prompts ask for: read off a real text, or assumed; and what of them each tier has to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowPattern:
    """What prompts of one length ask of a table whose first `num_ram_rows` rows are in memory.

    Attributes:
        prompts: row ids (num_tokens,) int64 of each prompt, -1 where no f-gram ends.
    """

    prompts: Sequence[I64]
    num_ram_rows: int

    @property
    def num_tokens(self) -> int:
        """Of a prompt."""
        return len(self.prompts[0])

    @property
    def matched_share(self) -> float:
        """Positions where an f-gram ends."""
        return float(np.mean(np.concatenate(self.prompts) >= 0))

    @property
    def ram_share(self) -> float:
        """Positions whose row is in memory."""
        return self.matched_share - self.disk_share

    @property
    def disk_share(self) -> float:
        """Positions whose row is on the disk."""
        return float(np.mean(np.concatenate(self.prompts) >= self.num_ram_rows))

    def num_disk_rows(self, num_tokens: int) -> float:
        """Distinct rows on the disk that the first `num_tokens` of a prompt need, on average."""
        heads = (np.unique(ids[:num_tokens]) for ids in self.prompts)
        return float(np.mean([(ids >= self.num_ram_rows).sum() for ids in heads]))


def assumed_prompts(num_fgrams: int, num_prompts: int, num_tokens: int, matched_share: float) -> list[I64]:
    """Row ids as of text whose f-grams follow Zipf's law: rank r is met in proportion to 1 / (r + 1)."""
    rng = np.random.default_rng(0)
    shape = (num_prompts, num_tokens)
    ranks = np.minimum(float(num_fgrams) ** rng.random(shape), num_fgrams).astype(np.int64) - 1
    return list(np.where(rng.random(shape) < matched_share, ranks, -1))
