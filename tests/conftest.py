"""Fixtures every test folder may use: the real demo model, and a tiny random one of the same family."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.cache.device import Event, Stream
from scone.cache.sim_device import SimDevice
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_set import FGramSet, rank_order
from scone.model_store.model_config import ModelConfig
from scone.model_store.table_writer import TableWriter
from scone.model_store.tokenizer import _BYTE_OF_CHARACTER, Tokenizer, tokenizer_from_vocabulary

ROOT = Path(__file__).parent.parent
MODEL_HASH, TOKENIZER_HASH = "6d" * 32, "74" * 32
TINY = ModelConfig(
    architecture="llama",
    vocab_size=300,
    dim=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=512,
    eos_ids=(2,),
)


class Forgetful(SimDevice):
    """A device on which one kind of synchronisation does nothing, as if its line were deleted."""

    def __init__(self, seed: int, forgotten: str) -> None:
        super().__init__(seed)
        self.forgotten = forgotten

    def synchronize(self, event: Event) -> None:
        if self.forgotten != "host waits for copied":
            super().synchronize(event)

    def wait(self, stream: Stream, event: Event) -> None:
        if self.forgotten != f"{stream.value} stream waits":
            super().wait(stream, event)

    def record(self, event: Event, stream: Stream) -> None:
        if self.forgotten != f"{stream.value} stream is recorded":
            super().record(event, stream)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; `make test` fetches it."""
    path = Path(os.environ.get("SCONE_TEST_MODEL", ROOT / "data/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make test`, or set SCONE_TEST_MODEL to a copy of it")
    return path


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    return make_decoder


@pytest.fixture(scope="session")
def tiny_decoder() -> Decoder:
    """Three layers, grouped-query, tied head."""
    return make_decoder()


def make_decoder(**shape: Any) -> Decoder:
    """A random decoder of the tiny shape but for `shape`, spread enough for its argmax to be clear."""
    torch.manual_seed(0)
    decoder = Decoder(replace(TINY, **shape))
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return decoder.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Three special tokens (2 ends a text), then the 256 bytes."""
    characters = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}
    return tokenizer_from_vocabulary(
        pieces=["<unk>", "<s>", "</s>", *(characters[b] for b in range(256))],
        piece_types=[3, 3, 3] + [1] * 256,
        merges=[],
        pre_tokenizer="gpt-2",
        bos_id=1,
        add_bos=False,
        eos_ids=(2,),
        chat_template=None,
    )


@pytest.fixture(scope="session")
def zipf_tokens() -> NDArray[np.int64]:
    """40,000 token ids below 2,000 with the skew of real text."""
    return np.random.default_rng(0).zipf(1.3, 40_000) % 2000


@pytest.fixture(scope="session")
def zipf_fgrams(zipf_tokens: NDArray[np.int64]) -> FGramSet:
    """The f-grams of `zipf_tokens`: K = 5, minimum count 3; some 4,000, closed."""
    counts: Counter[tuple[int, ...]] = Counter()
    for n in range(2, 6):
        counts.update(map(tuple, np.lib.stride_tricks.sliding_window_view(zipf_tokens, n).tolist()))
    return make_fgram_set({fgram: count for fgram, count in counts.items() if count >= 3})


def make_fgram_set(counts: Mapping[tuple[int, ...], int], max_n: int = 5) -> FGramSet:
    """A ranked set of exactly these f-grams, counted with tokenizer TOKENIZER_HASH."""
    tokens = np.full((len(counts), max_n), -1, np.int32)
    for i, fgram in enumerate(counts):
        tokens[i, : len(fgram)] = fgram
    lengths = np.array([len(fgram) for fgram in counts], np.uint8)
    totals = np.array(list(counts.values()), np.int64)
    order = rank_order(tokens, lengths, totals)
    return FGramSet(tokens[order], lengths[order], totals[order], TOKENIZER_HASH, 1, int(totals.sum()))


@pytest.fixture(scope="session")
def fgram_set() -> Callable[..., FGramSet]:
    """`make_fgram_set`, for tests that make sets of their own."""
    return make_fgram_set


@pytest.fixture(scope="session")
def write_table() -> Callable[..., Path]:
    """write_table(out, fgrams, dim=64, **options of TableWriter.create): normal rows of seed 0."""

    def write(out: Path, fgrams: FGramSet, *, dim: int = 64, dtype: str = "bfloat16", **options: Any) -> Path:
        hashes: dict[str, Any] = {"model_hash": MODEL_HASH, "tokenizer_hash": TOKENIZER_HASH}
        writer = TableWriter.create(out, fgrams, dim=dim, dtype=dtype, **(hashes | options))
        writer.append(table_rows(len(fgrams), dim)[writer.num_rows_done :])
        writer.finish()
        return out

    return write


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    """write_rows(out, fgrams, dim): row r is r % 128 everywhere; written piece by piece."""

    def write(out: Path, fgrams: FGramSet, dim: int) -> Path:
        hashes: dict[str, Any] = {"model_hash": MODEL_HASH, "tokenizer_hash": TOKENIZER_HASH}
        writer = TableWriter.create(out, fgrams, dim=dim, dtype="bfloat16", **hashes)
        for begin in range(0, len(fgrams), 256):
            ids = torch.arange(begin, min(begin + 256, len(fgrams)))
            writer.append((ids % 128).float()[:, None].expand(-1, dim))
        writer.finish()
        return out

    return write


def table_rows(num_rows: int, dim: int) -> torch.Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0))
