"""A new generation of a table: f-grams added or dropped, all other rows copied instead of computed.

A row depends on its f-gram and the f-gram model alone, so the result is the table that `build_table` would
make of the changed set, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scone.model_store.build_table import ROWS_PER_BATCH, check_embeddable, embed
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.errors import CheckpointError, TableError
from scone.model_store.fgram_selection import find_fgrams, unite
from scone.model_store.fgram_set import FGramSet
from scone.model_store.row_errors import ERROR_DTYPE
from scone.model_store.table_files import open_table_files
from scone.model_store.table_writer import ERRORS_NAME, FGRAMS_NAME, TableWriter, encode_rows

StoredRowsOf = Callable[[NDArray[np.int64]], tuple[NDArray[np.uint8], NDArray[np.float32]]]
"""Ranks in the changed set (n,) -> their rows as they are stored (n, row_bytes), and their errors (n,)."""


class SourceTable:
    """The finished table that rows are copied from."""

    def __init__(self, path: Path) -> None:
        """Raises TableError, FGramSetError."""
        self.path = path
        self._files = open_table_files(path)
        self.manifest = self._files.manifest
        self.fgrams = FGramSet.load(path / FGRAMS_NAME)
        self._errors = np.memmap(path / ERRORS_NAME, ERROR_DTYPE, "r")

    def stored_rows(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """(n, row_bytes) and errors (n,) of row ids (n,) in rising order, neighbours in one read.

        Raises:
            TableError: the rows cannot be read.
        """
        row_bytes = self.manifest.row_bytes
        rows = np.empty((len(row_ids), row_bytes), np.uint8)
        breaks = np.flatnonzero(np.diff(row_ids) != 1) + 1
        try:
            for run in np.split(np.arange(len(row_ids)), breaks):
                if len(run):
                    out = rows[run[0] : run[-1] + 1].reshape(-1).data
                    self._files.read_stream(int(row_ids[run[0]]) * row_bytes, out)
        except OSError as error:
            raise TableError(f"cannot read the rows of {self.path}: {error}") from None
        return rows, self._errors[row_ids]

    def new_generation(self, out: Path, fgrams: FGramSet) -> TableWriter:
        """A writer of a table of the same kind for another set; raises TableError."""
        manifest = self.manifest
        return TableWriter.create(
            out,
            fgrams,
            dim=manifest.dim,
            dtype=manifest.dtype,
            codec=manifest.codec,
            backend=manifest.backend,
            model_hash=manifest.model_hash,
            fgram_model_hash=manifest.fgram_model_hash,
            tokenizer_hash=manifest.tokenizer_hash,
            fp_bits=manifest.fp_bits,
        )


def append_fgrams(
    table: SourceTable, added: FGramSet, checkpoint: Checkpoint, out: Path, *, progress: bool = True
) -> int:
    """Writes `table` with the f-grams of `added` as the new table `out`; returns how many were new.

    Raises:
        CheckpointError: the checkpoint has no f-gram model.
        FGramSetError: the sets do not fit together or the model cannot embed the new f-grams.
        TableError: another f-gram model made the table, it is damaged, or `out` cannot be written.
    """
    manifest = table.manifest
    if checkpoint.fgram_model_hash != manifest.fgram_model_hash:
        raise TableError(
            f"the rows of {table.path} were made by f-gram model {manifest.fgram_model_hash[:12]},"
            f" {checkpoint.path} has {(checkpoint.fgram_model_hash or 'none')[:12]}:"
            " give the one it was built with, or build the table anew"
        )
    decoder = checkpoint.decoder()
    model = checkpoint.fgram_model(decoder)
    if model is None:
        raise CheckpointError(f"{checkpoint.path} has no f-gram model")
    fgrams = unite(table.fgrams, added)
    check_embeddable(fgrams, model, checkpoint.config.vocab_size)
    source_ids = _source_ids(table.fgrams, fgrams)
    codec = manifest.row_codec

    def stored(ranks: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        ids = source_ids[ranks]
        rows = np.empty((len(ranks), codec.row_bytes), np.uint8)
        errors = np.empty(len(ranks), np.float32)
        # in rising order of the source's ids, so that neighbours are read together
        known = np.flatnonzero(ids >= 0)
        known = known[np.argsort(ids[known], kind="stable")]
        rows[known], errors[known] = table.stored_rows(ids[known])
        new = np.flatnonzero(ids < 0)
        rows[new], errors[new] = encode_rows(codec, embed(model, fgrams, ranks[new]))
        return rows, errors

    _write(table.new_generation(out, fgrams), fgrams, stored, progress)
    return int((source_ids < 0).sum())


def keep_fgrams(table: SourceTable, kept: FGramSet, out: Path, *, progress: bool = True) -> None:
    """Writes the rows of `kept`, a part of the table's set, as the new table `out`; raises TableError."""
    source_ids = _source_ids(table.fgrams, kept)
    assert (source_ids >= 0).all(), "`kept` holds f-grams that the table does not"
    _write(
        table.new_generation(out, kept), kept, lambda ranks: table.stored_rows(source_ids[ranks]), progress
    )


def _source_ids(source: FGramSet, fgrams: FGramSet) -> NDArray[np.int64]:
    """(len(fgrams),) row id of each f-gram in `source`, -1 where it is not there."""
    tokens = np.pad(source.tokens, ((0, 0), (0, fgrams.max_n - source.max_n)), constant_values=-1)
    return find_fgrams(tokens, fgrams.tokens)


def _write(writer: TableWriter, fgrams: FGramSet, stored: StoredRowsOf, progress: bool) -> None:
    with (
        writer,
        tqdm(
            desc="write rows",
            total=len(fgrams),
            initial=writer.num_rows_done,
            unit="row",
            disable=not progress,
        ) as bar,
    ):
        for start in range(writer.num_rows_done, len(fgrams), ROWS_PER_BATCH):
            ranks = np.arange(start, min(start + ROWS_PER_BATCH, len(fgrams)))
            writer.append_stored(*stored(ranks))
            bar.update(len(ranks))
        writer.finish()
