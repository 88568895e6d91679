"""Main and f-gram model trained together: it learns, resumes to the bit, and what is exported is what was
trained."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scone.cache import FGramTable
from scone.model_store.checkpoint import Checkpoint, open_checkpoint
from scone.model_store.count import count_fgrams
from scone.model_store.curve_picture import draw_curves
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_set import FGramSet
from scone.model_store.head_loss import head_loss
from scone.model_store.initialize import new_decoder, read_config
from scone.model_store.kronecker import KroneckerEmbedding
from scone.model_store.model_config import ModelConfig
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenizer import Tokenizer
from scone.model_store.train import train
from scone.model_store.train_config import TrainConfig
from scone.model_store.training_curve import read_curve
from scone.server.cli import main
from scone.server.table_perplexity import TableInputs

CONFIG = TrainConfig(
    freeze_main=False,
    steps=24,
    batch_size=4,
    seq_len=32,
    main_learning_rate=3e-3,
    learning_rate=3e-3,
    output_learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.1,
    num_layers=2,
    save_every=8,
    heldout_tokens=512,
)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}
KRONECKER = SHAPE | {
    "tie_word_embeddings": False,
    "token_embedding": {"kind": "kronecker", "num_positions": 2},
}


@pytest.fixture(scope="module")
def tokenizer(main_path: Path) -> Tokenizer:
    return open_checkpoint(main_path).tokenizer()


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> TokenCorpus:
    texts = [Path(module.__file__ or "").read_text() for module in (os, json.decoder)]
    return TokenCorpus.from_documents([tokenizer.encode(text) for text in texts])


@pytest.fixture(scope="module")
def fgrams(corpus: TokenCorpus, tokenizer: Tokenizer) -> FGramSet:
    return count_fgrams(corpus, max_n=3, min_count=5, top=400, tokenizer_hash=tokenizer.hash, progress=False)


@pytest.fixture
def shape(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return read_config(tmp_path / "config.json")


def streams(corpus: TokenCorpus, tokenizer: Tokenizer) -> tuple[TokenStream, TokenStream]:
    stream = TokenStream.from_corpus(corpus, tokenizer).input_ids
    return TokenStream(stream[:-4000]), TokenStream(stream[-4000:])


def test_everything_is_trained_and_the_loss_falls(
    shape: ModelConfig, tokenizer: Tokenizer, corpus: TokenCorpus, fgrams: FGramSet, tmp_path: Path
) -> None:
    decoder = new_decoder(shape, tokenizer, seed=0)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    model = train(CONFIG, decoder, fgrams, *streams(corpus, tokenizer), tmp_path / "run")
    assert model is not None
    points = read_curve(tmp_path / "run")
    assert [point.step for point in points] == [0, 8, 16, 24]
    assert points[0].heldout_loss == pytest.approx(np.log(257), abs=0.3)  # a new model knows nothing
    assert points[-1].heldout_loss < points[0].heldout_loss - 1.5
    assert points[-1].match_rate > 0.2
    assert all(not torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())
    drawn = ElementTree.parse(tmp_path / "run/curve.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 2


@pytest.mark.parametrize("described", [SHAPE, KRONECKER], ids=["table", "kronecker"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    described: dict[str, Any],
    tokenizer: Tokenizer,
    corpus: TokenCorpus,
    fgrams: FGramSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = read_config(tmp_path / "config.json")
    train_text, heldout = streams(corpus, tokenizer)
    short = replace(CONFIG, steps=12, save_every=5)

    def run(out: str) -> dict[str, torch.Tensor]:
        decoder = new_decoder(config, tokenizer, seed=3)
        model = train(short, decoder, fgrams, train_text, heldout, tmp_path / out)
        assert model is not None
        return dict(decoder.state_dict()) | {f"fgram.{k}": v for k, v in model.state_dict().items()}

    whole = run("whole")
    with monkeypatch.context() as patch:
        sample = TokenStream.sample_windows

        def killed(self: TokenStream, batch_size: int, seq_len: int, seed: tuple[int, int]) -> Any:
            if seed[1] == 7:
                raise KeyboardInterrupt
            return sample(self, batch_size, seq_len, seed)

        patch.setattr(TokenStream, "sample_windows", killed)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    resumed = run("parts")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(CheckpointError, match="another fgrams"):
        train(short, new_decoder(config, tokenizer, 3), None, train_text, heldout, tmp_path / "whole")


def test_the_control_sees_no_ngram(
    shape: ModelConfig, tokenizer: Tokenizer, corpus: TokenCorpus, fgrams: FGramSet, tmp_path: Path
) -> None:
    short = replace(CONFIG, steps=4, save_every=4, last_token_only=True)
    decoder = new_decoder(shape, tokenizer, seed=0)
    model = train(short, decoder, fgrams, *streams(corpus, tokenizer), tmp_path / "run")
    assert model is not None
    tokens = torch.tensor([[10, 20, 30], [11, 21, 30], [10, 20, 31]])
    rows = model.embed(tokens, torch.tensor([3, 3, 3]))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_command_and_what_it_exports(
    main_path: Path, fgrams: FGramSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Config to table: the table's inputs and predictions are those of the training's last step."""
    (tmp_path / "config.json").write_text(json.dumps(KRONECKER))
    fgrams.save(tmp_path / "set.fgrams")
    words = ["train", "--config-json", str(tmp_path / "config.json"), "--tokenizer", str(main_path)]
    words += ["--corpus", os.__file__, "--heldout", str(Path(json.__file__)), "--out", str(tmp_path / "run")]
    words += ["--steps", "6", "--batch-size", "2", "--seq-len", "32", "--heldout-tokens", "256"]
    words += ["--save-every", "6", "--num-layers", "1", "--output-learning-rate", "0.01"]
    assert main([*words, "--fgrams", str(tmp_path / "set.fgrams")]) == 0
    assert "next: scone build" in capsys.readouterr().out
    build = ["build", "--model", str(tmp_path / "run"), "--fgrams", str(tmp_path / "set.fgrams")]
    assert main([*build, "--dtype", "float32", "--out", str(tmp_path / "table")]) == 0
    checkpoint = open_checkpoint(tmp_path / "run")
    decoder = checkpoint.decoder()
    assert isinstance(decoder.embed_tokens, KroneckerEmbedding)
    model = checkpoint.fgram_model(decoder)
    assert model is not None
    state = torch.load(tmp_path / "run/training_state.pt", weights_only=True)
    for trained, exported in ((state["main"], decoder.state_dict()), (state["model"], model.state_dict())):
        assert all(torch.equal(exported[name], value) for name, value in trained.items())
    ids = np.array(checkpoint.tokenizer().encode(Path(os.__file__).read_text())[:96], np.int32)
    positions = torch.arange(96)
    with torch.no_grad(), FGramTable.open(tmp_path / "table") as table:
        table.check_model(checkpoint.model_hash, checkpoint.tokenizer().hash)
        served = decoder.logits(
            decoder(TableInputs(decoder, table)(ids[None])[0], positions, CausalAttention())
        )
        matcher = FGramInputs(fgrams, model)
        batch = matcher.match(ids[None])
        inputs, match_rate = matcher.embed(decoder, batch), batch.match_rate
        computed = decoder.logits(decoder(inputs[0], positions, CausalAttention()))
        plain = decoder.logits(
            decoder(decoder.embed(torch.from_numpy(ids).long()), positions, CausalAttention())
        )
    assert match_rate > 0.2
    torch.testing.assert_close(served, computed, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(served, plain, atol=1e-3)


def test_a_main_model_alone_and_wrong_settings(
    main_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    text = ["--corpus", os.__file__, "--heldout", str(Path(json.__file__)), "--out", str(tmp_path / "run")]
    new = ["--config-json", str(tmp_path / "config.json"), "--tokenizer", str(main_path)]
    small = ["--steps", "2", "--batch-size", "1", "--seq-len", "16", "--heldout-tokens", "64"]
    assert main(["train", *new, *text, *small]) == 0
    trained = open_checkpoint(tmp_path / "run")
    assert trained.config.num_layers == 2
    assert trained.decoder().embed(torch.tensor([5])).isfinite().all()
    for wrong, code, message in (
        ([*text], 2, "give either --model"),
        ([*new, *text, "--model", str(main_path)], 2, "give either --model"),
        ([*new[:2], *text], 2, "tokenizer is missing"),
        ([*new, *text, "--freeze-main"], 2, "freeze_main needs a --model"),
        (["--model", str(main_path), *text, "--freeze-main"], 2, "freeze_main leaves nothing to train"),
        (
            ["--model", str(main_path), *text, "--lora-rank", "4"],
            2,
            "lora_rank is 4 and freeze_main is false",
        ),
        (["--model", str(main_path), *text, "--freeze-main", "--main-layers", "99"], 1, "main_layers is 99"),
        ([*new, *text, "--schedule", "sudden"], 2, "schedule is 'sudden'"),
    ):
        assert main(["train", *wrong]) == code
        assert message in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 200}))
    assert main(["train", *new, *text]) == 1
    assert "the tokenizer has 257 ids, vocab_size is 200" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(KRONECKER | {"tie_word_embeddings": True}))
    assert main(["train", *new, *text]) == 1
    assert "cannot be the output head" in capsys.readouterr().err


def test_the_heads_gradient_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (300,))
    (2 * head_loss(hidden, head, targets)).backward()  # type: ignore[no-untyped-call]
    found = head.grad
    other = head.detach().clone().requires_grad_(True)
    (2 * torch.nn.functional.cross_entropy(hidden.detach() @ other.T, targets)).backward()  # type: ignore[no-untyped-call]
    assert found is not None
    assert other.grad is not None
    torch.testing.assert_close(found, other.grad, atol=1e-6, rtol=1e-4)


def test_schedules() -> None:
    linear, cosine = replace(CONFIG, schedule="linear"), CONFIG
    assert [cosine.learning_rate_scale(step) for step in (0, 2)] == pytest.approx([1 / 3, 0.983], abs=0.001)
    assert cosine.learning_rate_scale(12) == pytest.approx(linear.learning_rate_scale(12)) == 0.5
    assert cosine.learning_rate_scale(6) > linear.learning_rate_scale(6)
    assert cosine.learning_rate_scale(24) == linear.learning_rate_scale(24) == 0
    with pytest.raises(ValueError, match="schedule is 'flat'"):
        replace(CONFIG, schedule="flat")


def test_a_picture_of_curves() -> None:
    picture = draw_curves(
        {"a < b": [(0, 5.0), (1000, 4.0), (2000, 3.5)], "gaps": [(0, float("nan")), (1000, 4.5)], "none": []},
        title="runs",
        x_label="tokens",
        y_label="loss",
    )
    root = ElementTree.fromstring(picture)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 1]
    assert "a &lt; b" in picture
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert heights == sorted(heights)  # falling losses go down the page
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_curves({"none": []}, title="", x_label="", y_label="")


def test_nothing_to_train_is_refused(tiny_decoder: Decoder, tmp_path: Path) -> None:
    text = TokenStream(np.zeros(99, np.int32))
    with pytest.raises(ValueError, match="nothing is left to be trained"):
        train(replace(CONFIG, freeze_main=True), tiny_decoder, None, text, text, tmp_path)


@pytest.mark.parametrize("with_fgrams", [False, True])
def test_the_first_layers_alone_are_trained(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    with_fgrams: bool,
) -> None:
    ids = np.array(checkpoint.tokenizer().encode(Path(json.decoder.__file__).read_text()), np.int32)
    config = replace(CONFIG, freeze_main=True, main_layers=1, steps=4, save_every=2)
    before, decoder = checkpoint.decoder(), checkpoint.decoder()
    text = TokenStream(ids)
    with pytest.raises(CheckpointError, match="main_layers is 99, wanted at most the model's 3"):
        train(replace(config, main_layers=99), decoder, None, text, text, tmp_path / "none")
    model = train(config, decoder, fgrams if with_fgrams else None, text, text, tmp_path / "run")
    assert (model is not None) == with_fgrams
    changed = {
        name
        for name, value in decoder.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed == {name for name in before.state_dict() if name.startswith("layers.0.")}
    sample = TokenStream.sample_windows

    def killed(self: TokenStream, batch_size: int, seq_len: int, seed: tuple[int, int]) -> Any:
        if seed[1] == 3:
            raise KeyboardInterrupt
        return sample(self, batch_size, seq_len, seed)

    resumed = checkpoint.decoder()
    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "sample_windows", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, resumed, fgrams if with_fgrams else None, text, text, tmp_path / "parts")
    resumed = checkpoint.decoder()
    train(config, resumed, fgrams if with_fgrams else None, text, text, tmp_path / "parts")
    assert all(torch.equal(resumed.state_dict()[n], value) for n, value in decoder.state_dict().items())


def test_first_layers_are_of_a_frozen_model_without_adaptations() -> None:
    for changed in ({"freeze_main": False}, {"lora_rank": 2}):
        with pytest.raises(ValueError, match="main_layers is 1, which is for a frozen model"):
            TrainConfig(**{"main_layers": 1, "freeze_main": True} | changed)  # type: ignore[arg-type]
