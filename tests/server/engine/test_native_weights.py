"""In which formats the native decoder holds weights, and what it computes with them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from scone.kernels.extension import native
from scone.kernels.packed_linear import PackedLinear, WeightKind, rounded_weight_reference
from scone.server.engine import native_forward
from scone.server.engine.engine_config import Quantization
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.native_forward import NativeForward
from scone.server.errors import SettingError

from .native_runs import CONFIG, PROMPTS, hidden_states, random_decoder

pytestmark = pytest.mark.skipif(native is None, reason="the native extension was not built")


@pytest.mark.parametrize(
    ("quantization", "kind", "tolerance"),
    [("int8", "int8", 2e-3), ("bfloat16", "bf16", 5e-2)],  # inputs are rounded to 16 bits, 8 of them mantissa
)
def test_equals_torch_on_the_rounded_weights(
    quantization: Quantization, kind: WeightKind, tolerance: float
) -> None:
    decoder = random_decoder()
    rounded = copy.deepcopy(decoder)
    for name, parameter in rounded.layers.named_parameters():
        if parameter.dim() == 2:
            assert "proj" in name
            parameter.copy_(rounded_weight_reference(parameter, kind))
    config = replace(CONFIG, quantization=quantization, kv_cache_dtype="float32")
    ours = hidden_states(ModelRunner(decoder, config), PROMPTS, [16])
    oracle = hidden_states(ModelRunner(rounded, replace(CONFIG, backend="torch")), PROMPTS, [16])
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_settings_that_need_native_kernels_say_so() -> None:
    decoder = random_decoder()
    for wrong in ({"quantization": "int8"}, {"quantization": "bfloat16"}, {"deterministic": True}):
        with pytest.raises(SettingError, match="needs the native CPU kernels, but backend is torch"):
            ModelRunner(decoder, replace(CONFIG, backend="torch", **wrong))
    odd = random_decoder(head_dim=20)
    assert ModelRunner(odd, CONFIG).backend == "torch"
    with pytest.raises(SettingError, match="head_dim is 20, not a multiple of 8"):
        ModelRunner(odd, replace(CONFIG, backend="native"))


def test_auto_takes_the_format_that_keeps_the_weights() -> None:
    decoder = random_decoder(num_layers=4)
    stored: list[WeightKind] = ["int4", "int8", "bf16"]
    for block, kind in zip(decoder.layers, stored, strict=False):
        for linear in block.children():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.copy_(rounded_weight_reference(linear.weight, kind))
    forward = NativeForward(decoder, "auto", num_threads=1, max_model_len=16)
    assert forward.kinds == ["int4"] * 7 + ["int8"] * 7 + ["bf16"] * 7 + ["f32"] * 7
    assert NativeForward(decoder, "int8", num_threads=1, max_model_len=16).kinds == ["int8"] * 28
    assert NativeForward(decoder, "bfloat16", num_threads=1, max_model_len=16).kinds == ["bf16"] * 28


def test_auto_computes_a_bfloat16_checkpoint_as_bfloat16_does() -> None:
    decoder = random_decoder()
    for parameter in decoder.parameters():
        parameter.copy_(parameter.bfloat16())
    configs: list[Quantization] = ["auto", "bfloat16", "none"]
    auto, bfloat16, none = (
        torch.cat(hidden_states(ModelRunner(decoder, replace(CONFIG, quantization=q)), PROMPTS, [16]))
        for q in configs
    )
    assert torch.equal(auto, bfloat16)
    assert not torch.equal(auto, none)


def test_none_holds_weights_in_few_bits_and_loses_none_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder()
    stored: list[WeightKind] = ["int4", "int8", "bf16"]
    for block, kind in zip(decoder.layers, stored, strict=False):
        for linear in block.children():
            if isinstance(linear, torch.nn.Linear) and kind == "bf16":
                linear.weight.copy_(linear.weight.bfloat16())
            elif isinstance(linear, torch.nn.Linear):
                low, high = (0, 15) if kind == "int4" else (-127, 127)
                linear.weight.copy_(torch.randint(low, high + 1, linear.weight.shape))
                linear.weight[:, ::32], linear.weight[:, 1::32] = low, high  # the ends of each group's range
                linear.weight.mul_(2.0 ** (-5 if kind == "int4" else -9))
    forward = NativeForward(decoder, "none", num_threads=1, max_model_len=16)
    assert forward.kinds[:21] == ["int4"] * 7 + ["int8"] * 7 + ["bf16"] * 7
    config = replace(CONFIG, quantization="none")
    ours = hidden_states(ModelRunner(decoder, config), PROMPTS, [16])
    monkeypatch.setattr(native_forward, "_pack_exactly", lambda x: PackedLinear(x.weight, "f32", x.bias))
    plain = hidden_states(ModelRunner(decoder, config), PROMPTS, [16])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_the_same_formats_with_and_without_rounded_inputs_name_other_states() -> None:
    """`none` holds such weights in as few bits as `auto`, but its states are not those of `auto`."""
    decoder = random_decoder()
    for linear in decoder.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.copy_(linear.weight.bfloat16())
    configs = [replace(CONFIG, quantization=q, kv_cache_dtype="float32") for q in ("none", "auto")]
    none, auto = (ModelRunner(decoder, config) for config in configs)
    assert isinstance(none._forward, NativeForward)
    assert isinstance(auto._forward, NativeForward)
    assert none._forward.kinds == auto._forward.kinds == ["bf16"] * 21
    assert none.state_identity.root(None) != auto.state_identity.root(None)
