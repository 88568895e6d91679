"""Fixtures every test folder may use: the real demo model, and a tiny random one of the same family."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from scone.model_store.decoder import Decoder
from scone.model_store.model_config import ModelConfig

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    architecture="llama",
    vocab_size=300,
    dim=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=512,
    eos_ids=(2,),
)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; `make test` fetches it."""
    path = Path(os.environ.get("SCONE_TEST_MODEL", ROOT / "data/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make test`, or set SCONE_TEST_MODEL to a copy of it")
    return path


@pytest.fixture(scope="session")
def tiny_decoder() -> Decoder:
    """A random decoder of 3 layers (grouped-query, tied head), spread enough for its argmax to be clear."""
    torch.manual_seed(0)
    decoder = Decoder(TINY)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return decoder.requires_grad_(False).eval()
