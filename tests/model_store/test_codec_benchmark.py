"""`scone bench codec`: every codec and the lossy rivals on one table's rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.fgram_set import FGramSet
from scone.model_store.lossy_rows import LowRankRows, ProductQuantizedRows, in_parts
from scone.model_store.row_errors import relative_errors
from scone.server.cli import main


def test_low_rank_is_the_best_of_its_rank() -> None:
    """Of rows with a mean and a steep spectrum; the best rank r leaves the smaller singular values."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 32, generator=generator) * 0.8 ** torch.arange(32.0) + 3
    for rank in (4, 16, 32):
        kept = in_parts(LowRankRows(rows, rank), rows)
        singular = torch.linalg.svdvals(rows - rows.mean(0))
        expected = float(singular[rank:].square().sum().sqrt())
        assert float((kept - rows).norm()) == pytest.approx(expected, rel=0.01, abs=0.2)
    assert LowRankRows(rows, 4).row_bytes == 8


def test_product_quantisation_finds_the_clusters() -> None:
    """Rows of 200 distinct parts are restored exactly; normal rows as well as 4 bits a value allow."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(200, 2, generator=generator)
    rows = distinct[torch.randint(200, (2000, 8), generator=generator)].reshape(2000, 16)
    normal = torch.randn(8000, 16, generator=generator)
    pq = ProductQuantizedRows(normal, 2)
    assert pq.row_bytes == 8
    # 256 cells are 16 to a dimension: a 4-bit scalar quantiser made for normal values leaves 10.7 %
    assert relative_errors(normal, in_parts(pq, normal)).mean() == pytest.approx(0.09, abs=0.01)
    restored = in_parts(ProductQuantizedRows(rows, 2), rows)
    assert float(((restored - rows).abs() < 1e-4).float().mean()) > 0.5
    assert relative_errors(rows, restored).mean() < 0.05
    with pytest.raises(ValueError, match="there are 100 rows, wanted at least 256"):
        ProductQuantizedRows(rows[:100], 2)


def test_the_command(
    checkpoint: Checkpoint, fgrams: FGramSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_table(checkpoint, fgrams, tmp_path / "raw", progress=False)
    build_table(checkpoint, fgrams, tmp_path / "int8", codec="int8", progress=False)
    bench = ["bench", "codec", "--model", str(checkpoint.path), "--max-tokens", "400"]
    assert main(bench) == 2
    assert "model, table or text is missing" in capsys.readouterr().err
    bench += ["--text", re.__file__]
    assert main([*bench, "--table", str(tmp_path / "int8")]) == 1
    assert "has codec int8, wanted raw" in capsys.readouterr().err
    assert main([*bench, "--table", str(tmp_path / "raw")]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = measured["results"]
    assert list(results)[:4] == ["raw", "int8", "int4", "fp8"]
    assert (results["raw"]["error_max"], results["raw"]["kl_nats"]) == (0.0, 0.0)
    assert results["int8"]["error_rms"] < results["fp8"]["error_rms"] < results["int4"]["error_rms"]
    assert 0 < results["int8"]["kl_nats"] < results["rank 16"]["kl_nats"]
    # low rank at the bytes of int8 is far worse
    assert results["rank 32"]["row_bytes"] == 64 < results["int8"]["row_bytes"] == 68
    assert results["rank 32"]["error_rms"] > 5 * results["int8"]["error_rms"]
    assert all(result["decode_ns_per_row"] > 0 for result in results.values())
