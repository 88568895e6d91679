"""A model with Kronecker token embeddings and a table on top, served by the command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import open_checkpoint, save_scone_folder
from scone.model_store.count import count_fgrams
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tokenizer import Tokenizer

from .process import Process

PROMPT = "def join(path):\n    return os.path.join(path, 'é€😀')"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return open_checkpoint(smollm2_path).tokenizer()


@pytest.fixture(scope="module")
def paths(
    tokenizer: Tokenizer, random_decoder: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A random model's SCONE folder, and its table."""
    folder = tmp_path_factory.mktemp("kronecker")
    decoder = random_decoder(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        max_position=256,
        byte_positions=32,
        tied_head=False,
        eos_ids=(0,),
    )
    save_hf_folder(folder / "main", decoder, tokenizer)
    main = open_checkpoint(folder / "main")
    model = FGramModel.from_decoder(main.decoder(), num_layers=1, max_n=3)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    save_scone_folder(folder / "scone", model, main_path=folder / "main", main_hash=main.model_hash)
    corpus = TokenCorpus.from_documents([tokenizer.encode(Path(os.__file__).read_text())])
    fgrams = count_fgrams(
        corpus, max_n=3, min_count=2, top=800, tokenizer_hash=tokenizer.hash, progress=False
    )
    build_table(open_checkpoint(folder / "scone"), fgrams, folder / "table", progress=False)
    return folder / "scone", folder / "table"


def complete(*arguments: str) -> tuple[list[str], int, str]:
    """The tokens and the matched positions of one greedy completion, and the server's log."""
    process = Process(*arguments, "--max-model-len", "128")
    try:
        process.wait_for("ready after")
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 1}
        answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60).json()
        return (
            answer["choices"][0]["logprobs"]["tokens"],
            answer["usage"].get("fgram", {}).get("matched_tokens", 0),
            process.log,
        )
    finally:
        process.close()


def test_both_ways_of_embedding_and_a_table_are_served(paths: tuple[Path, Path]) -> None:
    model, table = map(str, paths)
    tokens, matched, log = complete("--model", model, "--table", table)
    assert matched > 3
    assert "Kronecker embeddings of 32 bytes: 49,152 tokens" in log
    assert complete("--model", model, "--table", table, "--kronecker", "bytes")[:2] == (tokens, matched)
    assert complete("--model", model)[0] != tokens
