"""Shrinking a model: which residuals stay, how they are stored, and what is left as it was."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scone.kernels.row_codec import RowCodec
from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import DESCRIPTION, WEIGHTS, Checkpoint, open_checkpoint, save_scone_folder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_residuals import FGramResiduals
from scone.model_store.fgram_set import FGramSet
from scone.model_store.residual_selection import keep_most_missed
from scone.model_store.set_matcher import SetMatcher
from scone.server.cli import main


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, fgrams: FGramSet) -> FGramModel:
    """With residuals of many lengths, some of which no f-gram has."""
    model = checkpoint.fgram_model(checkpoint.decoder())
    assert model is not None
    residuals = FGramResiduals.zeros(fgrams, checkpoint.config.dim)
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(len(residuals.values), 1, generator=generator) * 3
    residuals.values = torch.randn(residuals.values.shape, generator=generator) * scale
    residuals.values[::7] = 0
    model.residuals = residuals
    return model


@pytest.fixture(scope="module")
def saved(
    model: FGramModel, checkpoint: Checkpoint, main_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("shrink") / "whole"
    save_scone_folder(folder, model, main_path=main_path, main_hash=checkpoint.model_hash)
    return folder


def keys_of(residuals: FGramResiduals) -> list[tuple[int, ...]]:
    return [tuple(t[:n]) for t, n in zip(residuals.tokens.tolist(), residuals.lengths.tolist(), strict=True)]


def test_those_stay_whose_absence_changes_most_rows_most(model: FGramModel, fgrams: FGramSet) -> None:
    """Against a walk over a text whose counts are the set's: each position's suffixes, one by one."""
    assert model.residuals is not None
    text = np.random.default_rng(0).choice(fgrams.tokens[:40, :2].ravel(), 4000).astype(np.int32)
    some = fgrams.head(200)
    uses: Counter[tuple[int, ...]] = Counter()
    for rank in SetMatcher(some).match(text)[0].tolist():
        if rank >= 0:
            key = tuple(some.tokens[rank][: some.lengths[rank]].tolist())
            uses.update(key[-n:] for n in range(1, len(key) + 1))
    occurrences = [uses[tuple(t[:n].tolist())] for t, n in zip(some.tokens, some.lengths, strict=True)]
    counted = FGramSet(
        some.tokens, some.lengths, np.array(occurrences, np.int64), some.tokenizer_hash, 1, len(text)
    )
    lost = {
        key: uses[key] * float(value.square().sum())
        for key, value in zip(keys_of(model.residuals), model.residuals.values, strict=True)
    }
    wanted = sorted((key for key in lost if lost[key] > 0), key=lambda key: -lost[key])
    assert 30 < len(wanted) < len(lost)
    kept = keep_most_missed(model.residuals, counted, 20)
    assert set(keys_of(kept)) == set(wanted[:20])
    assert {1, 2} <= set(kept.lengths.tolist())
    everything = keep_most_missed(model.residuals, counted, len(lost))
    assert set(keys_of(everything)) == set(wanted)


@pytest.mark.parametrize("max_n", [1, 2])
def test_residuals_shorter_than_the_sets_fgrams_are_chosen_among_too(
    checkpoint: Checkpoint, fgrams: FGramSet, max_n: int
) -> None:
    """A control's, and those of a set of shorter f-grams."""
    assert fgrams.max_n > max_n
    short = fgrams.lengths <= max(max_n, 2)
    pairs = FGramSet(fgrams.tokens[short, :2], fgrams.lengths[short], fgrams.counts[short], "", 1, 0)
    residuals = FGramResiduals.zeros(pairs, checkpoint.config.dim, last_token_only=max_n == 1)
    residuals.values = torch.ones_like(residuals.values)
    kept = keep_most_missed(residuals, fgrams, 5)
    assert len(kept.lengths) == 5
    uses: Counter[tuple[int, ...]] = Counter()
    for (first, last), count in zip(pairs.tokens.tolist(), pairs.counts.tolist(), strict=True):
        uses[(last,)] += count
        uses[(first, last)] = count
    among = keys_of(residuals)
    least_kept = min(uses[key] for key in keys_of(kept))
    assert least_kept == sorted((uses[key] for key in among), reverse=True)[4]


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_a_shrunk_folder_has_the_coded_residuals_and_the_rest_as_it_was(
    model: FGramModel, saved: Path, tmp_path: Path, fgrams: FGramSet, codec: str
) -> None:
    checkpoint = open_checkpoint(saved)
    assert model.residuals is not None
    kept = keep_most_missed(model.residuals, fgrams, 50)
    checkpoint.save_with_residuals(tmp_path / "small", kept, codec)
    small = open_checkpoint(tmp_path / "small")
    assert small.model_hash == checkpoint.model_hash
    loaded = small.fgram_model(small.decoder())
    assert loaded is not None
    assert loaded.residuals is not None
    assert torch.equal(loaded.residuals.tokens, kept.tokens)
    row_codec = RowCodec(codec, "float32", kept.values.shape[1])
    assert torch.equal(loaded.residuals.values, row_codec.decode_reference(row_codec.encode(kept.values)))
    error = (
        loaded.residuals.values - kept.values
    ).square().mean().sqrt() / kept.values.square().mean().sqrt()
    assert 0 < error < (0.12 if codec == "int4" else 0.04)
    before, after = load_file(saved / WEIGHTS), load_file(tmp_path / "small" / WEIGHTS)
    others = [name for name in before if not name.startswith("residuals.")]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert after["residuals.values"].shape == (50, row_codec.row_bytes)
    small.save_with_residuals(tmp_path / "again", loaded.residuals, codec)
    again = open_checkpoint(tmp_path / "again").fgram_model(small.decoder())
    assert again is not None
    assert again.residuals is not None
    assert torch.equal(again.residuals.values, loaded.residuals.values)


def test_the_command_shrinks_a_model_that_builds_a_table(
    saved: Path, fgrams: FGramSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fgrams.save(tmp_path / "set.fgrams")
    dim = open_checkpoint(saved).config.dim
    row_bytes = RowCodec("int8", "float32", dim).row_bytes
    words = ["shrink", str(saved), "--fgrams", str(tmp_path / "set.fgrams"), "--out", str(tmp_path / "small")]
    words += ["--codec", "int8", "--max-residual-bytes", str(100 * row_bytes + 1)]
    assert main([*words, "--heldout", os.__file__, "--max-tokens", "2000"]) == 0
    shown = capsys.readouterr().out
    assert "with 100 of " in shown
    assert "before, " in shown
    small = open_checkpoint(tmp_path / "small")
    build_table(small, fgrams, tmp_path / "table", progress=False)
    assert (tmp_path / "table" / "manifest.json").exists()


def test_a_model_without_residuals_is_refused(
    main_path: Path, fgrams: FGramSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fgrams.save(tmp_path / "set.fgrams")
    words = [
        "shrink",
        str(main_path),
        "--fgrams",
        str(tmp_path / "set.fgrams"),
        "--out",
        str(tmp_path / "small"),
    ]
    assert main([*words, "--max-residual-bytes", "1M"]) == 2
    assert "has no residuals, wanted one that has" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_copy_with_nothing_in_it_or_in_the_models_place_is_refused(
    saved: Path, fgrams: FGramSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fgrams.save(tmp_path / "set.fgrams")
    before = (saved / WEIGHTS).read_bytes()
    words = ["shrink", str(saved), "--fgrams", str(tmp_path / "set.fgrams"), "--out"]
    assert main([*words, str(tmp_path / "small"), "--max-residual-bytes", "10"]) == 2
    assert "no residual would be left: max_residual_bytes is 10, wanted at least" in capsys.readouterr().err
    assert main([*words, str(saved), "--max-residual-bytes", "1M"]) == 2
    assert "the model's own folder" in capsys.readouterr().err
    assert (saved / WEIGHTS).read_bytes() == before
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("codec", "message"),
    [("int8", "wanted rows of .* bytes for codec int8"), ("int3", "codec is 'int3'"), (None, "wanted")],
)
def test_a_description_that_names_another_codec_is_refused(
    model: FGramModel, saved: Path, tmp_path: Path, codec: str | None, message: str
) -> None:
    assert model.residuals is not None
    open_checkpoint(saved).save_with_residuals(tmp_path, model.residuals, "int4")
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    description["residuals"]["codec"] = codec
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    damaged = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit its description.*{message}"):
        damaged.fgram_model(damaged.decoder())


def test_coded_rows_of_another_dtype_are_refused(model: FGramModel, saved: Path, tmp_path: Path) -> None:
    assert model.residuals is not None
    open_checkpoint(saved).save_with_residuals(tmp_path, model.residuals, "int4")
    weights = load_file(tmp_path / WEIGHTS)
    weights["residuals.values"] = weights["residuals.values"].float()
    save_file(weights, tmp_path / WEIGHTS)
    damaged = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"of torch\.float32, wanted rows of"):
        damaged.fgram_model(damaged.decoder())
