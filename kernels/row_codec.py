"""How one row is stored: raw, int8, int4 or fp8, and what its values are rounded to. Torch oracle of the
decoders.

A row's values are those of the table's dtype: quantised rows are scaled in float32, then rounded to nearest
even to that dtype, before any cast the caller asks for. Native twin: native/decode_row.cpp. Layout, byte
for byte: model_store/FORMAT.md, "Row codecs".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODECS = ("raw", "int8", "int4", "fp8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of native/decode_row.hpp: FloatType and, for codecs, the order of CODECS."""

GROUP = 32
"""Values that share one scale in int4 and fp8 rows."""

_GROUPED = ("int4", "fp8")


@dataclass(frozen=True, slots=True)
class RowCodec:
    """The stored form of rows of `dim` values; raises ValueError where there is none."""

    codec: str
    dtype: str
    dim: int

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}, wanted one of {', '.join(CODECS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, wanted one of {', '.join(DTYPES)}")
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}, wanted at least 1")
        if self.codec in _GROUPED and self.dim % GROUP:
            raise ValueError(f"dim is {self.dim}, wanted a multiple of {GROUP} for codec {self.codec}")

    @property
    def codec_id(self) -> int:
        return CODECS.index(self.codec)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def dtype_id(self) -> int:
        return DTYPE_IDS[self.torch_dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        if self.codec == "raw":
            return self.dim * self.torch_dtype.itemsize
        if self.codec == "int4":
            return self.dim // GROUP * 2 + self.dim // 2
        if self.codec == "fp8":
            return self.dim // GROUP + self.dim
        return 4 + self.dim

    def encode(self, rows: Tensor) -> Tensor:
        """(n, dim) of any float dtype -> (n, row_bytes) uint8, rounding to nearest even."""
        if self.codec == "raw":
            return _bytes(rows.to(self.torch_dtype))
        rows = rows.to(torch.float32)
        if self.codec == "int4":
            return self._encode_int4(rows)
        if self.codec == "fp8":
            return self._encode_fp8(rows)
        scale = rows.abs().amax(dim=1, keepdim=True) / 127.0
        # all-zero rows, and rows so small that the scale underflows, are stored as zeros
        values = torch.where(scale > 0, rows / scale, 0.0).clamp(-127.0, 127.0).round().to(torch.int8)
        return torch.cat((_bytes(scale), _bytes(values)), dim=1)

    def decode_reference(self, stored: Tensor) -> Tensor:
        """(n, row_bytes) uint8 -> (n, dim) of the table's dtype: the oracle of the native decoders."""
        if self.codec == "raw":
            return _of_bytes(stored, self.torch_dtype)
        if self.codec == "int4":
            return self._decode_int4(stored)
        if self.codec == "fp8":
            return self._decode_fp8(stored)
        scale = _of_bytes(stored[:, :4], torch.float32)
        values = _of_bytes(stored[:, 4:], torch.int8)
        return (values.to(torch.float32) * scale).to(self.torch_dtype)

    def _encode_fp8(self, rows: Tensor) -> Tensor:
        groups = rows.reshape(len(rows), -1, GROUP)
        # the least power of two by which the group's largest value is divided to at most 448 = 0.875 x 2^9
        mantissa, exponent = torch.frexp(groups.abs().amax(dim=2))
        exponent = torch.where(mantissa > 0, exponent - torch.where(mantissa > 0.875, 8, 9), -126)
        exponent = exponent.clamp(-126, 127)
        stored_scale = (exponent + 127).to(torch.uint8)
        scale = stored_scale.view(torch.float8_e8m0fnu).to(torch.float32)
        values = (groups / scale[..., None]).to(torch.float8_e4m3fn)
        return torch.cat((stored_scale, _bytes(values).reshape(len(rows), -1)), dim=1)

    def _decode_fp8(self, stored: Tensor) -> Tensor:
        num_groups = self.dim // GROUP
        scale = _of_bytes(stored[:, :num_groups], torch.float8_e8m0fnu).to(torch.float32)
        values = _of_bytes(stored[:, num_groups:], torch.float8_e4m3fn).to(torch.float32)
        scaled = values.reshape(len(stored), num_groups, GROUP) * scale[..., None]
        return scaled.reshape(len(stored), self.dim).to(self.torch_dtype)

    def _encode_int4(self, rows: Tensor) -> Tensor:
        groups = rows.reshape(len(rows), -1, GROUP)
        scale = (groups.abs().amax(dim=2) / 7.0).to(torch.float16)
        wide = scale.to(torch.float32)[..., None]
        values = torch.where(wide > 0, groups / wide, 0.0).round().clamp(-8, 7).to(torch.int16) + 8
        low, high = values[..., : GROUP // 2], values[..., GROUP // 2 :]
        halves = (low | high << 4).to(torch.uint8)
        return torch.cat((_bytes(scale), halves.reshape(len(rows), -1)), dim=1)

    def _decode_int4(self, stored: Tensor) -> Tensor:
        num_groups = self.dim // GROUP
        scale = _of_bytes(stored[:, : 2 * num_groups], torch.float16).to(torch.float32)
        halves = stored[:, 2 * num_groups :].reshape(len(stored), num_groups, GROUP // 2)
        values = torch.cat((halves & 15, halves >> 4), dim=2).to(torch.float32) - 8.0
        return (values * scale[..., None]).reshape(len(stored), self.dim).to(self.torch_dtype)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _of_bytes(stored: Tensor, dtype: torch.dtype) -> Tensor:
    # a copy of its own: a slice of rows is neither contiguous nor aligned to the dtype
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)
