"""What look-up is measured on: f-grams counted from a corpus, text that was held out, a table of random rows.

Also the page cache's part in it: `drop_from_page_cache` makes a file cold, `resident_share` says how cold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache.errors import CacheError
from scone.model_store.count import count_fgrams
from scone.model_store.fgram_set import FGramSet, rank_order
from scone.model_store.table_files import open_table_files
from scone.model_store.table_writer import FGRAMS_NAME, TableWriter
from scone.model_store.token_corpus import TokenCorpus

MAX_N = 5
_TOKENIZER_HASH = "74" * 32
_ROWS_PER_APPEND = 1 << 16


@dataclass(frozen=True, eq=False)
class Workload:
    """Held-out text as it comes to a server.

    Attributes:
        prompts: (num_prompts, num_tokens) int64, stretches of the text.
        steps: (num_steps, batch, MAX_N) int32, the last tokens of sequences that decode together.
    """

    prompts: NDArray[np.int64]
    steps: NDArray[np.int32]


def hold_out(corpus: TokenCorpus, num_tokens: int) -> tuple[TokenCorpus, TokenCorpus]:
    """The corpus without its last documents, and those: at least `num_tokens` tokens of them."""
    cut = int(np.searchsorted(corpus.offsets, max(corpus.num_tokens - num_tokens, 0), side="right")) - 1
    at = int(corpus.offsets[cut])
    return (
        TokenCorpus(corpus.tokens[:at], corpus.offsets[: cut + 1]),
        TokenCorpus(corpus.tokens[at:], corpus.offsets[cut:] - at),
    )


def cut_workload(
    heldout: TokenCorpus, num_tokens: int, batch: int, *, num_prompts: int, num_steps: int
) -> Workload:
    """Prompts side by side from the start of the text, decode steps from anywhere in it."""
    num_prompts = min(num_prompts, heldout.num_tokens // num_tokens)
    if num_prompts < 1:
        raise CacheError(f"the held-out text has {heldout.num_tokens} tokens, a prompt needs {num_tokens}")
    prompts = heldout.tokens[: num_prompts * num_tokens].reshape(num_prompts, num_tokens).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(heldout.tokens, MAX_N)
    places = np.random.default_rng(0).integers(0, len(windows), (num_steps, batch))
    return Workload(prompts, np.ascontiguousarray(windows[places]))


def write_table(
    work: Path, corpus: TokenCorpus, *, num_rows: int, min_count: int, dim: int
) -> tuple[Path, FGramSet]:
    """The table of the corpus's most frequent f-grams, rows of seed 0; one of an earlier run is used.

    Where fewer than `num_rows` f-grams occur `min_count` times, made-up pairs (count 1) fill the set up.

    Raises:
        CacheError: the table of the earlier run is of another corpus.
    """
    path = work / f"table-{num_rows}-{dim}"
    if path.exists():
        fgrams = FGramSet.load(path / FGRAMS_NAME)
        if fgrams.corpus_hash != corpus.hash or fgrams.min_count != min_count:
            raise CacheError(f"{path} was made from another corpus: delete it, or give another --work")
        return path, fgrams
    counted = count_fgrams(
        corpus, max_n=MAX_N, min_count=min_count, top=num_rows, tokenizer_hash=_TOKENIZER_HASH
    )
    fgrams = _fill_up(counted, num_rows, int(corpus.tokens.max()) + 1)
    generator = torch.Generator().manual_seed(0)
    with TableWriter.create(
        path, fgrams, dim=dim, dtype="bfloat16", model_hash="6d" * 32, tokenizer_hash=_TOKENIZER_HASH
    ) as writer:
        for begin in range(0, num_rows, _ROWS_PER_APPEND):
            rows = torch.randn(min(_ROWS_PER_APPEND, num_rows - begin), dim, generator=generator)
            writer.append(rows[max(0, writer.num_rows_done - begin) :])
        writer.finish()
    return path, fgrams


def drop_from_page_cache(path: Path) -> None:
    """Makes the next reads of a file cold; pages that are mapped somewhere stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident_share(path: Path) -> float:
    """The share of a file's pages that are in the page cache (mincore)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        num_pages = -(-len(mapping) // mmap.PAGESIZE)
        flags = np.zeros(num_pages, np.uint8)
        view = np.frombuffer(mapping, np.uint8)  # of memory that may not be written to
        try:
            address = ctypes.c_void_p(view.ctypes.data)
            size = ctypes.c_size_t(len(mapping))
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mincore(address, size, flags.ctypes.data_as(ctypes.c_char_p)) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        finally:
            del view  # else the mapping could not be closed
    return float((flags & 1).mean())


def row_file(table: Path) -> Path:
    """The file of the rows; raises TableError if there is no table."""
    return open_table_files(table).rows_path


def _fill_up(fgrams: FGramSet, num_rows: int, vocab_size: int) -> FGramSet:
    """The set with made-up pairs at its end, `num_rows` in all; still closed, as pairs have no parts."""
    missing = num_rows - len(fgrams)
    if missing <= 0:
        return fgrams
    pairs = fgrams.tokens[fgrams.lengths == 2, :2].astype(np.int64)
    taken = pairs[:, 0] * vocab_size + pairs[:, 1]
    # twice as many as needed: some are taken, some are drawn twice
    drawn = np.random.default_rng(0).integers(0, vocab_size**2, 2 * missing + 1000)
    fresh = np.setdiff1d(drawn, taken)
    fresh = np.random.default_rng(1).permutation(fresh)[:missing]
    tokens = np.full((len(fresh), fgrams.max_n), -1, np.int32)
    tokens[:, 0], tokens[:, 1] = fresh // vocab_size, fresh % vocab_size
    lengths, counts = np.full(len(fresh), 2, np.uint8), np.ones(len(fresh), np.int64)
    order = rank_order(tokens, lengths, counts)
    return FGramSet(
        np.concatenate((fgrams.tokens, tokens[order])),
        np.concatenate((fgrams.lengths, lengths)),
        np.concatenate((fgrams.counts, counts)),
        fgrams.tokenizer_hash,
        fgrams.min_count,
        fgrams.num_corpus_tokens,
        fgrams.corpus_hash,
    )
