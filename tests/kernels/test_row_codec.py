"""Codecs: native decoders against the torch oracle, and both against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scone.kernels.gather import decode_rows
from scone.kernels.row_codec import CODECS, DTYPES, RowCodec


def sample_rows(dim: int) -> torch.Tensor:
    """Ordinary rows, a zero row, tiny and huge ones, and one with subnormal halves."""
    rows = torch.randn(24, dim, generator=torch.Generator().manual_seed(1))
    rows[1] = 0
    rows[2] *= 1e-38
    rows[3] *= 1e-6
    rows[4] *= 1e4
    rows[5] *= 2.0**-24
    return rows


@pytest.mark.parametrize("dim", [32, 96, 576, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec_name", CODECS)
def test_native_decoder_equals_oracle_bit_for_bit(codec_name: str, dtype: str, dim: int) -> None:
    codec = RowCodec(codec_name, dtype, dim)
    stored = codec.encode(sample_rows(dim))
    assert stored.shape == (24, codec.row_bytes)
    expected = codec.decode_reference(stored)
    # one stray byte in front: rows need not be aligned
    flat = np.concatenate((np.zeros(1, np.uint8), stored.numpy().reshape(-1)))
    for out_dtype in DTYPES.values():
        out = torch.full((24, dim), 7.0, dtype=out_dtype)
        offsets = np.arange(24, dtype=np.int64) * codec.row_bytes + 1
        offsets[7] = -1
        decode_rows(flat, offsets, codec, out)
        assert torch.equal(out[8:], expected[8:].to(out_dtype))
        assert torch.equal(out[:7], expected[:7].to(out_dtype))
        assert (out[7] == 7.0).all()


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_16_bit_pattern_and_ties_are_cast_as_torch_casts_them(source: str, target: str) -> None:
    if source == "float32":
        # all upper halves, with lower halves around the ties of both 16-bit types
        upper = torch.arange(1 << 16, dtype=torch.int64) << 16
        lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        bits = (upper[:, None] | lower).reshape(-1)
        values = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    else:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(DTYPES[source])
    codec = RowCodec("raw", source, 64)
    rows = values.reshape(-1, 64)
    stored = rows.contiguous().view(torch.uint8).numpy().reshape(-1)
    out = torch.empty(rows.shape, dtype=DTYPES[target])
    decode_rows(stored, np.arange(len(rows), dtype=np.int64) * codec.row_bytes, codec, out)
    expected = rows.to(DTYPES[target])
    numbers = ~expected.isnan()
    width = torch.int32 if target == "float32" else torch.int16
    assert torch.equal(out.view(width)[numbers], expected.view(width)[numbers])
    assert out[~numbers].isnan().all()


@pytest.mark.parametrize(("codec_name", "worst"), [("int8", 1 / 127), ("fp8", 1 / 7), ("int4", 1 / 7)])
def test_quantised_rows_stay_near(codec_name: str, worst: float) -> None:
    """Half a step of the codec, relative to the largest value of the row or group."""
    codec = RowCodec(codec_name, "float32", 64)
    rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    error = (codec.decode_reference(codec.encode(rows)) - rows).abs().amax(dim=1)
    assert (error <= 0.51 * worst * rows.abs().amax(dim=1)).all()
    assert error.max() > 0


def test_golden_bytes() -> None:
    row = torch.tensor([[1.0, -2.0, 0.5, 127.0]])
    assert RowCodec("raw", "bfloat16", 4).encode(row).numpy().tobytes().hex() == "803f00c0003ffe42"
    assert RowCodec("int8", "bfloat16", 4).encode(row).numpy().tobytes().hex() == "0000803f01fe007f"
    # 1, -2, 0.5 and 448 under the scale 2^0; the same a little larger under 2^1; zeros under 2^-126
    fp8 = torch.zeros(1, 96)
    fp8[0, :4] = torch.tensor([1.0, -2.0, 0.5, 448.0])
    fp8[0, 32:36] = torch.tensor([1.0, -2.0, 0.5, 449.0])
    assert RowCodec("fp8", "bfloat16", 96).encode(fp8).numpy().tobytes().hex() == (
        "7f8001" + "38c0307e" + "00" * 28 + "30b82876" + "00" * 28 + "00" * 32
    )
    group = torch.arange(-7.0, 8.0).repeat(3)[:32][None]
    assert RowCodec("int4", "bfloat16", 32).encode(group).numpy().tobytes().hex() == (
        "003c2132435465768798a9bacbdcedfe1f21"
    )


@pytest.mark.parametrize(
    ("codec", "dtype", "dim", "message"),
    [
        ("zip", "bfloat16", 64, "codec is 'zip'"),
        ("raw", "int8", 64, "dtype is 'int8'"),
        ("raw", "bfloat16", 0, "dim is 0"),
        ("int4", "bfloat16", 33, "multiple of 32"),
        ("fp8", "bfloat16", 33, "multiple of 32"),
    ],
)
def test_impossible_codecs_are_refused(codec: str, dtype: str, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowCodec(codec, dtype, dim)
