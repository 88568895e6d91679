"""The counting benchmark runs, checks its result, and ends with one JSON object."""

import json
from pathlib import Path

import numpy as np
import pytest

from scone.model_store.count_benchmark import benchmark, made_up_corpus, main


def test_the_last_line_is_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", "20000", "--top", "500", "--memory", "0.0001"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["benchmark"] == "count"
    assert (measured["num_tokens"], measured["num_fgrams"]) == (20000, 500)
    assert measured["seconds"] > 0
    assert measured["np_unique"]["seconds"] > 0

    made_up_corpus(5000, seed=1).save(tmp_path / "x.npz")
    assert main(["--corpus", str(tmp_path / "x.npz"), "--max-n", "5"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["num_tokens"] == 5000
    assert "np_unique" not in measured  # five ids do not fit one int64


def test_a_wrong_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = made_up_corpus(20000)
    right = benchmark(corpus, max_n=3, top=500, memory_bytes=None)
    assert right["num_fgrams"] == 500
    monkeypatch.setattr(
        "scone.model_store.count_benchmark._unique_counts",
        lambda corpus, max_n: [np.full(1000, 7, np.int64)],
    )
    with pytest.raises(AssertionError, match="disagree"):
        benchmark(corpus, max_n=3, top=500, memory_bytes=None)


def test_a_missing_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--corpus", str(tmp_path / "missing.npz")]) == 1
    assert "missing.npz" in capsys.readouterr().err
