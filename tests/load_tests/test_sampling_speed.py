from __future__ import annotations

import json
from pathlib import Path

import pytest

from load_tests import sampling_speed
from scone.model_store.decoder import Decoder
from scone.model_store.tokenizer import Tokenizer


def test_every_way_is_measured_for_each_number_of_sequences(
    tiny_decoder: Decoder, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Checkpoint:
        model_hash = "6d" * 32
        decoder = staticmethod(lambda: tiny_decoder)
        tokenizer = staticmethod(lambda: byte_tokenizer)

    out = tmp_path / "speed.json"
    monkeypatch.setattr(sampling_speed, "open_checkpoint", lambda path: Checkpoint)
    arguments = ["--model", "tiny", "--num-seqs", "1", "3", "--tokens", "8", "--rounds", "1"]
    assert sampling_speed.main([*arguments, "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert {(r["num_seqs"], r["way"]) for r in results} == {
        (n, way) for n in (1, 3) for way in sampling_speed.WAYS
    }
    assert all(0 < r["best_ms"] <= r["median_ms"] and r["num_steps"] >= 3 for r in results)
