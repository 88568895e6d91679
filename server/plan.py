"""What a table will need and what a model with it will do on this machine, before either is built.

Sizes follow from the format. Times are counts times unit costs: counts of rows by tier from a text or from
Zipf's law, unit costs from a short probe of memory, disk and model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scone.cache import FGramTable, TableConfig
from scone.cache.lookup_costs import LookupCosts, measure_lookup_costs, write_probe_table
from scone.cache.row_pattern import I64, RowPattern
from scone.kernels.row_codec import RowCodec
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.fgram_set import FGramSet, rank_order
from scone.model_store.table_size import TableSize, predict_table_size
from scone.server.engine.input_rows import CHUNK_TOKENS
from scone.server.model_speed import ModelSpeed, measure_model_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTable:
    """The table to be, and how it is to be read.

    Attributes:
        mean_length: tokens of an f-gram on average.
        folder: where it will lie; the disk below is probed.
        config: budgets and ways of reading, as of `scone serve`.
    """

    num_fgrams: int
    codec: RowCodec
    backend: str
    mean_length: float
    folder: Path
    config: TableConfig

    @property
    def size(self) -> TableSize:
        return predict_table_size(
            self.codec, self.num_fgrams, backend=self.backend, mean_length=self.mean_length
        )

    @property
    def num_ram_rows(self) -> int:
        return self.config.ram_plan(self.num_fgrams, self.codec.row_bytes, self.size.index).num_rows


@dataclass(frozen=True, slots=True)
class Plan:
    """Predictions for prompts like those of `pattern`, and for decode steps of `batch` sequences.

    Attributes:
        speed: of the model with a small table in memory; None: no model was given.
    """

    pattern: RowPattern
    batch: int
    costs: LookupCosts
    speed: ModelSpeed | None

    @property
    def prompt_disk_us(self) -> float:
        """A prompt's rows that are on the disk, read together."""
        return self.costs.disk(self.pattern.num_disk_rows(self.pattern.num_tokens))

    @property
    def step_disk_us(self) -> float:
        """What a decode step waits for the disk, on average."""
        share = self.pattern.disk_share
        any_of_them = 1 - (1 - share) ** self.batch
        return any_of_them * self.costs.disk_round + self.batch * share * self.costs.disk_row

    @property
    def first_token_ms(self) -> float | None:
        """The first chunk's rows are waited for; the others are read while the model computes."""
        if self.speed is None:
            return None
        exposed = self.costs.disk(self.pattern.num_disk_rows(CHUNK_TOKENS))
        exposed += max(0.0, self.prompt_disk_us - 1e6 * self.speed.first_token)
        return 1e3 * self.speed.first_token + exposed / 1e3

    @property
    def token_ms(self) -> float | None:
        """Milliseconds from one token of a sequence to the next while `batch` of them decode."""
        if self.speed is None:
            return None
        return 1e3 * self.speed.step + self.step_disk_us / 1e3


def make_plan(
    table: PlannedTable,
    pattern: RowPattern,
    fgrams: FGramSet,
    texts: Sequence[I64],
    *,
    batch: int,
    checkpoint: Checkpoint | None = None,
    prompts: Sequence[Sequence[int]] = (),
) -> Plan:
    """Probes the machine with `fgrams` and `texts` and, with a checkpoint, the model on `prompts`.

    Raises:
        TableError: the folder cannot take the probe's tables.
        SconeError: the engine cannot run the model.
    """
    costs = measure_lookup_costs(
        table.codec,
        fgrams,
        texts,
        pattern,
        table.folder,
        batch=batch,
        config=table.config,
    )
    speed = None
    if checkpoint is not None:
        speed = _probe_model(checkpoint, table, prompts, pattern.matched_share, batch)
    return Plan(pattern, batch, costs, speed)


def _probe_model(
    checkpoint: Checkpoint,
    table: PlannedTable,
    prompts: Sequence[Sequence[int]],
    matched_share: float,
    batch: int,
) -> ModelSpeed:
    """With a small table, of pairs that end at `matched_share` of the prompts' positions."""
    fgrams = _pairs_of(prompts, matched_share, checkpoint.tokenizer().hash)
    with tempfile.TemporaryDirectory(dir=table.folder, prefix="scone-probe-") as work:
        path = write_probe_table(
            Path(work) / "table",
            fgrams,
            table.codec,
            model_hash=checkpoint.model_hash,
        )
        with FGramTable.open(path, TableConfig(ram_bytes=1 << 50)) as small:
            small.wait_loaded()
            return measure_model_speed(checkpoint, small, prompts, batch)


def _pairs_of(prompts: Sequence[Sequence[int]], share: float, tokenizer_hash: str) -> FGramSet:
    tokens = np.asarray(prompts, np.int32)
    pairs = np.stack((tokens[:, :-1], tokens[:, 1:]), axis=2).reshape(-1, 2)
    distinct, first = np.unique(pairs, axis=0, return_index=True)
    chosen = distinct[np.random.default_rng(0).random(len(first)) < max(share, 1 / len(first))]
    if not len(chosen):
        chosen = distinct[:1]
    lengths, counts = np.full(len(chosen), 2, np.uint8), np.ones(len(chosen), np.int64)
    return FGramSet(
        chosen[rank_order(chosen, lengths, counts)], lengths, counts, tokenizer_hash, 1, tokens.size
    )
