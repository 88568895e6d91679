"""CRC-32C against its published check values and its oracle."""

import numpy as np
import pytest

from scone.kernels.checksum import crc32c, crc32c_pages, crc32c_pages_reference
from scone.kernels.extension import native


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_published_values(data: bytes, crc: int) -> None:
    """The last two are from RFC 3720, appendix B.4."""
    assert crc32c(data) == crc


@pytest.mark.parametrize("size", [1, 7, 8, 4095, 4096, 4097, 20_003])
def test_native_equals_oracle_at_any_size(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    np.testing.assert_array_equal(crc32c_pages(data, 4096), crc32c_pages_reference(data, 4096))
    if native is not None:
        assert native.crc32c_scalar(data) == crc32c(data.tobytes())
