"""`scone verify` and `scone inspect` on whole and damaged tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scone.model_store.fgram_set import FGramSet
from scone.server.cli import main


@pytest.fixture
def table(tmp_path: Path, zipf_fgrams: FGramSet, write_table: Callable[..., Path]) -> Path:
    return write_table(tmp_path / "t", zipf_fgrams.head(500))


def test_verify_passes_a_whole_table_and_names_what_is_damaged(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(table)]) == 0
    assert "all 5 files fit their checksums" in capsys.readouterr().out
    content = bytearray((table / "rows.bin").read_bytes())
    content[4096 * 7] ^= 1
    (table / "rows.bin").write_bytes(content)
    assert main(["verify", str(table)]) == 1
    assert "rows.bin is damaged: page 6" in capsys.readouterr().err
    assert main(["verify", str(table / "nowhere")]) == 1
    assert "there is no table" in capsys.readouterr().err


def test_inspect_lists_manifest_and_fgrams(
    table: Path, zipf_fgrams: FGramSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(table), "--json", "--fgrams", "3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_fgrams"] == 500
    assert 0 < facts["row_error"]["rms"] <= facts["row_error"]["max"] < 0.01  # bfloat16
    assert facts["max_count"] == zipf_fgrams.counts[0]
    assert sum(facts["fgrams_by_length"].values()) == 500
    assert [fgram["tokens"] for fgram in facts["fgrams"]] == [
        zipf_fgrams.tokens[i, : zipf_fgrams.lengths[i]].tolist() for i in range(3)
    ]
    assert main(["inspect", str(table)]) == 0
    assert "num_fgrams           500" in capsys.readouterr().out
