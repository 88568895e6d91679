"""Rows by id out of memory (mapped or resident), decoded straight into the caller's tensor.

`RowMemory` runs natively (native/gather.cpp: no GIL, several threads, a read error of a mapped file is an
exception and not a dead process) or on its NumPy/torch oracle. Knows bytes and row ids, not files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.checksum import crc32c
from scone.kernels.errors import DamagedDataError
from scone.kernels.extension import native
from scone.kernels.row_codec import DTYPE_IDS, RowCodec

CHECK_BYTES = 4096
"""One checksum covers this much of the row stream: the rows end to end."""

_PAGE_FAULT = -1
_BEYOND = -2
_DAMAGED_ROW = -3


class RowMemory:
    """The rows of a table as bytes in memory; thread-safe.

    Row r lies in block r // rows_per_block, at the (r % rows_per_block)-th place; a flat file is one block.

    Attributes:
        codec: how a row is stored.
        num_rows: rows in `data`.
        native: what the native functions take; None without the extension.

    Args:
        data: the bytes; must outlive this object, as must the other arrays.
        block_offsets: where in `data` each block begins, uint64.
        num_rows: rows in `data`, the first ones of the table's `num_ids`.
        page_sums: CRC-32C of each CHECK_BYTES of the row stream, uint32. With them a page is checked when
            it is first read; None: the bytes were checked before.
    """

    def __init__(
        self,
        data: NDArray[np.uint8],
        block_offsets: NDArray[np.uint64],
        rows_per_block: int,
        num_rows: int,
        codec: RowCodec,
        page_sums: NDArray[np.uint32] | None,
        *,
        num_ids: int | None = None,
    ) -> None:
        self._data, self._block_offsets, self._page_sums = data, block_offsets, page_sums
        self._rows_per_block, self.num_rows, self.codec = rows_per_block, num_rows, codec
        self._num_ids = num_rows if num_ids is None else num_ids
        self.native: Any = None
        if native is not None:
            self.native = native.RowMemory(
                data,
                block_offsets,
                rows_per_block,
                num_rows,
                self._num_ids,
                codec.codec_id,
                codec.dtype_id,
                codec.dim,
                page_sums,
            )

    def gather(
        self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor, num_threads: int = 1
    ) -> int:
        """Writes row row_ids[i] to out[i] wherever begin <= row_ids[i] < end, and nothing elsewhere.

        Args:
            row_ids: (n,) int64, contiguous.
            out: (n, dim) on the CPU, of any float dtype of 4 or 2 bytes, values of a row side by side.

        Returns:
            The number of rows written.

        Raises:
            IndexError: an id is beyond the table; nothing was written.
            DamagedDataError: a row does not fit its checksum or cannot be read; `out` is then undefined.
        """
        target = check_out(out, len(row_ids), self.codec.dim)
        if self.native is None:
            check_ids(row_ids, self._num_ids)
            return self._gather_reference(row_ids, begin, end, out)
        result: int = self.native.gather(row_ids, begin, end, *target, num_threads)
        if result >= 0:
            return result
        if result == _PAGE_FAULT:
            raise DamagedDataError("rows cannot be read: their file was truncated or the disk failed")
        if result == _BEYOND:
            check_ids(row_ids, self._num_ids)
        raise DamagedDataError(f"row {_DAMAGED_ROW - result} is damaged: its bytes do not fit their checksum")

    def absent(self, row_ids: NDArray[np.int64], begin: int, end: int) -> NDArray[np.bool_]:
        """Which of the rows (n,) are in that range and would have to be read from a disk, or may have to."""
        if self.native is None:
            return (row_ids >= begin) & (row_ids < end)
        absent = np.zeros(len(row_ids), np.bool_)
        self.native.absent(row_ids, begin, end, absent)
        return absent

    def will_need(self, row_ids: NDArray[np.int64], begin: int, end: int) -> None:
        """Starts reading the rows of that range from their mapped file, all at once; only a hint."""
        if self.native is not None:
            self.native.will_need(row_ids, begin, end)

    def _gather_reference(self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor) -> int:
        """The oracle: one row after the other."""
        num_written = 0
        for i, row_id in enumerate(row_ids.tolist()):
            if begin <= row_id < end:
                self._check_reference(row_id)
                stored = torch.from_numpy(self._row_bytes(row_id).copy())
                out[i] = self.codec.decode_reference(stored[None])[0].to(out.dtype)
                num_written += 1
        return num_written

    def _row_bytes(self, row_id: int) -> NDArray[np.uint8]:
        block, within = divmod(row_id, self._rows_per_block)
        size = self.codec.row_bytes
        at = int(self._block_offsets[block]) + within * size
        return self._data[at : at + size]

    def _check_reference(self, row_id: int) -> None:
        if self._page_sums is None:
            return
        size = self.codec.row_bytes
        stream_bytes = self.num_rows * size
        for page in range(row_id * size // CHECK_BYTES, ((row_id + 1) * size - 1) // CHECK_BYTES + 1):
            begin, end = page * CHECK_BYTES, min((page + 1) * CHECK_BYTES, stream_bytes)
            rows = range(begin // size, (end - 1) // size + 1)
            stream = b"".join(self._row_bytes(row).tobytes() for row in rows)
            if crc32c(stream[begin - rows[0] * size : end - rows[0] * size]) != self._page_sums[page]:
                raise DamagedDataError(f"row {row_id} is damaged: its bytes do not fit their checksum")


def decode_rows(data: NDArray[np.uint8], offsets: NDArray[np.int64], codec: RowCodec, out: Tensor) -> None:
    """Writes the row stored at data[offsets[i]:] to out[i]; a negative offset leaves out[i] untouched."""
    target = check_out(out, len(offsets), codec.dim)
    if native is not None:
        native.decode_rows(data, offsets, codec.codec_id, codec.dtype_id, codec.dim, *target)
        return
    for i, offset in enumerate(offsets.tolist()):
        if offset >= 0:
            stored = torch.from_numpy(data[offset : offset + codec.row_bytes].copy())
            out[i] = codec.decode_reference(stored[None])[0].to(out.dtype)


def check_ids(row_ids: NDArray[np.int64], num_ids: int) -> None:
    """Raises IndexError if one of them is beyond a table of `num_ids` rows."""
    if (largest := int(row_ids.max(initial=-1))) >= num_ids:
        raise IndexError(f"row id {largest} is beyond the table's {num_ids} rows")


def check_out(out: Tensor, num_rows: int, dim: int) -> tuple[int, int, int]:
    """The address, the bytes from row to row and the dtype of `out`, as the native kernels take them.

    Raises:
        ValueError: `out` cannot take `num_rows` decoded rows of `dim` values.
    """
    stride, values_apart = out.stride() if out.dim() == 2 else (0, 0)
    if out.shape != (num_rows, dim) or (dim > 1 and values_apart != 1):
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}, wanted"
            f" ({num_rows}, {dim}) with the values of a row side by side"
        )
    dtype_id = DTYPE_IDS.get(out.dtype)
    if dtype_id is None or not out.is_cpu:
        raise ValueError(
            f"out is {out.dtype} on {out.device}, wanted float32, bfloat16 or float16 on the CPU"
        )
    return out.data_ptr(), stride * out.element_size(), dtype_id
