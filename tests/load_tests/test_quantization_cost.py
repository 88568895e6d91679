from __future__ import annotations

from typing import Any

import pytest
import torch

from load_tests.quantization_cost import compare, log_probabilities
from scone.kernels.extension import native
from scone.model_store.decoder import Decoder
from scone.server.engine.engine_config import EngineConfig, Quantization

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "bfloat16", "int8", "int4")


@pytest.mark.skipif(native is None, reason="the native extension was not built")
def test_fewer_bits_cost_more(tiny_decoder: Decoder) -> None:
    texts = [
        torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 64)
    ]
    limits: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 64}
    reference = log_probabilities(tiny_decoder, EngineConfig(backend="torch", **limits), texts)
    costs = [
        compare(
            log_probabilities(tiny_decoder, EngineConfig(quantization=quantization, **limits), texts),
            reference,
            texts,
        )
        for quantization in QUANTIZATIONS
    ]
    none, bfloat16, int8, int4 = (cost["kl_nats"] for cost in costs)
    assert abs(none) < 1e-6
    assert 1e-6 < int8 < int4
    assert 1e-6 < bfloat16 < int4
    assert costs[0]["same_best_token"] == 1.0
    assert costs[0]["perplexity"] == pytest.approx(
        compare(reference, reference, texts)["perplexity"], rel=1e-4
    )
