"""Whether bytes of tensors hold numbers only. In NumPy: torch would start threads of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def is_finite(values: NDArray[np.uint8], dtype: torch.dtype) -> bool:
    """Whether the bytes, of values of `dtype`, hold no infinity and no NaN."""
    if dtype is torch.bfloat16:  # unknown to NumPy: all bits of the exponent are set
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    floats: NDArray[Any] = values.view({torch.float32: np.float32, torch.float16: np.float16}[dtype])
    return bool(np.isfinite(floats).all())
