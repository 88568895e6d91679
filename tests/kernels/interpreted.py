"""What Triton's interpreter needs to run under a new NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


class _IsInt(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)


class OneValue(int, metaclass=_IsInt):
    """`int`, also of an array of one element: refused by NumPy from 2.4 on, needed by Triton 3.6."""

    def __new__(cls, value: Any) -> int:  # type: ignore[misc]
        return int(np.asarray(value).item())
