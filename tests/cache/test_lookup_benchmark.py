"""The benchmark runs, compares answers, and ends in one JSON object."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scone.cache.cold_benchmark import padded_spans, row_spans
from scone.cache.continuation_benchmark import benchmark_continuations
from scone.cache.errors import CacheError
from scone.cache.lookup_workload import hold_out, write_table
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus
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
    for way, entry in result["us_per_token"].items():
        assert entry["ours"] > 0
        by_round = [measured[way] for measured in result["us_per_token_by_round"]]
        assert entry["times_faster"] == statistics.median(e["times_faster"] for e in by_round)
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


def test_continuations_are_counted_right(
    fgram_set: Callable[..., FGramSet], write_table: Callable[..., Path], tmp_path: Path
) -> None:
    """(1 2) goes on with 3 (often), 4 or 5; what follows a single token is not read ahead."""
    counts = {(1, 2): 99, (1, 2, 3): 60, (2, 3): 60, (1, 2, 4): 20, (2, 4): 20, (1, 2, 5): 9, (2, 5): 9}
    table = write_table(tmp_path / "t", fgram_set(counts))
    heldout = TokenCorpus.from_documents([[1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 5]])
    found = benchmark_continuations(table, heldout, num_tokens=11)
    # six positions match: (1 2) three times, which continues no f-gram, then one continuation each
    assert found["matched_share"] == round(6 / 11, 3)
    assert found["first_1"]["rows_covered"] == round(1 / 6, 3)
    assert found["first_1"]["rows_read_per_row_covered"] == 3.0
    assert found["first_2"]["rows_covered"] == round(2 / 6, 3)
    assert found["first_4"] | {"rows_read_per_token": 0} == found["first_64"] | {"rows_read_per_token": 0}
    assert found["first_64"]["rows_covered"] == 0.5
    assert found["first_64"]["rows_read_per_row_covered"] == 3.0
    assert 0.6 < found["first_64"]["steps_of_1_covered"] < 0.8  # 8 of 11
    assert found["first_64"]["steps_of_32_covered"] < 0.01
