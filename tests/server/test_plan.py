"""The planner: exact sizes, counts of rows by tier, times put together from unit costs; both its commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scone.cache import TableConfig
from scone.cache.lookup_costs import LookupCosts, measure_lookup_costs, write_probe_table
from scone.cache.row_pattern import RowPattern, assumed_prompts
from scone.kernels.row_codec import CODECS, RowCodec
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.count import count_fgrams
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS, TableManifest
from scone.model_store.table_size import predict_table_size
from scone.model_store.token_corpus import TokenCorpus
from scone.server.cli import main
from scone.server.model_speed import ModelSpeed
from scone.server.plan import Plan

COSTS = LookupCosts(prompt=100.0, step=20.0, disk_round=80.0, disk_row=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", CODECS)
def test_sizes_are_those_of_the_built_table(
    codec: str, backend: str, zipf_fgrams: FGramSet, write_table: Callable[..., Path], tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t", zipf_fgrams, dim=576, codec=codec, backend=backend)
    manifest = TableManifest.read(table)
    length = float(zipf_fgrams.lengths.mean())
    size = predict_table_size(manifest.row_codec, len(zipf_fgrams), backend=backend, mean_length=length)
    real = {name: entry.num_bytes for name, entry in manifest.files.items()}
    rows = sum(real.get(name, 0) for name in ("rows.bin", "rows.lmdb", "blocks.bin"))
    assert size.index == pytest.approx(real["index.bin"], rel=0.002)
    # LMDB's own pages weigh more in a table as small as this
    assert size.rows == pytest.approx(rows, rel=0.001 if backend == "mmap" else 0.02)
    assert size.total == pytest.approx(sum(real.values()), rel=0.002 if backend == "mmap" else 0.02)


def test_a_pattern_counts_rows_by_tier() -> None:
    prompts = [np.array([-1, 0, 5, 9, 9, 2]), np.array([-1, -1, 1, 8, 3, 3])]
    pattern = RowPattern(prompts, num_ram_rows=5)
    assert pattern.matched_share == pytest.approx(9 / 12)
    assert pattern.disk_share == pytest.approx(4 / 12)
    assert pattern.ram_share == pytest.approx(5 / 12)
    assert pattern.num_disk_rows(6) == pytest.approx((2 + 1) / 2)  # 5 and 9; 8
    assert pattern.num_disk_rows(3) == pytest.approx((1 + 0) / 2)


def test_zipf_puts_half_of_the_look_ups_into_the_square_root_of_the_rows() -> None:
    prompts = assumed_prompts(1_000_000, 4, 5000, matched_share=0.6)
    pattern = RowPattern(prompts, num_ram_rows=1000)
    assert pattern.matched_share == pytest.approx(0.6, abs=0.02)
    assert pattern.ram_share == pytest.approx(0.3, abs=0.02)
    ids = np.concatenate(prompts)
    assert ids.min() == -1
    assert 900_000 < ids.max() < 1_000_000


def test_times_are_counts_times_costs() -> None:
    """Of 512 tokens, every second one needs another row from the disk."""
    ids = np.where(np.arange(512) % 2, np.arange(512), -1)
    on_disk = Plan(RowPattern([ids], 0), 4, COSTS, ModelSpeed(first_token=0.2, step=0.01))
    assert on_disk.prompt_disk_us == pytest.approx(80 + 256 * 2)
    # of four sequences, 15 of 16 times at least one waits
    assert on_disk.step_disk_us == pytest.approx(80 * 15 / 16 + 4 * 0.5 * 2)
    # only the first 256 tokens' rows are waited for
    assert on_disk.first_token_ms == pytest.approx(200 + 0.08 + 128 * 0.002)
    assert on_disk.token_ms == pytest.approx(10 + on_disk.step_disk_us / 1000)
    slow = replace(on_disk, costs=replace(COSTS, disk_row=2000.0))
    assert slow.first_token_ms == pytest.approx(200 + 0.08 + 256 + (0.08 + 512 - 200))
    in_memory = replace(on_disk, pattern=RowPattern([ids], 512))
    assert (in_memory.prompt_disk_us, in_memory.step_disk_us) == (0.0, 0.0)
    assert in_memory.first_token_ms == 200
    assert replace(on_disk, speed=None).token_ms is None


def test_the_probe_measures_and_leaves_nothing(zipf_fgrams: FGramSet, tmp_path: Path) -> None:
    texts = [np.random.default_rng(i).zipf(1.3, 200) % 2000 for i in range(2)]
    pattern = RowPattern([np.arange(200), np.arange(200)], num_ram_rows=100)
    costs = measure_lookup_costs(
        RowCodec("int8", "bfloat16", 64), zipf_fgrams, texts, pattern, tmp_path, batch=2, config=TableConfig()
    )
    assert costs.prompt > 0
    assert costs.step > 0
    assert costs.disk(100) > costs.disk(1) > 0
    assert costs.disk(0) == 0.0
    assert not list(tmp_path.iterdir())


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json", "true"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_plan_of_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A billion rows are planned without anything of that size."""
    words = ["--fgrams", "1000000000", "--dim", "64", "--ram", "1GB", "--nvme", str(tmp_path)]
    words += ["--prompt-tokens", "64"]
    facts = planned(capsys, *words, "--codec", "int8")
    assert facts["row_bytes"] == 68
    assert facts["ram_rows"] == 10**9 // 68
    assert facts["ram_bytes"] + facts["disk_bytes"] == 68 * 10**9
    assert facts["table_bytes"] == pytest.approx(68e9 + 16e9 + 25e9 + 4 * 84e9 / 4096, rel=0.01)
    assert facts["prompt_disk_us"] > 0
    assert facts["first_token_ms"] is None
    assert main(["plan", *words]) == 0
    assert "(assumed: Zipf's law)" in capsys.readouterr().out
    for wrong, message in (
        (["--fgrams", "0"], "fgrams is 0"),
        (["--nvme", str(tmp_path / "nowhere")], "wanted a folder"),
        (["--codec", "int4", "--dim", "33"], "multiple of 32"),
        (["--text", __file__], "text is given without model"),
        (["--batch", "0"], "batch is 0"),
    ):
        assert main(["plan", *words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan", "--fgrams", "5"]) == 2
    assert "model and dim are both missing" in capsys.readouterr().err


def test_plan_of_a_model_and_the_check_of_it(
    smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small table of a real model: read off a text, planned, built, and held against the plan."""
    checkpoint = open_checkpoint(smollm2_path)
    tokenizer = checkpoint.tokenizer()
    text = Path(json.__file__).with_name("decoder.py").read_text() + Path(json.__file__).read_text()
    (tmp_path / "text").write_text(text)
    corpus = TokenCorpus.from_documents([tokenizer.encode(text)])
    fgrams = count_fgrams(
        corpus, max_n=3, min_count=2, top=2000, tokenizer_hash=tokenizer.hash, progress=False
    )
    fgrams.save(tmp_path / "set.fgrams")
    words = ["--model", str(smollm2_path), "--text", str(tmp_path / "text")]
    facts = planned(
        capsys, *words, "--fgrams", str(tmp_path / "set.fgrams"), "--ram", "300kB", "--nvme", str(tmp_path),
        "--prompt-tokens", "64", "--batch", "2",
    )  # fmt: skip
    assert 0 < facts["disk_share"] < facts["matched_share"] < 1
    assert facts["first_token_ms"] > facts["token_ms"] > 0
    codec = RowCodec("raw", "bfloat16", 576)
    write_probe_table(tmp_path / "table", fgrams, codec, model_hash=checkpoint.model_hash)
    bench = ["bench", "plan", *words, "--table", str(tmp_path / "table"), "--tokens", "64", "--batch", "2"]
    assert main(bench) == 2
    assert "ram is missing" in capsys.readouterr().err
    assert main([*bench, "--ram", "300kB", "--repeats", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["disk_share"] == pytest.approx(facts["disk_share"], abs=0.001)
    assert abs(result["table_bytes"]["deviation"]) < 0.01
    for name in ("prompt_us", "step_us", "first_token_ms", "token_ms"):
        assert result[name]["predicted"] > 0
        # loose: other tests share the machine; the committed measurement says how near it comes
        assert 0.1 < result[name]["predicted"] / result[name]["measured"] < 10
