"""The whole study, very small: every row trained, resumed, and reported from its logs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from scone.model_store.errors import CheckpointError
from scone.model_store.study import StudyConfig, arms_of
from scone.model_store.study_report import LoggedRun, read_logs, write_report
from scone.model_store.training_curve import read_curve
from scone.server.cli import main

SMALL = {
    "vocab_size": 300, "max_n": 3, "small_set": 50, "large_set": 200, "thin_layers": 1, "deep_layers": 2,
    "small_dim": 32, "small_layers": 1, "large_dim": 64, "large_layers": 2, "num_tokens": 256,
    "batch_size": 2, "seq_len": 32, "heldout_tokens": 64, "num_seeds": 2,
}  # fmt: skip


def test_the_default_sizes_are_those_that_were_asked_for() -> None:
    """S of 2 to 4 million parameters in its layers, M of at least twice S's FLOPs, all rows of the grid."""
    config = StudyConfig()

    def in_layers(dim: int, num_layers: int) -> int:
        return num_layers * (4 * dim * dim + 3 * dim * (dim * 8 // 3 // 32 * 32))

    small, large = (
        in_layers(config.small_dim, config.small_layers),
        in_layers(config.large_dim, config.large_layers),
    )
    assert 2e6 < small < 4e6
    heads = [config.vocab_size * dim for dim in (config.small_dim, config.large_dim)]
    assert 2 <= (large + heads[1]) / (small + heads[0]) < 2.5
    arms = arms_of(config)
    assert len({arm.name for arm in arms}) == len(arms) == 12
    assert {(arm.num_fgrams, arm.fgram_layers) for arm in arms if arm.fgram_layers} == {
        (size, layers)
        for size in (config.small_set, config.large_set)
        for layers in (config.thin_layers, config.deep_layers)
    }
    assert {arm.embedding for arm in arms} == {"dense", "kronecker"}
    assert [arm.name for arm in arms if arm.is_main] == [
        "S",
        "S-large-set-deep",
        "S-control",
        "M",
        "S-large-set-thin",
        "S-large-set-residuals",
        "S-control-residuals",
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a finished study, and the command that made it."""
    folder = tmp_path_factory.mktemp("study")
    words = ["study", "--corpus", json.decoder.__file__, "--heldout", json.encoder.__file__]
    words += ["--out", str(folder / "work"), "--logs", str(folder / "docs/quality")]
    words += ["--document", str(folder / "docs/quality.md")]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert main(words) == 0
    return folder, words


def test_every_row_is_trained_and_reported(study: tuple[Path, list[str]]) -> None:
    folder, _ = study
    logs = folder / "docs/quality"
    names = {path.name for path in logs.iterdir() if path.is_dir()}
    arms = arms_of(StudyConfig())
    assert names == {f"{arm.name}-0" for arm in arms} | {f"{arm.name}-1" for arm in arms if arm.is_main}
    text = (folder / "docs/quality.md").read_text()
    runs = {run.name: run for run in read_logs(logs)}
    base = (runs["S-0"].loss + runs["S-1"].loss) / 2
    assert f"| {base:.4f} ± " in text
    assert f"| {math.exp(base):.2f} | 1.000 | [0](quality/S-0), [1](quality/S-1) |" in text
    ratio = math.exp(runs["S-kronecker-0"].loss - base)
    assert f"Kronecker embeddings against a dense table: perplexity {ratio:.3f} times" in text
    assert "against the control that sees no n-gram" in text
    assert "Not finished" not in text
    for picture in ("curves.svg", "trend.svg"):
        assert f"](quality/{picture})" in text
        assert (logs / picture).read_text().startswith("<svg")
    control = runs["S-control-0"].facts
    assert control["arm"]["last_token_only"]
    assert control["train"]["last_token_only"]
    assert control["inference_parameters"] == runs["S-0"].facts["inference_parameters"]
    assert runs["M-0"].facts["inference_parameters"] > 1.5 * control["inference_parameters"]
    assert runs["S-0"].facts["fgram_model_parameters"] == 0
    assert [name for name, run in runs.items() if run.facts["train"]["residual_learning_rate"]] == sorted(
        name for name in names if "residuals" in name
    )
    ratio = math.exp(_mean(runs, "S-large-set-residuals") - _mean(runs, "S-large-set-thin"))
    assert f"Residuals beside the thin f-gram model, large set: perplexity {ratio:.3f} times" in text


def _mean(runs: dict[str, LoggedRun], arm: str) -> float:
    return (runs[f"{arm}-0"].loss + runs[f"{arm}-1"].loss) / 2


def test_what_is_finished_stays_and_what_is_lost_is_trained_to_the_same(
    study: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = study
    logs = folder / "docs/quality"
    before = {path: path.read_bytes() for path in logs.glob("*/curve.csv")}
    document = (folder / "docs/quality.md").read_text()
    times = {path: path.stat().st_mtime_ns for path in before}
    shutil.rmtree(logs / "M-0")
    shutil.rmtree(folder / "work/runs/M-0")
    assert main(words) == 0
    losses = {path: [p.heldout_loss for p in read_curve(path.parent)] for path in before}
    for path, content in before.items():
        if path.parent.name == "M-0":
            (tmp_path / "curve.csv").write_bytes(content)
            assert losses[path] == [p.heldout_loss for p in read_curve(tmp_path)]
        else:
            assert path.stat().st_mtime_ns == times[path]
    assert (folder / "docs/quality.md").read_text() == document


def test_unfinished_runs_are_named_and_count_for_nothing(
    study: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = study
    shutil.copytree(folder / "docs/quality", tmp_path / "quality")
    curve = tmp_path / "quality/M-1/curve.csv"
    curve.write_text("\n".join(curve.read_text().splitlines()[:-1]) + "\n")
    write_report(tmp_path / "quality", tmp_path / "quality.md", "scone study")
    text = (tmp_path / "quality.md").read_text()
    assert "Not finished, and in no figure above: M-1." in text
    assert "[1](quality/M-1)" not in text
    with pytest.raises(CheckpointError, match="holds no logs"):
        write_report(tmp_path, tmp_path / "other.md", "scone study")


def test_logs_must_lie_below_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "--corpus", __file__, "--heldout", __file__, "--out", str(tmp_path / "work")]
    assert main([*words, "--logs", str(tmp_path), "--document", str(tmp_path / "docs/q.md")]) == 2
    assert "wanted a folder below" in capsys.readouterr().err
