"""What a table costs a model: the ratios of neighbours, and how sure they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scone.model_store.decoder import Decoder
from scone.model_store.fgram_set import FGramSet
from scone.model_store.tokenizer import Tokenizer
from scone.server import model_benchmark
from scone.server.errors import SettingError
from scone.server.model_benchmark import ModelBenchmark, spread

TEXT = "the cat and the dog and " * 250


@dataclass
class TinyCheckpoint:
    """One open model."""

    tiny: Decoder
    tokens: Tokenizer
    model_hash: str = "6d" * 32

    def decoder(self) -> Decoder:
        return self.tiny

    def tokenizer(self) -> Tokenizer:
        return self.tokens


@pytest.fixture
def checkpoint(
    tiny_decoder: Decoder, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> TinyCheckpoint:
    checkpoint = TinyCheckpoint(tiny_decoder, byte_tokenizer)
    monkeypatch.setattr(model_benchmark, "open_checkpoint", lambda _: checkpoint)
    return checkpoint


@pytest.fixture
def benchmark(
    checkpoint: TinyCheckpoint,
    fgram_set: Callable[..., FGramSet],
    write_table: Callable[..., Path],
    tmp_path: Path,
) -> Iterator[ModelBenchmark]:
    tokenizer = checkpoint.tokens
    fgrams = fgram_set({tuple(tokenizer.encode(text)): 9 for text in ("th", "he", "the", "an", "nd", "and")})
    fgrams = replace(fgrams, tokenizer_hash=tokenizer.hash)
    hashes = {"model_hash": checkpoint.model_hash, "tokenizer_hash": tokenizer.hash}
    table = write_table(tmp_path / "table", fgrams, dim=checkpoint.tiny.config.dim, **hashes)
    (tmp_path / "text").write_text(TEXT)
    with ModelBenchmark("tiny", str(table), tmp_path / "text") as benchmark:
        yield benchmark


def test_each_ratio_comes_from_both_copies_with_and_without(benchmark: ModelBenchmark) -> None:
    rows_before = benchmark._table.stats.rows_read.total()
    prefill = benchmark.prefill(2)
    assert prefill["with_over_without"]["num_ratios"] == 2
    # The prompt was read with the table twice, on each copy once, and without it as often.
    found = sum(int((benchmark._table.match(benchmark._prompt(i, 2000))[0] >= 0).sum()) for i in range(2))
    assert benchmark._table.stats.rows_read.total() - rows_before == 2 * found
    decode = benchmark.decode(1)
    for num, num_steps in ((1, 200), (32, 40)):
        measured = decode[f"{num}_sequences"]
        assert num_steps - 4 < measured["with_over_without"]["num_ratios"] < num_steps
        assert 0.2 < measured["with_over_without"]["median"] < 5
        assert min(measured["tokens_per_second"].values()) > 0


def test_a_short_text_is_refused(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("too short")
    with pytest.raises(SettingError, match="9 tokens, wanted at least 4000"):
        ModelBenchmark("tiny", "nowhere", tmp_path / "text")


def test_the_interval_holds_the_true_median_19_times_of_20() -> None:
    generator = random.Random(0)
    num_held = 0
    for _ in range(500):
        spreading = spread([generator.lognormvariate(0.0, 0.3) for _ in range(60)])
        low, high = spreading["interval"]
        assert low <= spreading["median"] <= high
        num_held += low <= 1.0 <= high
    assert 460 <= num_held <= 490


def test_few_values_have_a_wide_interval() -> None:
    assert spread([2.0]) == {"median": 2.0, "interval": [2.0, 2.0], "quartiles": [2.0, 2.0], "num_ratios": 1}
    assert spread([3.0, 1.0, 2.0])["interval"] == [1.0, 3.0]
