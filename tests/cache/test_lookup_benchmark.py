"""The benchmark runs, compares answers, and ends in one JSON object."""

import json
from pathlib import Path

import numpy as np
import pytest

from scone.cache.cold_benchmark import padded_spans, row_spans
from scone.cache.errors import CacheError
from scone.cache.lookup_workload import hold_out, write_table
from scone.model_store.count_benchmark import made_up_corpus
from scone.server.cli import main


def test_a_small_run_ends_in_one_json_object(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = {"rows": 3000, "dim": 64, "corpus-tokens": 60_000, "tokens": 300, "batch": 4, "repeats": 2}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "lookup", *flags, "--work", str(tmp_path_factory.mktemp("bench"))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_rows"] > 500
    assert 0 < result["matched_share"] <= 1
    assert all(entry["ours"] > 0 for entry in result["us_per_token"].values())
    assert {"ours_ram", "ours_mmap", "np_memmap", "torch_index_select"} <= set(result["us_per_row_in_memory"])
    cold = result["cold"]
    assert set(cold["rows_per_second"]) >= {
        "ours_direct",
        "ours_mmap",
        "bare_pages_depth_64",
        "bare_spans_depth_64",
        "np_memmap",
        "lmdb_get_per_probe_1_threads",
        "lmdb_get_per_probe_16_threads",
    }
    # cold was cold, and reading through the page cache warmed it
    for way, (before, after) in cold["resident_share_before_and_after"].items():
        assert before < 0.01, way
        assert (after > before) == (not way.startswith(("ours_direct", "bare", "layout"))), way


def test_spans_cover_each_row_once() -> None:
    """Rows of 1,152 bytes: 3.56 to a page; of 4,096: one, on its own page."""
    offsets, sizes = row_spans(np.array([0, 1, 3, 3, 4, 100]), 1152, merged=True)
    assert offsets.tolist() == [4096, 4096 + 28 * 4096]
    assert sizes.tolist() == [2 * 4096, 4096]
    offsets, sizes = row_spans(np.array([0, 1, 3, 3, 4, 100]), 1152, merged=False)
    assert offsets.tolist() == [4096, 8192, 4096 + 28 * 4096]
    assert set(sizes.tolist()) == {4096}
    assert row_spans(np.array([7, 2]), 4096, merged=True)[0].tolist() == [3 * 4096, 8 * 4096]
    offsets, sizes = padded_spans(np.array([0, 2, 3, 11]), 1152)
    assert (offsets.tolist(), sizes.tolist()) == ([4096, 4096 * 4], [8192, 4096])


def test_made_up_pairs_fill_a_set_up_and_it_stays_closed(tmp_path: Path) -> None:
    corpus, heldout = hold_out(made_up_corpus(40_000), 5000)
    assert heldout.num_tokens >= 5000
    assert corpus.num_tokens + heldout.num_tokens == 40_000
    assert corpus.offsets[-1] == corpus.num_tokens
    path, fgrams = write_table(tmp_path, corpus, num_rows=20_000, min_count=5, dim=8)
    num_real = int((fgrams.counts >= 5).sum())
    assert 0 < num_real < len(fgrams) == 20_000
    assert fgrams.is_closed()
    again, same = write_table(tmp_path, corpus, num_rows=20_000, min_count=5, dim=8)
    assert (again, same.hash) == (path, fgrams.hash)
    with pytest.raises(CacheError, match="another corpus"):
        write_table(tmp_path, heldout, num_rows=20_000, min_count=5, dim=8)
