"""The main job on the real model: f-gram model, table on disk, look-up, engine, next to each other.

The identity f-gram model shows that the table's path changes nothing that it should not; the shipped one
shows that every input of a request is exactly the row its f-gram model computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.cache import FGramTable
from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import Checkpoint, open_checkpoint, save_scone_folder
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

DEMO = Path(__file__).parent.parent / "model_store/demo"
TOP = 16000
TEXTS = [
    "The following example shows how to use the function in a program. If the value is not set, the "
    "default is used; see the documentation of the module for more information.",
    "CREATE TABLE is used to create a new table. The name of the table must be different from the name "
    "of any other table in the same schema.",
    "$ git log --oneline\n\nThis command shows the commits of the current branch, one per line.",
]
CONFIG = EngineConfig(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_bytes=1 << 28)


@pytest.fixture(scope="module")
def fgrams() -> FGramSet:
    """The most frequent f-grams of the shipped set; any head of the ranking is a set of its own."""
    return FGramSet.load(DEMO / "demo.fgrams").head(TOP)


@pytest.fixture(scope="module")
def shipped(smollm2_path: Path) -> Iterator[Checkpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCONE_MAIN_MODEL", str(smollm2_path))
        yield open_checkpoint(DEMO)


@pytest.fixture(scope="module")
def decoder(shipped: Checkpoint) -> Decoder:
    return shipped.decoder()


@pytest.fixture(scope="module")
def identity(
    shipped: Checkpoint, decoder: Decoder, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint whose f-gram model has not been trained."""
    folder = tmp_path_factory.mktemp("identity")
    model = FGramModel.from_decoder(decoder, num_layers=2, max_n=5)
    save_scone_folder(folder, model, main_path=smollm2_path, main_hash=shipped.model_hash)
    return folder


@contextmanager
def engine(checkpoint: Checkpoint, decoder: Decoder, table: FGramTable | None) -> Iterator[Engine]:
    engine = Engine(CONFIG, decoder, checkpoint.tokenizer(), table, checkpoint.model_hash)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown(0)


def complete(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[Delta]]:
    """All deltas of each prompt: 24 greedy tokens, log-probabilities of prompt and completion."""
    deltas: list[list[Delta]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]

    def receiver(i: int) -> None:
        request = GenerationRequest(
            request_id=f"r{i}",
            input_ids=tuple(prompts[i]),
            sampling=SamplingParams(
                max_tokens=24, temperature=0.0, logprobs=3, prompt_logprobs=3, ignore_eos=True
            ),
        )

        def on_delta(delta: Delta) -> None:
            deltas[i].append(delta)
            if delta.finish_reason is not None:
                ended[i].set()

        engine.submit(request, on_delta)

    for i in range(len(prompts)):
        receiver(i)
    assert all(event.wait(120) for event in ended)
    return deltas


def answers(deltas: list[list[Delta]]) -> list[tuple[object, ...]]:
    """Everything a client could see of each request."""
    return [
        (
            [t for d in one for t in d.token_ids],
            [p for d in one for p in d.logprobs or ()],
            [p for d in one for p in d.prompt_logprobs or ()],
            "".join(d.text for d in one),
            one[-1].finish_reason,
        )
        for one in deltas
    ]


@pytest.mark.parametrize("backend", ["mmap", "lmdb"])
def test_an_untrained_table_changes_no_bit(
    backend: str, shipped: Checkpoint, decoder: Decoder, identity: Path, fgrams: FGramSet, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    build_table(open_checkpoint(identity), fgrams, out, backend=backend, dtype="float32", progress=False)
    prompts = [shipped.tokenizer().encode(text) for text in TEXTS]
    with engine(shipped, decoder, None) as plain:
        expected = answers(complete(plain, prompts))
    with FGramTable.open(out) as table:
        with engine(shipped, decoder, table) as with_table:
            got = complete(with_table, prompts)
        usages = [one[-1].usage for one in got]
        assert answers(got) == expected
        assert [reason for *_, reason in expected] == ["length"] * len(prompts)
        # The same answers would be no proof if no row had been read.
        num_inputs = sum(map(len, prompts)) + 23 * len(prompts)
        matched = sum(usage.num_matched_tokens for usage in usages if usage is not None)
        assert matched > 0.5 * num_inputs
        assert sum(sum(usage.rows_by_tier.values()) for usage in usages if usage is not None) == matched
        assert sum(table.stats.rows_read.values()) >= matched * 0.3


def test_every_input_is_the_row_of_its_longest_fgram(
    shipped: Checkpoint,
    decoder: Decoder,
    fgrams: FGramSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_table(shipped, fgrams, tmp_path / "table", dtype="bfloat16", progress=False)
    inputs: dict[tuple[int, ...], Tensor] = {}
    run_forward = ModelRunner.forward

    def recording(
        self: ModelRunner, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange
    ) -> Tensor:
        row = 0
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                inputs[tuple(chunk.seq.token_ids[: position + 1])] = embeddings[row].clone()
                row += 1
        return run_forward(self, chunks, embeddings, layers)

    monkeypatch.setattr(ModelRunner, "forward", recording)
    prompts = [shipped.tokenizer().encode(text) for text in TEXTS]
    with FGramTable.open(tmp_path / "table") as table, engine(shipped, decoder, table) as served:
        deltas = complete(served, prompts)

    model = shipped.fgram_model(decoder)
    assert model is not None
    known = {tuple(t[:n]) for t, n in zip(fgrams.tokens.tolist(), fgrams.lengths.tolist(), strict=True)}
    lengths_seen = set()
    for prompt, one in zip(prompts, deltas, strict=True):
        generated = [token for delta in one for token in delta.token_ids]
        sequence = prompt + generated[:-1]  # the last token is never an input
        for end in range(1, len(sequence) + 1):
            fgram = next(
                (f for n in (5, 4, 3, 2) if (f := tuple(sequence[max(0, end - n) : end])) in known),
                None,
            )
            expected = decoder.embed(torch.tensor(sequence[end - 1]))
            if fgram is not None:
                padded = torch.tensor([[*fgram, *[-1] * (5 - len(fgram))]])
                expected = model.embed(padded, torch.tensor([len(fgram)]))[0].bfloat16().float()
            lengths_seen.add(len(fgram or (0,)))
            assert torch.equal(inputs[tuple(sequence[:end])], expected)
    assert lengths_seen >= {1, 2, 3}


def test_the_shipped_fgram_model_is_small_and_not_the_identity(shipped: Checkpoint, decoder: Decoder) -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 70e6
    model = shipped.fgram_model(decoder)
    assert model is not None
    fgram = torch.tensor([[314, 260, 253, 253]])
    change = model(fgram[:, :2]) - decoder.embed(fgram[:, 1])
    assert np.linalg.norm(change.numpy()) > 0.01
    assert model.residuals is not None
    assert model.residuals.values.any(dim=1).all()
