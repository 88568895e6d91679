"""States to be kept: told apart by their number, of any size."""

from __future__ import annotations

import numpy as np

from scone.cache.recycled_record import Record, state_key
from scone.cache.state_worth import Worth

BYTES = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8)


def record(number: int, num_bytes: int) -> Record:
    key = number.to_bytes(4, "big") * 8
    begin = number * 7919 % 4096
    return Record.make(state_key("blocks", key), b"ids of %d" % number, BYTES[begin : begin + num_bytes])


def worth(score: float = 0.0) -> Worth:
    return Worth(score, 0.0)
