"""Where a model runs: what the settings mean, and what is refused."""

from __future__ import annotations

import pytest
import torch

from scone.model_store.decoder import Decoder
from scone.server.errors import SettingError
from scone.server.model_device import model_device, model_dtype, placed
from tests.conftest import TINY


def test_auto_is_cuda_where_torch_sees_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model_device("auto") == torch.device("cuda:0")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert model_device("cuda") == torch.device("cuda:0")
    assert model_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(SettingError, match=r"device is cuda:2, but torch .* sees 2 CUDA devices"):
        model_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingError, match=r"device is cuda, .* or set device cpu"):
        model_device("cuda")


@pytest.mark.parametrize("setting", ["gpu", "meta", "mps", "cpu:1", ""])
def test_other_devices_are_refused(setting: str) -> None:
    with pytest.raises(SettingError, match="device is "):
        model_device(setting)


def test_the_type_follows_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert model_dtype("auto", cpu) is torch.float32
    assert model_dtype("auto", cuda) is torch.bfloat16
    assert model_dtype("float16", cpu) is torch.float16


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Decoder, device: torch.device) -> Decoder:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "to", full)
    with pytest.raises(SettingError, match=r"GiB of weights do not fit on cuda:0"):
        placed(Decoder(TINY), torch.device("cuda:0"))
