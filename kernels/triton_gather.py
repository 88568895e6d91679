"""Gather and dequantise on CUDA: stored rows by id, decoded, rounded and written to their places, in one
kernel. Triton twin of kernels/row_codec.py and native/decode_row.cpp, equal to them bit for bit.

All rounding is done on integers, to nearest even, so that no compiler's idea of a cast shows. Tested in
Triton's interpreter, compiled for sm_80, sm_90 and sm_100, and on the GPU that `make test-cuda` finds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.row_codec import DTYPE_IDS, GROUP, RowCodec

BLOCK = 256
"""Values that one program decodes."""


@triton.jit
def bfloat16_bits(x):
    """float32 -> the 16 bits of the nearest bfloat16, as uint32."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint32)


@triton.jit
def float16_bits(x):
    """float32 -> the 16 bits of the nearest float16, as uint32."""
    u = x.to(tl.uint32, bitcast=True)
    sign = (u >> 16) & 0x8000
    magnitude = u & 0x7FFFFFFF
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    # adding 0.5 aligns the ten bits of a subnormal half at the bottom; the adder rounds to even
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
    # 0xC8000FFF: minus 112 in the exponent, plus just under half of the last place
    normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13
    half = tl.where(magnitude >= 0x47800000, special, tl.where(magnitude < 0x38800000, subnormal, normal))
    return half | sign


@triton.jit
def float16_value(bits):
    """The 16 bits of a float16, as uint32 -> float32."""
    magnitude = (bits & 0x7FFF) << 13
    exponent = magnitude & 0x0F800000
    normal = magnitude + 0x38000000
    special = normal + 0x38000000
    subnormal = ((normal + 0x00800000).to(tl.float32, bitcast=True) - 6.103515625e-05).to(
        tl.uint32, bitcast=True
    )
    u = tl.where(exponent == 0x0F800000, special, tl.where(exponent == 0, subnormal, normal))
    return (u | ((bits & 0x8000) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def fp8_value(bits):
    """The 8 bits of a float8_e4m3fn, as uint32 -> float32."""
    exponent = (bits >> 3) & 15
    mantissa = bits & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    is_nan = (exponent == 15) & (mantissa == 7)
    u = tl.where(is_nan, 0x7FC00000, magnitude.to(tl.uint32, bitcast=True)).to(tl.uint32)
    return (u | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(bits):
    """The 8 bits of a float8_e8m0fnu, as uint32 -> float32: a power of two."""
    u = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23)).to(tl.uint32)
    return u.to(tl.float32, bitcast=True)


@triton.jit
def float_value(bits, DTYPE: tl.constexpr):
    """Bits of a value of dtype number DTYPE, as uint32 -> float32."""
    if DTYPE == 0:
        value = bits.to(tl.float32, bitcast=True)
    elif DTYPE == 1:
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = float16_value(bits)
    return value


@triton.jit
def float_bits(value, DTYPE: tl.constexpr):
    """float32 -> the bits of the nearest value of dtype number DTYPE, as uint32."""
    if DTYPE == 0:
        bits = value.to(tl.uint32, bitcast=True)
    elif DTYPE == 1:
        bits = bfloat16_bits(value)
    else:
        bits = float16_bits(value)
    return bits


@triton.jit
def load_bits(pointer, mask, BYTES: tl.constexpr):
    """BYTES bytes, little-endian, at any alignment, as uint32."""
    bits = tl.load(pointer, mask=mask, other=0).to(tl.uint32)
    for i in tl.static_range(1, BYTES):
        bits |= tl.load(pointer + i, mask=mask, other=0).to(tl.uint32) << (8 * i)
    return bits


@triton.jit
def gather_kernel(
    stored,  # uint8*: rows end to end
    row_ids,  # int64*: (n,)
    places,  # int64*: (n,)
    out,  # uint16* or uint32*: bits of (any, dim)
    row_bytes,
    out_stride,
    DIM: tl.constexpr,
    CODEC: tl.constexpr,  # as RowCodec.codec_id
    DTYPE: tl.constexpr,  # as RowCodec.dtype_id
    OUT_DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < DIM
    row = stored + tl.load(row_ids + i) * row_bytes
    if CODEC == 0:
        WIDTH: tl.constexpr = 4 if DTYPE == 0 else 2
        bits = load_bits(row + column * WIDTH, mask, WIDTH)
    else:
        if CODEC == 2:
            group = column // GROUP
            within = column % GROUP
            scale = float16_value(load_bits(row + 2 * group, mask, 2))
            byte = load_bits(row + 2 * (DIM // GROUP) + group * (GROUP // 2) + within % (GROUP // 2), mask, 1)
            nibble = (byte >> tl.where(within < GROUP // 2, 0, 4).to(tl.uint32)) & 15
            value = (nibble.to(tl.int32) - 8).to(tl.float32) * scale
        elif CODEC == 3:
            scale = e8m0_value(load_bits(row + column // GROUP, mask, 1))
            value = fp8_value(load_bits(row + DIM // GROUP + column, mask, 1)) * scale
        else:
            scale = load_bits(row + 0 * column, mask, 4).to(tl.float32, bitcast=True)
            byte = load_bits(row + 4 + column, mask, 1)
            value = (byte.to(tl.int32) - ((byte & 0x80) << 1).to(tl.int32)).to(tl.float32) * scale
        bits = float_bits(value, DTYPE)
    if OUT_DTYPE != DTYPE:
        bits = float_bits(float_value(bits, DTYPE), OUT_DTYPE)
    target = out + tl.load(places + i) * out_stride + column
    tl.store(target, bits.to(out.dtype.element_ty), mask=mask)


def gather_rows(stored: Tensor, codec: RowCodec, row_ids: Tensor, places: Tensor, out: Tensor) -> None:
    """Writes row row_ids[i] to out[places[i]], decoded and cast; all on one CUDA device.

    Args:
        stored: (num_rows, codec.row_bytes) uint8.
        row_ids, places: (n,) int64, in range.
        out: (any, dim) float32, bfloat16 or float16, values of a row side by side.
    """
    if len(row_ids):
        launch_gather(gather_kernel, stored, codec, row_ids, places, out)


def launch_gather(
    kernel: object, stored: Tensor, codec: RowCodec, row_ids: Tensor, places: Tensor, out: Tensor
) -> None:
    """`gather_rows` by the compiled kernel or, in tests, the interpreted one."""
    bits = out.view(torch.uint32 if out.dtype == torch.float32 else torch.uint16)
    kernel[(len(row_ids), triton.cdiv(codec.dim, BLOCK))](  # type: ignore[index]
        stored,
        row_ids,
        places,
        bits,
        codec.row_bytes,
        out.stride(0),
        DIM=codec.dim,
        CODEC=codec.codec_id,
        DTYPE=codec.dtype_id,
        OUT_DTYPE=DTYPE_IDS[out.dtype],
        GROUP=GROUP,
        BLOCK=BLOCK,
    )
