"""The look-up of one decode step in one native call: newest tokens matched, rows copied (native/look_up.cpp).

The two steps by themselves, `Matcher.match_newest` and `RowMemory.gather`, are its oracle. Made of lists,
since that is what an engine keeps of its sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scone.kernels.extension import native
from scone.kernels.gather import RowMemory, RowTarget
from scone.kernels.match import FAULTS, Matcher, raise_fault

_NOT_NEWEST, _ELSEWHERE = -1, -2


def look_up_newest(
    matcher: Matcher,
    memory: RowMemory,
    sequences: list[list[int]],
    row_ids: list[list[int]],
    positions: list[int],
    out: RowTarget,
    wanted: NDArray[np.int64],
    places: NDArray[np.int64],
) -> int | None:
    """As `Matcher.match_newest`, and the row of wanted[k] is written to out[k], or, by place, to out[places[k]].

    Args:
        memory: of checked bytes: without checksums of its own.
        positions: of each sequence, which of its inputs is asked for.
        out: of at least as many rows as there are sequences.

    Returns:
        How many rows there are. None, and nothing was appended, if some position is not that of the newest
        token, or was matched before, or some row is not in this memory.

    Raises:
        DamagedDataError: as `Matcher.match_newest`.
    """
    if native is None or matcher.native is None or memory.native is None:
        return look_up_reference(matcher, memory, sequences, row_ids, positions, out, wanted, places)
    found: int = native.look_up_newest(
        matcher.native,
        memory.native,
        sequences,
        row_ids,
        positions,
        out,
        wanted,
        places,
    )
    if found >= 0:
        return found
    if found > FAULTS:
        return None
    raise_fault(FAULTS - found)
    raise AssertionError(f"native look_up_newest returned {found}")


def look_up_reference(
    matcher: Matcher,
    memory: RowMemory,
    sequences: list[list[int]],
    row_ids: list[list[int]],
    positions: list[int],
    out: RowTarget,
    wanted: NDArray[np.int64],
    places: NDArray[np.int64],
) -> int | None:
    """The oracle of `look_up_newest`."""
    ends = [(len(tokens) - 1, len(ids)) for tokens, ids in zip(sequences, row_ids, strict=True)]
    if ends != [(position, position) for position in positions]:
        return None
    found: list[list[int]] = [[] for _ in sequences]
    num_wanted = matcher.match_newest(sequences, found, wanted, places)
    if num_wanted and wanted[:num_wanted].max() >= memory.num_rows:
        return None
    for ids, more in zip(row_ids, found, strict=True):
        ids += more
    rows = torch.empty(num_wanted, out.dim, dtype=out.rows.dtype)
    memory.gather(wanted[:num_wanted], 0, memory.num_rows, rows)
    out.put(rows, places[:num_wanted])
    return num_wanted
