"""The study of a pretrained model, very small: every row trained, two at a time, reported from its logs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.count import count_fgrams
from scone.model_store.study_report import read_logs
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tuning_study import ROWS, TuningConfig, TuningStudy, arms_of
from scone.server.cli import main

SMALL = {
    "small_set": 20, "thin_layers": 1, "num_layers": 2, "deep_layers": 3, "main_layers": 1, "lora_rank": 2,
    "num_tokens": 256,
    "batch_size": 2, "seq_len": 32, "heldout_tokens": 64, "learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def study(main_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study."""
    folder = tmp_path_factory.mktemp("tuning")
    tokenizer = open_checkpoint(main_path).tokenizer()
    tokens = TokenCorpus.from_documents([tokenizer.encode(Path(json.decoder.__file__).read_text())])
    fgrams = count_fgrams(
        tokens, max_n=3, min_count=2, top=200, tokenizer_hash=tokenizer.hash, progress=False
    )
    fgrams.save(folder / "set.fgrams")
    words = ["study-pretrained", "--model", str(main_path), "--fgrams", str(folder / "set.fgrams")]
    words += ["--corpus", json.decoder.__file__, "--heldout", json.encoder.__file__, "--num-workers", "2"]
    words += ["--out", str(folder / "work"), "--document", str(folder / "docs/tuned.md")]
    words += ["--logs", str(folder / "docs/tuned")]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert main(words) == 0
    return folder


def test_every_row_is_trained_and_reported(study: Path) -> None:
    runs = {run.name: run for run in read_logs(study / "docs/tuned")}
    assert set(runs) == {f"{arm.name}-0" for arm in arms_of(TuningConfig())}
    assert all(run.is_finished for run in runs.values())
    base = runs["base-0"].loss
    assert base == pytest.approx(runs["base-0"].curve[0].heldout_loss, abs=0.2)
    losses = [run.loss for run in runs.values()]
    assert len(set(losses)) == len(losses)  # no two rows trained the same thing
    text = (study / "docs/tuned.md").read_text()
    ratio = math.exp(runs["fgrams-0"].loss - runs["control-0"].loss)
    assert f"The same against the control, which sees no n-gram: perplexity {ratio:.3f} times." in text
    assert f"| base | 0 | 0 |  | {base:.4f} | {math.exp(base):.2f} | 1.000 | [0](tuned/base-0) |" in text
    assert (study / "docs/tuned/curves.svg").read_text().startswith("<svg")
    assert runs["fgrams-small-set-0"].facts["arm"]["num_fgrams"] == 20
    ratio = math.exp(runs["fgrams-residuals-0"].loss - runs["control-residuals-0"].loss)
    assert f"a control with residuals of its tokens: perplexity {ratio:.3f} times." in text
    assert not runs["lora-0"].facts["fgram_model_parameters"]


def test_what_was_trained_on_the_frozen_model_is_kept_and_can_be_built(study: Path, main_path: Path) -> None:
    trained = open_checkpoint(study / "work/runs/fgrams-0")
    assert trained.model_hash == open_checkpoint(main_path).model_hash
    assert trained.fgram_model(trained.decoder()) is not None
    with_residuals = open_checkpoint(study / "work/runs/fgrams-residuals-0")
    model = with_residuals.fgram_model(with_residuals.decoder())
    assert model is not None
    assert model.residuals is not None
    assert not (study / "work/runs/main-fgrams-0/scone.json").exists()


def test_rows_may_be_chosen(main_path: Path, tmp_path: Path, study: Path) -> None:
    def names(rows: tuple[str, ...]) -> list[str]:
        source = [json.decoder.__file__], [json.encoder.__file__], tmp_path
        opened = TuningStudy(
            TuningConfig(num_seeds=2),
            str(main_path),
            str(study / "set.fgrams"),
            *source,
            torch.device("cpu"),
            rows,
        )
        return [run.name for run in opened.runs()]

    assert names(("base", "control")) == ["control-0", "base-0", "control-1"]
    assert len(names(ROWS)) == len(ROWS) + sum(arm.is_main for arm in arms_of(TuningConfig()))
