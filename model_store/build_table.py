"""Builds a table: the f-gram model applied to every f-gram of a set, rows written in rank order.

The offline half of SCONE (arXiv 2502.01637, section 3.2): after training, F = A_fgram over the whole set.
A build that was ended in the middle goes on where it stopped; the result has the same bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from scone.model_store.checkpoint import Checkpoint
from scone.model_store.errors import CheckpointError, FGramSetError
from scone.model_store.fgram_model import EMBED_BLOCK_ROWS, FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.ray_engine import embed_on_ray
from scone.model_store.table_writer import TableWriter

# The f-gram model computes blocks of one length, the last of each padded; among this many f-grams
# that padding is a few per cent.
ROWS_PER_BATCH = 64 * EMBED_BLOCK_ROWS


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did; `num_embedded` leaves out rows that an earlier, unfinished build had written."""

    num_fgrams: int
    num_embedded: int
    seconds: float
    table_bytes: int


def build_table(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    out: Path,
    *,
    backend: str = "mmap",
    codec: str = "raw",
    dtype: str = "bfloat16",
    engine: str = "local",
    device: torch.device | None = None,
    progress: bool = True,
) -> BuildReport:
    """Writes the table of `fgrams` to the new folder `out`; with engine `ray` the rows come from a cluster.

    They are computed on `device`, by default the CPU; devices differ in a row's last bits.

    Raises:
        CheckpointError: the checkpoint has no f-gram model.
        FGramSetError: the set is empty, or holds f-grams that the model cannot embed.
        TableError: as TableWriter.create.
    """
    begun = time.monotonic()
    decoder = checkpoint.decoder().to(device or "cpu")
    model = checkpoint.fgram_model(decoder)
    if model is None:
        raise CheckpointError(
            f"{checkpoint.path} has no f-gram model: train one with `scone train`, or give the folder of one"
        )
    check_embeddable(fgrams, model, checkpoint.config.vocab_size)
    with TableWriter.create(
        out,
        fgrams,
        dim=checkpoint.config.dim,
        dtype=dtype,
        codec=codec,
        backend=backend,
        model_hash=checkpoint.model_hash,
        fgram_model_hash=checkpoint.fgram_model_hash or "",
        tokenizer_hash=checkpoint.tokenizer().hash,
    ) as writer:
        num_done = writer.num_rows_done
        with tqdm(
            desc="embed f-grams", total=len(fgrams), initial=num_done, unit="row", disable=not progress
        ) as bar:
            if engine == "ray":
                parts = embed_on_ray(checkpoint.path, fgrams, num_done, ROWS_PER_BATCH)
            else:
                starts = range(num_done, len(fgrams), ROWS_PER_BATCH)
                parts = (embed(model, fgrams, slice(start, start + ROWS_PER_BATCH)) for start in starts)
            for rows in parts:
                writer.append(rows)
                bar.update(len(rows))
        writer.finish()
    table_bytes = sum(file.stat().st_size for file in out.iterdir())
    return BuildReport(len(fgrams), len(fgrams) - num_done, time.monotonic() - begun, table_bytes)


def embed(model: FGramModel, fgrams: FGramSet, ranks: NDArray[np.int64] | slice) -> torch.Tensor:
    """Rows of the f-grams of these ranks (n,), (n, dim) float32; each depends on its f-gram alone."""
    token_ids = torch.from_numpy(fgrams.tokens[ranks].astype(np.int64))
    lengths = torch.from_numpy(fgrams.lengths[ranks].astype(np.int64))
    return model.embed(token_ids, lengths)


def check_embeddable(fgrams: FGramSet, model: FGramModel, vocab_size: int) -> None:
    """Raises FGramSetError if the set is empty or outside of what the model takes."""
    if not len(fgrams):
        raise FGramSetError("the f-gram set is empty: count a larger corpus, or with a smaller --min-count")
    if (longest := int(fgrams.lengths.max())) > model.max_n:
        raise FGramSetError(
            f"the set holds f-grams of {longest} tokens, the f-gram model takes at most {model.max_n}:"
            f" count again with --max-n {model.max_n}"
        )
    if (largest := int(fgrams.tokens.max())) >= vocab_size:
        raise FGramSetError(f"the set holds token id {largest}, the model has ids below {vocab_size}")
