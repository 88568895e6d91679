"""Low-rank adaptations: nothing at the start, the same function once merged, only they are trained."""

from __future__ import annotations

import copy

import pytest
import torch

from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.lora import LoraLinear, add_lora, merge_lora
from scone.model_store.train_config import TrainConfig


def logits(decoder: Decoder) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    return decoder.logits(decoder(decoder.embed(ids), torch.arange(12).expand(2, 12), CausalAttention()))


def test_it_starts_as_nothing_and_merges_to_what_it_was(tiny_decoder: Decoder) -> None:
    decoder = copy.deepcopy(tiny_decoder)
    before = logits(decoder)
    adaptations = add_lora(decoder, rank=2)
    assert len(adaptations) == 7 * decoder.config.num_layers
    assert torch.equal(logits(decoder), before)
    with torch.no_grad():
        for parameter in adaptations.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05
            )
    adapted = logits(decoder)
    assert (adapted - before).abs().max() > 1e-2
    merge_lora(decoder)
    assert not any(isinstance(module, LoraLinear) for module in decoder.modules())
    torch.testing.assert_close(logits(decoder), adapted, atol=1e-4, rtol=1e-4)
    assert decoder.state_dict().keys() == tiny_decoder.state_dict().keys()


def test_only_the_adaptations_get_gradients(tiny_decoder: Decoder) -> None:
    decoder = copy.deepcopy(tiny_decoder).requires_grad_(False)
    adaptations = add_lora(decoder, rank=2)
    logits(decoder).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in adaptations.parameters())
    trained = {id(parameter) for parameter in adaptations.parameters()}
    assert all(p.grad is None for p in decoder.parameters() if id(p) not in trained)


def test_a_model_that_is_trained_is_not_adapted() -> None:
    with pytest.raises(ValueError, match="lora_rank is 4 and freeze_main is false"):
        TrainConfig(lora_rank=4, freeze_main=False)
    with pytest.raises(ValueError, match="precision is 'int8', wanted one of float32, bfloat16"):
        TrainConfig(precision="int8")
