"""Counting and embedding on Ray Data, on this machine, against the local path (`make test-ray`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.count import count_fgrams
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus
from scone.server.cli import main

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")

from scone.model_store import build_table as build_module  # noqa: E402
from scone.model_store import ray_engine  # noqa: E402

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("max_n", [2, 5])
def test_counts_are_the_local_ones(max_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards, documents of all lengths down to none."""
    monkeypatch.setattr(ray_engine, "CHUNK_TOKENS", 7000)
    made_up = made_up_corpus(60_000)
    cuts = np.sort(np.random.default_rng(0).integers(0, 60_000, 400))
    corpus = TokenCorpus(made_up.tokens, np.concatenate(([0], cuts, cuts[:3], [60_000])).astype(np.int64))
    corpus = TokenCorpus(corpus.tokens, np.sort(corpus.offsets))
    numbers: dict[str, Any] = {"max_n": max_n, "min_count": 3, "top": 4000, "tokenizer_hash": "t"}
    local = count_fgrams(corpus, progress=False, **numbers)
    on_ray = ray_engine.count_on_ray(corpus, **numbers)
    assert len(local) > 1000
    assert on_ray.hash == local.hash
    assert np.array_equal(on_ray.tokens, local.tokens)
    assert np.array_equal(on_ray.counts, local.counts)


def content(table: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in table.iterdir()}


def test_tables_are_the_local_ones(
    checkpoint: Checkpoint, fgrams: FGramSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the build began here and goes on there."""
    monkeypatch.setattr(build_module, "ROWS_PER_BATCH", 256)
    build_table(checkpoint, fgrams, tmp_path / "local", codec="int8", progress=False)
    build_table(checkpoint, fgrams, tmp_path / "ray", codec="int8", engine="ray", progress=False)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    embed, calls = build_module.embed, iter(range(2))

    def interrupted(*arguments: Any) -> Any:
        next(calls)  # StopIteration at the third
        return embed(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "embed", interrupted)
        with pytest.raises((StopIteration, RuntimeError)):
            build_table(checkpoint, fgrams, tmp_path / "both", codec="int8", progress=False)
    report = build_table(checkpoint, fgrams, tmp_path / "both", codec="int8", engine="ray", progress=False)
    assert report.num_embedded == len(fgrams) - 512
    assert content(tmp_path / "both") == content(tmp_path / "local")


def test_the_commands(main_path: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    count = ["count", ray_engine.__file__, "--tokenizer", str(main_path), "--max-n", "3", "--min-count", "2"]
    build = ["build", "--model", str(checkpoint.path)]
    for engine in ("local", "ray"):
        fgrams, table = str(tmp_path / f"{engine}.fgrams"), str(tmp_path / engine)
        assert main([*count, "--out", fgrams, "--engine", engine]) == 0
        assert main([*build, "--fgrams", fgrams, "--out", table, "--engine", engine]) == 0
    assert (tmp_path / "ray.fgrams").read_bytes() == (tmp_path / "local.fgrams").read_bytes()
    assert content(tmp_path / "ray") == content(tmp_path / "local")
