"""Rows out of memory: streamed or stored, on one thread or several, aligned or not, the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scone.kernels.gather import RowMemory, decode_rows
from scone.kernels.row_codec import CODECS, DTYPES, RowCodec

STREAMED_BYTES = 4 << 20  # outputs from here on go past the caches (native/gather.cpp)


def memory_of(stored: torch.Tensor, codec: RowCodec, shift: int = 0) -> RowMemory:
    data = np.concatenate((np.zeros(shift, np.uint8), stored.numpy().reshape(-1)))
    num_rows = len(stored)
    return RowMemory(data, np.array([shift], np.uint64), num_rows, num_rows, codec, None)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize(("dim", "shift", "offset"), [(1024, 0, 0), (1024, 3, 0), (1024, 0, 1), (1023, 0, 0)])
def test_large_outputs_equal_small_ones(dim: int, shift: int, offset: int, num_threads: int) -> None:
    """Source and target at any alignment; only aligned targets of whole 16-byte rows are streamed."""
    codec = RowCodec("raw", "bfloat16", dim)
    rows = torch.randn(64, dim, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    memory = memory_of(codec.encode(rows), codec, shift)
    num_out = STREAMED_BYTES // codec.row_bytes + 77
    ids = np.random.default_rng(0).integers(-1, 64, num_out)
    flat = torch.full((num_out * (dim + 8) + 1,), 7.0, dtype=torch.bfloat16)
    out = flat[offset : offset + num_out * (dim + 8)].view(num_out, dim + 8)[:, :dim]
    assert memory.gather(ids, 0, 60, out, num_threads) == int(((ids >= 0) & (ids < 60)).sum())
    wanted = (ids >= 0) & (ids < 60)
    assert torch.equal(out[wanted], rows[ids[wanted]])
    assert (out[~wanted] == 7.0).all()
    # the gaps between the rows are the caller's
    gaps = flat[offset : offset + num_out * (dim + 8)].view(num_out, dim + 8)[:, dim:]
    assert (gaps == 7.0).all()


def test_threads_that_come_too_late_are_done_without() -> None:
    """Far more threads than cores, and calls so short that most of them find nothing left to do."""
    codec = RowCodec("raw", "bfloat16", 1024)
    rows = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    memory = memory_of(codec.encode(rows), codec)
    out = torch.empty(600, 1024, dtype=torch.bfloat16)
    for seed in range(60):
        ids = np.random.default_rng(seed).integers(0, 512, 600)
        assert memory.gather(ids, 0, 512, out.zero_(), 16) == 600
        assert torch.equal(out, rows[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec_name", CODECS)
def test_gather_equals_decoding_the_same_rows(codec_name: str, dtype: str) -> None:
    codec = RowCodec(codec_name, dtype, 96)
    stored = codec.encode(torch.randn(50, 96, generator=torch.Generator().manual_seed(1)))
    memory = memory_of(stored, codec, shift=1)
    ids = np.random.default_rng(1).integers(0, 50, 33_000)
    for out_dtype in DTYPES.values():
        out = torch.zeros(len(ids), 96, dtype=out_dtype)
        decoded = torch.zeros_like(out)
        memory.gather(ids, 0, 50, out, 2)
        decode_rows(stored.numpy().reshape(-1), ids * codec.row_bytes, codec, decoded)
        assert torch.equal(out, decoded)


@pytest.mark.parametrize("is_native", [True, False])
def test_ids_beyond_the_table_are_refused_before_anything_is_written(is_native: bool) -> None:
    codec = RowCodec("raw", "bfloat16", 8)
    memory = memory_of(codec.encode(torch.ones(4, 8)), codec)
    if not is_native:
        memory.native = None
    out = torch.zeros(3, 8)
    for largest in (4, 2**62):
        with pytest.raises(IndexError, match=rf"row id {largest} is beyond the table's 4 rows"):
            memory.gather(np.array([3, -1, largest], np.int64), 0, 4, out)
    assert not out.any()
    assert memory.gather(np.array([-5, -1, 3], np.int64), 0, 4, out) == 1
    assert memory.gather(np.array([], np.int64), 0, 4, out[:0]) == 0
