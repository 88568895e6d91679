"""10,000 sequences of real text: every backend, every chunking and a plain dict give the same bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache import FGramTable
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.count import count_fgrams
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS
from scone.model_store.table_writer import TableWriter
from scone.model_store.token_corpus import TokenCorpus

NUM_SEQUENCES = 10_000
MAX_LEN = 24
DIM = 16
MAX_N = 5
COUNTED_BYTES, READ_BYTES = 1_500_000, 600_000


@pytest.fixture(scope="module")
def documents(smollm2_path: Path) -> list[list[int]]:
    """Modules of Python's standard library as SmolLM2's tokens: those to count, then more."""
    tokenizer = open_checkpoint(smollm2_path).tokenizer()
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(errors="replace"))
        if sum(map(len, texts)) > COUNTED_BYTES + READ_BYTES:
            break
    return tokenizer.encode_batch(texts)


@pytest.fixture(scope="module")
def fgrams(documents: list[list[int]], smollm2_path: Path) -> FGramSet:
    num_counted = int(len(documents) * COUNTED_BYTES / (COUNTED_BYTES + READ_BYTES))
    tokenizer_hash = open_checkpoint(smollm2_path).tokenizer().hash
    corpus = TokenCorpus.from_documents(documents[:num_counted])
    return count_fgrams(
        corpus, max_n=MAX_N, min_count=3, top=40_000, tokenizer_hash=tokenizer_hash, progress=False
    )


@pytest.fixture(scope="module")
def sequences(documents: list[list[int]]) -> list[NDArray[np.int32]]:
    """Pieces of 1 to MAX_LEN tokens from anywhere in the text, counted or not."""
    generator = np.random.default_rng(0)
    stream = np.concatenate([np.array(document, np.int32) for document in documents])
    starts = generator.integers(0, len(stream) - MAX_LEN, NUM_SEQUENCES)
    lengths = generator.integers(1, MAX_LEN + 1, NUM_SEQUENCES)
    return [stream[start : start + n] for start, n in zip(starts, lengths, strict=True)]


class DictTable:
    """The paper's recipe, in plain Python: probe the longest f-gram first, then the shorter ones."""

    def __init__(self, fgrams: FGramSet, rows: Tensor) -> None:
        keys = zip(fgrams.tokens.tolist(), fgrams.lengths.tolist(), strict=True)
        self.row_ids = {tuple(tokens[:n]): row_id for row_id, (tokens, n) in enumerate(keys)}
        self.rows = rows

    def match(self, input_ids: NDArray[np.int32]) -> tuple[list[int], list[int]]:
        tokens = input_ids.tolist()
        found = [self._longest(tokens[max(0, end - MAX_N) : end]) for end in range(1, len(tokens) + 1)]
        return [row_id for row_id, _ in found], [n for _, n in found]

    def _longest(self, window: list[int]) -> tuple[int, int]:
        for n in range(len(window), 1, -1):
            row_id = self.row_ids.get(tuple(window[-n:]))
            if row_id is not None:
                return row_id, n
        return -1, 1


@pytest.fixture(scope="module")
def dict_table(fgrams: FGramSet) -> DictTable:
    generator = torch.Generator().manual_seed(0)
    return DictTable(fgrams, torch.randn(len(fgrams), DIM, generator=generator).to(torch.bfloat16))


@pytest.fixture(scope="module")
def tables(
    fgrams: FGramSet, dict_table: DictTable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tables")
    for backend in BACKENDS:
        writer = TableWriter.create(
            root / backend,
            fgrams,
            dim=DIM,
            dtype="bfloat16",
            backend=backend,
            model_hash="6d" * 32,
            tokenizer_hash=fgrams.tokenizer_hash,
        )
        writer.append(dict_table.rows.float())
        writer.finish()
    return {backend: root / backend for backend in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_table_equals_a_dict(
    backend: str, tables: dict[str, Path], dict_table: DictTable, sequences: list[NDArray[np.int32]]
) -> None:
    seen = dict.fromkeys(range(1, MAX_N + 1), 0)
    with FGramTable.open(tables[backend]) as table:
        for input_ids in sequences:
            row_ids, matched_len = table.match(input_ids)
            expected_ids, expected_len = dict_table.match(input_ids)
            assert row_ids.tolist() == expected_ids
            assert matched_len.tolist() == expected_len
            hits = row_ids >= 0
            got = table.rows(row_ids)[hits].view(torch.int16)
            assert torch.equal(got, dict_table.rows[row_ids[hits]].view(torch.int16))
            for n in expected_len:
                seen[n] += 1
    assert min(seen.values()) > 1000, f"too few of some length to prove anything: {seen}"


def test_no_chunking_changes_a_match(tables: dict[str, Path], sequences: list[NDArray[np.int32]]) -> None:
    """A chunk is matched with the MAX_N - 1 tokens before it and nothing else; a decoded token likewise."""
    with FGramTable.open(tables["mmap"]) as table:
        for input_ids in sequences:
            whole_ids, whole_len = (array.tolist() for array in table.match(input_ids))
            windows = np.full((len(input_ids), MAX_N), -1, np.int32)
            for cut in range(len(input_ids)):
                context = input_ids[max(0, cut - MAX_N + 1) : cut]
                row_ids, matched_len = table.match(np.concatenate([context, input_ids[cut:]]))
                assert row_ids[len(context) :].tolist() == whole_ids[cut:]
                assert matched_len[len(context) :].tolist() == whole_len[cut:]
                history = input_ids[max(0, cut - MAX_N + 1) : cut + 1]
                windows[cut, MAX_N - len(history) :] = history
            row_ids, matched_len = table.match_last(windows)
            assert row_ids.tolist() == whole_ids
            assert matched_len.tolist() == whole_len
