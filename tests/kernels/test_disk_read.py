"""Spans of a file, read at any depth, with and without io_uring, checked and decoded on the way."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.kernels.checksum import crc32c_pages
from scone.kernels.disk_read import RowsOut, SpanReader, Spans, open_span_reader, uring_available
from scone.kernels.row_codec import RowCodec


def check_decoding(reader: SpanReader, content: NDArray[np.uint8], generator: np.random.Generator) -> None:
    """Rows of 500 bytes in pages read as spans of any length, some of them across two spans."""
    codec = RowCodec("raw", "bfloat16", 250)
    sizes = generator.integers(1, 4, 40) * 4096
    places = np.cumsum(sizes) - sizes
    buffer = np.zeros(int(sizes.sum()), np.uint8)
    row_offsets = np.sort(generator.integers(0, len(buffer) - 500, 300))
    assert any(((row_offsets < place) & (row_offsets + 500 > place)).any() for place in places.tolist())
    targets = generator.permutation(400)[:300]
    out = torch.full((400, 250), 3.0, dtype=torch.bfloat16)
    spans = Spans(places, sizes, places)
    reader.read(spans, buffer, None, RowsOut(row_offsets, targets, codec, out))
    np.testing.assert_array_equal(buffer, content[: len(buffer)])
    for offset, target in zip(row_offsets.tolist(), targets.tolist(), strict=True):
        assert out[target].view(torch.uint8).numpy().tobytes() == content[offset : offset + 500].tobytes()
    untouched = np.setdiff1d(np.arange(400), targets)
    assert (out[untouched] == 3.0).all()
    with pytest.raises(ValueError, match="not in order"):
        reader.read(spans, buffer, None, RowsOut(row_offsets[::-1].copy(), targets, codec, out))


def spans_of(offsets: list[int], sizes: list[int], places: list[int]) -> Spans:
    return Spans(np.array(offsets), np.array(sizes), np.array(places))


@pytest.mark.parametrize("use_uring", [True, False])
@pytest.mark.parametrize("depth", [1, 3, 64])
def test_spans_are_read_at_any_depth(tmp_path: Path, use_uring: bool, depth: int) -> None:
    content = np.random.default_rng(0).integers(0, 256, 1_000_003, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    generator = np.random.default_rng(depth)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        reader = open_span_reader(fd, depth, use_uring=use_uring)
        assert reader.name == ("io_uring" if use_uring and uring_available() else "pread")
        for num_spans in (1, 2, 7, 300):
            sizes = generator.integers(1, 5000, num_spans)
            offsets = generator.integers(0, len(content) - 5000, num_spans)
            places = np.cumsum(sizes) - sizes
            buffer = np.zeros(int(sizes.sum()), np.uint8)
            reader.read(Spans(offsets, sizes, places), buffer)
            expected = np.concatenate([content[o : o + s] for o, s in zip(offsets, sizes, strict=True)])
            np.testing.assert_array_equal(buffer, expected)
        check_decoding(reader, content, generator)
        pages = generator.permutation(240)[:200]
        buffer, sums = np.zeros(200 * 4096, np.uint8), np.zeros(200, np.uint32)
        places = np.arange(200) * 4096
        reader.read(Spans(pages * 4096, np.full(200, 4096), places), buffer, sums)
        np.testing.assert_array_equal(sums, crc32c_pages(buffer, 4096))
        np.testing.assert_array_equal(buffer[:4096], content[pages[0] * 4096 :][:4096])
        with pytest.raises(ValueError, match="within a page"):
            reader.read(spans_of([0], [30], [5]), buffer, sums)
        with pytest.raises(ValueError, match="does not fit"):
            reader.read(spans_of([0], [4097], [0]), buffer, sums[:1])
        buffer = buffer[:25]
        with pytest.raises(OSError, match="ended early"):
            reader.read(spans_of([0, len(content) - 10], [5, 20], [0, 5]), buffer[:25])
        with pytest.raises(ValueError, match="does not fit"):
            reader.read(spans_of([0], [30], [0]), buffer[:25])
    finally:
        os.close(fd)
    closed = open_span_reader(1_000_000, depth, use_uring=use_uring)
    with pytest.raises(OSError, match="Bad file descriptor"):
        closed.read(spans_of([0, 1], [5, 5], [0, 5]), np.zeros(10, np.uint8))
