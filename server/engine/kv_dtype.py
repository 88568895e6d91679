"""In which type keys and values are held.

In bfloat16 they take half the memory, and half the time to be read from it or from a disk. They are rounded
once, when they are stored. `auto` was chosen on what that costs in quality (docs/engine.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from scone.server.engine.engine_config import KvCacheDtype
from scone.server.errors import SettingError


class KvCacheSize(NamedTuple):
    """What is set aside for keys and values."""

    dtype: torch.dtype
    num_bytes: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_kv_dtype(
    setting: KvCacheDtype, backend: str, dtype: torch.dtype, *, rounds_inputs: bool
) -> torch.dtype:
    """The type for a backend that computes in `dtype`.

    Args:
        rounds_inputs: whether linear maps round their inputs, which costs more than rounded keys and values.

    Raises:
        SettingError: the backend cannot hold them so.
    """
    if setting == "auto":
        return torch.bfloat16 if rounds_inputs else dtype
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]
    if backend == "triton" and chosen != dtype:
        raise SettingError(
            f"kv_cache_dtype is {setting}, but the triton backend holds keys and values in the type that it"
            f" computes in, {str(dtype).removeprefix('torch.')}: wanted auto, or dtype {setting}"
        )
    return chosen
