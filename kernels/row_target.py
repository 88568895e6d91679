"""Where the rows of a decode step go, as the native kernels take it (native/row_target.hpp)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.gather import check_out


class RowTarget:
    """Room for one row of each sequence of a decode step, and for what the rows are.

    Made once for memory that is written again and again: to tell native code of an array takes longer than to
    copy a row.

    Attributes:
        rows: (num_rows, dim).
        row_ids, places: (at least num_rows,) int64: the rows that there are, one after the other, and whose
            they are.
        by_place: whether row k goes to rows[places[k]]; else to rows[k].
        native: what the native functions take; None without the extension.
    """

    __slots__ = ("by_place", "native", "places", "row_ids", "rows")

    def __init__(
        self, rows: Tensor, row_ids: NDArray[np.int64], places: NDArray[np.int64], *, by_place: bool = False
    ) -> None:
        """Raises ValueError: `rows` cannot take decoded rows, or an array is shorter."""
        num_rows, dim = rows.shape if rows.dim() == 2 else (-1, -1)
        address, stride_bytes, dtype_id = check_out(rows, num_rows, dim)
        self.rows, self.row_ids, self.places, self.by_place = rows, row_ids, places, by_place
        self.native: Any = None
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
