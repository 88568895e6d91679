"""Where the rows of a decode step go, as the native kernels take it (native/row_target.hpp)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.gather import check_out


class IdTarget:
    """Room for what the rows of a decode step are, at most one for each of its sequences.

    Made once for memory that is written again and again: to tell native code of an array takes longer than to
    copy a row.

    Attributes:
        row_ids, places: (n,) int64: the rows that there are, one after the other, and whose they are.
        native: what the native functions take; None without the extension.
    """

    __slots__ = ("native", "places", "row_ids")

    def __init__(self, row_ids: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        self.row_ids, self.places = row_ids, places
        self.native: Any = None if native is None else native.IdTarget(row_ids, places)


class RowTarget(IdTarget):
    """Room for the rows themselves too.

    Attributes:
        rows: (num_rows, dim), at most as many as there is room for ids.
        by_place: whether row k goes to rows[places[k]]; else to rows[k].
    """

    __slots__ = ("by_place", "rows")

    def __init__(
        self, rows: Tensor, row_ids: NDArray[np.int64], places: NDArray[np.int64], *, by_place: bool = False
    ) -> None:
        """Raises ValueError: `rows` cannot take decoded rows, or an array is shorter."""
        num_rows, dim = rows.shape if rows.dim() == 2 else (-1, -1)
        address, stride_bytes, dtype_id = check_out(rows, num_rows, dim)
        super().__init__(row_ids, places)
        self.rows, self.by_place = rows, by_place
        if native is not None:
            self.native = native.RowTarget(
                address, num_rows, dim, stride_bytes, dtype_id, by_place, row_ids, places
            )

    def move_to(self, rows: Tensor, num_rows: int) -> None:
        """From now on rows go to `rows` (num_rows, dim), of the same dtype, one right after the other."""
        assert rows.is_contiguous()
        self.rows = rows
        if self.native is not None:
            self.native.move_to(rows.data_ptr(), num_rows)

    def put(self, rows: Tensor) -> None:
        """Writes rows (n, dim), those of the first n `places`: as the kernels do, with a copy between."""
        num_rows = len(rows)
        if self.by_place:
            self.rows[torch.from_numpy(self.places[:num_rows])] = rows
        else:
            self.rows[:num_rows] = rows
