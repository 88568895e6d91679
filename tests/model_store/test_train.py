"""Training on a tiny main model: it lowers the held-out loss, resumes to the bit and stops when told."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.model_store.count import count_fgrams
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError, CorpusError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.head_loss import head_loss, token_losses
from scone.model_store.perplexity import measure_perplexity
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.token_stream import TokenStream
from scone.model_store.train import STATE, train
from scone.model_store.train_config import TrainConfig
from scone.model_store.training_curve import read_curve

CONFIG = TrainConfig(
    steps=30,
    batch_size=4,
    seq_len=32,
    learning_rate=2e-3,
    output_learning_rate=4e-3,
    warmup_steps=3,
    num_layers=1,
    save_every=10,
    heldout_tokens=512,
)


def patterned_corpus(seed: int) -> TokenCorpus:
    """Documents in which what follows a pair depends on both of its tokens."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(40):
        tokens = rng.integers(3, 23, size=2).tolist()
        for _ in range(120):
            tokens.append(
                3 + (7 * tokens[-1] + 5 * tokens[-2]) % 20 if rng.random() < 0.9 else int(rng.integers(3, 23))
            )
        documents.append(tokens)
    return TokenCorpus.from_documents(documents)


@pytest.fixture(scope="module")
def fgrams() -> FGramSet:
    return count_fgrams(patterned_corpus(0), max_n=3, min_count=5, top=400, tokenizer_hash="")


class EndingStream(TokenStream):
    """Whoever reads step 15 is told to end."""

    def sample_windows(self, batch_size: int, seq_len: int, seed: tuple[int, int]) -> NDArray[np.int32]:
        if seed[1] == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().sample_windows(batch_size, seq_len, seed)


def stream(seed: int) -> TokenStream:
    return TokenStream(patterned_corpus(seed).tokens)


def curve(out: Path) -> list[float]:
    return [point.heldout_loss for point in read_curve(out)]


def test_heldout_loss_falls(tiny_decoder: Decoder, fgrams: FGramSet, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tiny_decoder.state_dict().items()}
    train(CONFIG, tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    losses = curve(tmp_path)
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(value, before[name]) for name, value in tiny_decoder.state_dict().items())


def test_a_stopped_run_resumes_to_the_same_weights(
    tiny_decoder: Decoder, fgrams: FGramSet, tmp_path: Path
) -> None:
    whole = train(CONFIG, tiny_decoder, fgrams, stream(0), stream(1), tmp_path / "whole")
    train(CONFIG, tiny_decoder, fgrams, EndingStream(stream(0).input_ids), stream(1), tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")[:2]  # of steps 0 and 10
    resumed = train(CONFIG, tiny_decoder, fgrams, stream(0), stream(1), tmp_path / "parts")
    assert whole is not None
    assert resumed is not None
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_another_run_is_not_overwritten(tiny_decoder: Decoder, fgrams: FGramSet, tmp_path: Path) -> None:
    train(replace(CONFIG, steps=1), tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    with pytest.raises(CheckpointError, match="a run with another seed"):
        train(replace(CONFIG, seed=1), tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    train(replace(CONFIG, steps=2), tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    assert len(curve(tmp_path)) == 3


def test_a_state_from_before_a_setting_was_there_is_resumed_with_its_default(
    tiny_decoder: Decoder, fgrams: FGramSet, tmp_path: Path
) -> None:
    train(replace(CONFIG, steps=1), tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    del state["config"]["random_start"]
    torch.save(state, tmp_path / STATE)
    with pytest.raises(CheckpointError, match="a run with another random_start"):
        train(replace(CONFIG, random_start=True), tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    train(replace(CONFIG, steps=2), tiny_decoder, fgrams, stream(0), stream(1), tmp_path)
    assert len(curve(tmp_path)) == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_head_loss_in_the_precision_of_its_products(precision: str) -> None:
    """The head's gradient too, which a frozen model does not ask for."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(300, 16, generator=generator, requires_grad=True)
    head = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (300,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss = head_loss(hidden, head, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    ours = hidden.grad, head.grad
    hidden.grad = head.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    expected.backward()  # type: ignore[no-untyped-call]
    bound = 1e-5 if precision == "float32" else 2e-2
    assert abs(float((loss - expected).detach())) < bound
    for found, wanted in zip(ours, (hidden.grad, head.grad), strict=True):
        assert found is not None
        assert wanted is not None
        assert (found - wanted).norm() < bound * wanted.norm()


def test_head_loss_equals_autograd() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, requires_grad=True)
    head, targets = torch.randn(50, 16), torch.randint(0, 50, (300,))
    loss = head_loss(hidden, head, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = hidden.grad
    assert gradient is not None
    other = hidden.detach().clone().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(other @ head.T, targets)
    expected.backward()  # type: ignore[no-untyped-call]
    assert other.grad is not None
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(gradient, other.grad, atol=1e-6)
    assert torch.allclose(token_losses(hidden, head, targets).mean(), expected, atol=1e-6)


def test_perplexity_equals_cross_entropy_over_the_windows(tiny_decoder: Decoder) -> None:
    held = stream(3)
    (measured,) = measure_perplexity(
        tiny_decoder,
        held,
        [lambda ids: tiny_decoder.embed(torch.from_numpy(ids.astype(np.int64)))],
        seq_len=24,
        max_tokens=240,
    )
    windows = torch.from_numpy(held.spread_windows(24, 240).astype(np.int64))
    positions = torch.arange(24).expand(len(windows), 24)
    hidden = tiny_decoder(tiny_decoder.embed(windows[:, :-1]), positions, CausalAttention())
    expected = torch.nn.functional.cross_entropy(
        tiny_decoder.logits(hidden).flatten(0, 1), windows[:, 1:].flatten()
    )
    assert measured.num_tokens == windows[:, 1:].numel()
    assert abs(measured.loss - float(expected)) < 1e-5


def test_a_corpus_shorter_than_a_window_says_so() -> None:
    with pytest.raises(CorpusError, match="wanted more than seq_len 64"):
        TokenStream(np.arange(10, dtype=np.int32)).sample_windows(1, 64, (0, 0))
