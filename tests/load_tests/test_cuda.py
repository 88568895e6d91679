"""The benchmark of a GPU, tried out on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from load_tests.cuda.__main__ import main
from load_tests.cuda.bench import Bench

TINY = (
    "--device cpu --layers 1 --parts decode --tables ram --seqs 2 --tokens 65"
    " --rows 300 --corpus-tokens 20000 --kv-cache-bytes 40000000"
)


def test_sequences_follow_the_text_and_a_part_fails_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise OSError("no such engine")

    monkeypatch.setattr(Bench, "start", refuse)
    main([*TINY.split(), "--work", str(tmp_path), "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["start"]["torch"] == "failed: OSError: no such engine"
    assert "matched" not in figures["decode torch none"]["2"]
    run = figures["decode torch ram"]["2"]
    assert run["tokens_per_second"] > 0
    assert run["matched"] > 0.3  # 0.2 where only the prompts are text
