"""Residuals: found by f-gram, part of the row everywhere, moved only where a batch has their f-gram."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scone.cache import FGramTable
from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import WEIGHTS, Checkpoint, open_checkpoint, save_scone_folder
from scone.model_store.decoder import Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_residuals import FGramResiduals
from scone.model_store.fgram_set import FGramSet
from scone.model_store.row_adagrad import RowAdagrad
from scone.model_store.set_matcher import SetMatcher
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.token_stream import TokenStream
from scone.model_store.train import train
from scone.model_store.train_config import TrainConfig
from scone.server.cli import main
from scone.server.table_perplexity import TableInputs

CONFIG = TrainConfig(
    steps=10,
    batch_size=2,
    seq_len=32,
    learning_rate=1e-3,
    output_learning_rate=1e-3,
    residual_learning_rate=0.05,
    warmup_steps=2,
    num_layers=1,
    save_every=5,
    heldout_tokens=128,
)


@pytest.fixture(scope="module")
def streams(checkpoint: Checkpoint) -> tuple[TokenStream, TokenStream]:
    tokenizer = checkpoint.tokenizer()
    texts = [Path(module.__file__ or "").read_text() for module in (os, json.decoder)]
    corpus = TokenCorpus.from_documents([tokenizer.encode(text) for text in texts])
    ids = TokenStream.from_corpus(corpus, tokenizer).input_ids
    return TokenStream(ids[:-2000]), TokenStream(ids[-2000:])


def keys_of(fgrams: FGramSet) -> list[tuple[int, ...]]:
    return [tuple(tokens[:n]) for tokens, n in zip(fgrams.tokens.tolist(), fgrams.lengths, strict=True)]


def drawn(fgrams: FGramSet, dim: int, *, last_token_only: bool = False) -> FGramResiduals:
    residuals = FGramResiduals.zeros(fgrams, dim, last_token_only=last_token_only)
    torch.manual_seed(3)
    residuals.values.normal_()
    return residuals


def residuals_by_sequence(residuals: FGramResiduals) -> dict[tuple[int, ...], torch.Tensor]:
    pairs = zip(residuals.tokens.tolist(), residuals.lengths.tolist(), strict=True)
    return dict(zip((tuple(tokens[:n]) for tokens, n in pairs), residuals.values, strict=True))


def test_fgrams_are_found_by_their_tokens_alone(fgrams: FGramSet) -> None:
    """Against a dict; absent ones too, whose suffix is present."""
    some = fgrams.head(300)
    ranks = {key: rank for rank, key in enumerate(keys_of(some))}
    order = np.random.default_rng(0).permutation(len(fgrams))
    found = SetMatcher(some).find(fgrams.tokens[order], fgrams.lengths[order])
    keys = keys_of(fgrams)
    assert found.tolist() == [ranks.get(keys[i], -1) for i in order]
    absent_with_suffix = [key for key in keys if key not in ranks and key[1:] in ranks]
    assert absent_with_suffix


def test_a_row_is_what_the_model_says_and_its_residual(checkpoint: Checkpoint, fgrams: FGramSet) -> None:
    decoder = checkpoint.decoder()
    plain, model = checkpoint.fgram_model(decoder), checkpoint.fgram_model(decoder)
    assert plain is not None
    assert model is not None
    some = fgrams.head(300)
    model.residuals = drawn(some, checkpoint.config.dim)
    residual_of = residuals_by_sequence(model.residuals)
    order = np.random.default_rng(1).permutation(len(fgrams))
    tokens = torch.from_numpy(fgrams.tokens[order].astype(np.int64))
    lengths = torch.from_numpy(fgrams.lengths[order].astype(np.int64))
    wanted = plain.embed(tokens, lengths).clone()
    keys, numbers = keys_of(fgrams), set()
    for row, rank in zip(wanted, order.tolist(), strict=True):
        suffixes = [keys[rank][-n:] for n in range(1, len(keys[rank]) + 1)]
        present = [suffix for suffix in suffixes if suffix in residual_of]
        for suffix in present:
            row += residual_of[suffix]
        numbers.add((len(suffixes), len(present)))
    assert torch.equal(model.embed(tokens, lengths), wanted)
    assert {(2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3)} <= numbers


@pytest.mark.parametrize("last_token_only", [False, True])
def test_a_batch_gets_the_rows_that_a_table_would_have(
    checkpoint: Checkpoint, fgrams: FGramSet, *, last_token_only: bool
) -> None:
    """With residuals of some f-grams only, and of the control's tokens."""
    decoder = checkpoint.decoder()
    residuals = drawn(fgrams.head(300), checkpoint.config.dim, last_token_only=last_token_only)
    model = FGramModel(decoder, 1, 3, last_token_only=last_token_only, residuals=residuals).eval()
    ids = np.array(checkpoint.tokenizer().encode(Path(os.__file__).read_text())[:256], np.int32)
    inputs = FGramInputs(fgrams, model)
    with torch.no_grad():
        found = inputs.embed(decoder, inputs.match(ids[None]))[0]
        wanted = decoder.embed(torch.from_numpy(ids).long())
        row_ids, _ = SetMatcher(fgrams).match(ids)
        at = np.flatnonzero(row_ids >= 0)
        tokens, lengths = fgrams.tokens[row_ids[at]], fgrams.lengths[row_ids[at]]
        wanted[at] = model.embed(
            torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))
        )
    assert len(at) > 100
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_adagrad_moves_the_rows_it_is_given_and_no_other() -> None:
    """Against a loop over rows, in float64."""
    torch.manual_seed(0)
    values = torch.zeros(50, 8)
    optimizer = RowAdagrad(values, learning_rate=0.3)
    wanted, sums = np.zeros((50, 8)), np.zeros(50)
    for step in range(20):
        ids = torch.randperm(40)[:7]
        gradients = torch.randn(7, 8) * 10.0 ** (step % 4 - 2)
        optimizer.step(ids, gradients, scale=1 - step / 20)
        for row, gradient in zip(ids.tolist(), gradients.double().numpy(), strict=True):
            sums[row] += (gradient**2).mean()
            wanted[row] -= 0.3 * (1 - step / 20) * gradient / np.sqrt(sums[row])
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-4, atol=1e-6)
    assert not values[40:].any()
    before = values.clone()
    optimizer.step(torch.tensor([45]), torch.zeros(1, 8), scale=1.0)
    assert torch.equal(values, before)


def trained(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    streams: tuple[TokenStream, TokenStream],
    out: Path,
    **changed: Any,
) -> FGramModel:
    model = train(replace(CONFIG, **changed), checkpoint.decoder(), fgrams, *streams, out)
    assert model is not None
    return model


def test_only_fgrams_that_occur_are_moved_and_the_rest_is_not_kept(
    checkpoint: Checkpoint, fgrams: FGramSet, streams: tuple[TokenStream, TokenStream], tmp_path: Path
) -> None:
    seen: set[tuple[int, ...]] = set()
    matcher, keys = SetMatcher(fgrams), keys_of(fgrams)
    for step in range(CONFIG.steps):
        windows = streams[0].sample_windows(CONFIG.batch_size, CONFIG.seq_len, (CONFIG.seed, step))
        met = {keys[rank] for rank in matcher.match_all(windows[:, :-1]).ravel().tolist() if rank >= 0}
        seen.update(key[-n:] for key in met for n in range(1, len(key) + 1))
    residuals = trained(checkpoint, fgrams, streams, tmp_path).residuals
    assert residuals is not None
    assert residuals_by_sequence(residuals).keys() == seen
    assert 20 < len(seen) < len(fgrams)


def test_training_with_residuals_fits_better_than_without(
    checkpoint: Checkpoint, fgrams: FGramSet, streams: tuple[TokenStream, TokenStream], tmp_path: Path
) -> None:
    """On the very windows that are trained on, where a vector for each f-gram must help."""
    windows = TokenStream(streams[0].input_ids[:65])
    losses = []
    for rate in (0.0, 0.05):
        out = tmp_path / str(rate)
        trained(checkpoint, fgrams, (windows, windows), out, steps=30, residual_learning_rate=rate)
        losses.append(float((out / "curve.csv").read_text().splitlines()[-1].split(",")[3]))
    assert losses[1] < losses[0] - 0.1


def test_an_interrupted_run_resumes_to_the_same_residuals(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    streams: tuple[TokenStream, TokenStream],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = trained(checkpoint, fgrams, streams, tmp_path / "whole").state_dict()
    sample = TokenStream.sample_windows

    def killed(self: TokenStream, batch_size: int, seq_len: int, seed: tuple[int, int]) -> Any:
        if seed[1] == 8:
            raise KeyboardInterrupt
        return sample(self, batch_size, seq_len, seed)

    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "sample_windows", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(checkpoint, fgrams, streams, tmp_path / "parts")
    resumed = trained(checkpoint, fgrams, streams, tmp_path / "parts").state_dict()
    assert resumed.keys() == whole.keys()
    assert "residuals.values" in whole
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(CheckpointError, match="another residual_learning_rate"):
        trained(checkpoint, fgrams, streams, tmp_path / "parts", residual_learning_rate=0.0)


def test_the_controls_residuals_are_those_of_last_tokens(
    checkpoint: Checkpoint, fgrams: FGramSet, streams: tuple[TokenStream, TokenStream], tmp_path: Path
) -> None:
    model = trained(checkpoint, fgrams, streams, tmp_path, last_token_only=True)
    assert model.residuals is not None
    moved = [key[0] for key in residuals_by_sequence(model.residuals)]
    assert len(moved) > 1
    tokens = torch.tensor([[10, 20, moved[0]], [11, 21, moved[0]], [10, 20, moved[-1]]])
    rows = model.embed(tokens, torch.tensor([3, 3, 3]))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("last_token_only", [False, True])
def test_a_folder_keeps_them_and_a_table_has_them(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    streams: tuple[TokenStream, TokenStream],
    main_path: Path,
    tmp_path: Path,
    *,
    last_token_only: bool,
) -> None:
    model = trained(checkpoint, fgrams, streams, tmp_path / "run", last_token_only=last_token_only)
    save_scone_folder(
        tmp_path / "saved",
        model,
        main_path=main_path,
        main_hash=checkpoint.model_hash,
        dtype=torch.float32,
    )
    saved = open_checkpoint(tmp_path / "saved")
    decoder: Decoder = saved.decoder()
    loaded = saved.fgram_model(decoder)
    assert loaded is not None
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    build_table(saved, fgrams, tmp_path / "table", dtype="float32", progress=False)
    ids = streams[1].input_ids[:200]
    with torch.no_grad(), FGramTable.open(tmp_path / "table") as table:
        served = TableInputs(decoder, table)(ids[None])
        computed = FGramInputs(fgrams, model).embedding_of(decoder)(ids[None])
    torch.testing.assert_close(served, computed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lengths", lambda _: None, "lengths"),
        ("lengths", lambda lengths: lengths[:-1].clone(), r"lengths \(\d+,\), wanted .* and"),
        ("values", lambda values: values[:, 1:].clone(), "residuals have values"),
        ("tokens", lambda tokens: tokens[:7].clone(), "residuals have values"),
    ],
)
def test_a_file_whose_residuals_do_not_fit_is_refused(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    main_path: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
) -> None:
    model = checkpoint.fgram_model(checkpoint.decoder())
    assert model is not None
    model.residuals = drawn(fgrams, checkpoint.config.dim)
    save_scone_folder(tmp_path, model, main_path=main_path, main_hash=checkpoint.model_hash)
    weights = load_file(tmp_path / WEIGHTS)
    changed = change(weights.pop(f"residuals.{name}"))
    if changed is not None:
        weights[f"residuals.{name}"] = changed
    save_file(weights, tmp_path / WEIGHTS)
    damaged = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit its description.*{message}"):
        damaged.fgram_model(damaged.decoder())


def test_the_command_trains_them(
    checkpoint: Checkpoint, fgrams: FGramSet, main_path: Path, tmp_path: Path
) -> None:
    fgrams.save(tmp_path / "set.fgrams")
    words = ["train", "--model", str(main_path), "--freeze-main", "--fgrams", str(tmp_path / "set.fgrams")]
    words += ["--corpus", os.__file__, "--heldout", json.__file__, "--out", str(tmp_path / "run")]
    words += ["--steps", "2", "--batch-size", "2", "--seq-len", "32", "--heldout-tokens", "64"]
    assert main([*words, "--num-layers", "1", "--residual-learning-rate", "0.05"]) == 0
    model = open_checkpoint(tmp_path / "run").fgram_model(checkpoint.decoder())
    assert model is not None
    assert model.residuals is not None
    assert model.residuals.values.abs().sum() > 0
