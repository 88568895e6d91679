"""A tied matrix (token embedding and head) is in memory once, as float; the native head packs it beside."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from scone.model_store.checkpoint import open_checkpoint
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.native_forward import NativeForward


def storages_of(num_values: int) -> set[int]:
    """Addresses of the memory of all live tensors with that many values."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel() == num_values}


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_smollm2_holds_its_tied_matrix_once(smollm2_path: Path, backend: str) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    shape = checkpoint.config
    assert shape.tied_head
    former = storages_of(shape.vocab_size * shape.dim)
    decoder = checkpoint.decoder()
    config = EngineConfig(backend=backend, kv_cache_bytes=1 << 20, max_model_len=64)  # type: ignore[arg-type]
    runner = ModelRunner(decoder, config)
    forward = runner._forward
    del decoder
    assert len(storages_of(shape.vocab_size * shape.dim) - former) == 1
    if isinstance(forward, NativeForward):
        # The packed head is another form of the same values: smaller, unless they fit no rounded format.
        assert forward.head_bytes <= shape.vocab_size * shape.dim * 4
    x = torch.randn(2, shape.dim, generator=torch.Generator().manual_seed(0))
    ids = [3, 77, 40_000]
    assert torch.allclose(forward.logits(x)[:, ids], forward.logits_of(x, ids), rtol=2e-2, atol=2e-2)
