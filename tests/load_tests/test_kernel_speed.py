from __future__ import annotations

import json
from pathlib import Path

import pytest

from load_tests import kernel_speed
from scone.kernels.extension import native
from scone.kernels.packed_linear import INSTRUCTION_SETS
from scone.model_store.decoder import Decoder


@pytest.mark.skipif(native is None, reason="the native extension was not built")
def test_every_piece_of_every_step_is_measured(
    tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Checkpoint:
        decoder = staticmethod(lambda dtype: tiny_decoder)

    out = tmp_path / "speed.json"
    monkeypatch.setattr(kernel_speed, "open_checkpoint", lambda path: Checkpoint)
    monkeypatch.setattr(kernel_speed, "machine_speed", lambda rounds: {})
    monkeypatch.setattr(kernel_speed, "ROUND_SECONDS", 0.0)
    arguments = ["--model", "tiny", "--rounds", "1", "--quantization", "int8", "--out", str(out)]
    kernel_speed.main([*arguments, "--instruction-sets", *INSTRUCTION_SETS])
    results = json.loads(out.read_text())["results"]
    measured = {(r["instruction_set"], r["kv_cache_dtype"], r["step"], r["piece"]) for r in results}
    assert measured == {
        (name, dtype, step.name, piece)
        for name in INSTRUCTION_SETS
        for dtype in ("float32", "bfloat16")
        for step in kernel_speed.STEPS
        for piece in ("layers", "head")
    }
    assert all(0 < r["best_ms"] <= r["median_ms"] and r["gflops"] > 0 and r["gbs"] > 0 for r in results)
