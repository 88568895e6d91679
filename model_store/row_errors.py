"""How far each stored row is from the one that was computed: `row_errors.bin`, and its summary.

The error of a row is |stored - computed| / |computed|, Euclidean norms, between what a reader decodes and
the f-gram model's float32 output; 0 where both are zeros. Format: FORMAT.md, "row_errors.bin".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.row_codec import RowCodec

ERROR_DTYPE = np.dtype("<f4")

_ROWS_PER_SUM = 1 << 20


@dataclass(frozen=True, slots=True)
class RowError:
    """Of all rows of a table: root mean square and maximum of their errors."""

    rms: float
    max: float


def row_errors(codec: RowCodec, computed: Tensor, stored: Tensor) -> NDArray[np.float32]:
    """(n,) errors of rows computed (n, dim) and stored (n, row_bytes); each depends on its row alone."""
    return relative_errors(computed, codec.decode_reference(stored))


def relative_errors(computed: Tensor, restored: Tensor) -> NDArray[np.float32]:
    """(n,) errors of rows restored (n, dim), beside the computed ones."""
    wanted = computed.double().numpy()
    norms = np.sqrt((wanted * wanted).sum(axis=1))
    off = restored.double().numpy() - wanted
    distances = np.sqrt((off * off).sum(axis=1))
    errors: NDArray[np.float64] = np.divide(distances, norms, out=np.zeros_like(norms), where=norms > 0)
    return errors.astype(np.float32)


def summarize(path: Path) -> RowError:
    """The summary of a whole row_errors.bin; the same bytes give the same figures."""
    errors = np.memmap(path, ERROR_DTYPE, "r")
    squares, largest = [], 0.0
    for begin in range(0, len(errors), _ROWS_PER_SUM):
        part = errors[begin : begin + _ROWS_PER_SUM].astype(np.float64)
        squares.append(float((part * part).sum()))
        largest = max(largest, float(part.max()))
    return RowError(math.sqrt(math.fsum(squares) / len(errors)), largest)
