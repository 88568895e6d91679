"""Where a model runs and in which type, from the settings `device` and `dtype`.

`auto` is the first CUDA device if torch sees one, in bfloat16 as SCONE models are trained, else the CPU in
float32.
"""

from __future__ import annotations

import torch

from scone.model_store.decoder import Decoder
from scone.server.errors import SettingError
from scone.server.settings import Setting

CACHE_SHARE = 0.8
"""Of a device's free memory, for keys and values."""

DEVICE = Setting(
    name="device",
    default="auto",
    help="where models are computed: cpu, cuda, cuda:N, auto (a GPU if there is one)",
)
"""For commands that work offline; `scone serve` has its own."""


def model_device(setting: str) -> torch.device:
    """The device that a setting names; raises SettingError if it is none, or not here."""
    if setting == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(setting)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device is {setting!r}, wanted auto, cpu, cuda or cuda:N")
    num_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= num_devices:
        raise SettingError(
            f"device is {setting}, but torch {torch.__version__} sees {num_devices} CUDA devices: give the"
            " process one (driver, container runtime, CUDA_VISIBLE_DEVICES, a torch built for CUDA), or set"
            " device cpu"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")


def model_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The type that a setting names; `auto` is float32 on a CPU and bfloat16 elsewhere."""
    if setting == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, setting)
    return dtype


def placed(decoder: Decoder, device: torch.device) -> Decoder:
    """The decoder with its weights on `device`; raises SettingError if they do not fit there."""
    try:
        return decoder.to(device)
    except torch.OutOfMemoryError:
        num_bytes = sum(p.nbytes for p in {id(p): p for p in decoder.parameters()}.values())
        raise SettingError(
            f"the model's {num_bytes / 2**30:.1f} GiB of weights do not fit on {device}: choose another"
            " device, a smaller model, or dtype bfloat16"
        ) from None


def spare_cache_bytes(device: torch.device, reserved_bytes: int) -> int:
    """What keys and values may take of a CUDA device's memory, unless set: four fifths of what is free.

    The rest is for steps. Raises SettingError if nothing is free beside what is reserved.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    spare = int(CACHE_SHARE * (free_bytes - reserved_bytes))
    if spare <= 0:
        raise SettingError(
            f"device_bytes is {reserved_bytes}, wanted less than what is free on {device} beside the weights,"
            f" {free_bytes} bytes"
        )
    return spare
