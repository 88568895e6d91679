"""The look-up of one decode step in one native call: newest tokens matched, rows copied (native/look_up.cpp).

The two steps by themselves, `Matcher.match_newest` and `RowMemory.gather`, are its oracle. Made of lists,
since that is what an engine keeps of its sequences.
"""

from __future__ import annotations

import torch

from scone.kernels.extension import native
from scone.kernels.gather import RowMemory
from scone.kernels.match import FAULTS, Matcher, raise_fault
from scone.kernels.row_target import RowTarget

_NOT_NEWEST, _ELSEWHERE = -1, -2


def look_up_newest(
    matcher: Matcher,
    memory: RowMemory,
    sequences: list[list[int]],
    row_ids: list[list[int]],
    positions: list[int],
    out: RowTarget,
) -> int | None:
    """As `Matcher.match_newest`, and the rows are written as well.

    Args:
        memory: of checked bytes: without checksums of its own.
        positions: of each sequence, which of its inputs is asked for.
        out: of at least as many rows as there are sequences; takes the rows, their ids and whose they are.

    Returns:
        How many rows there are. None, and nothing was appended, if some position is not that of the newest
        token, or was matched before, or some row is not in this memory.

    Raises:
        DamagedDataError: as `Matcher.match_newest`.
    """
    if native is None or matcher.native is None or memory.native is None:
        return look_up_reference(matcher, memory, sequences, row_ids, positions, out)
    found: int = native.look_up_newest(
        matcher.native, memory.native, sequences, row_ids, positions, out.native
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
) -> int | None:
    """The oracle of `look_up_newest`."""
    ends = [(len(tokens) - 1, len(ids)) for tokens, ids in zip(sequences, row_ids, strict=True)]
    if ends != [(position, position) for position in positions]:
        return None
    found: list[list[int]] = [[] for _ in sequences]
    num_wanted = matcher.match_newest(sequences, found, out)
    wanted = out.row_ids[:num_wanted]
    if num_wanted and wanted.max() >= memory.num_rows:
        return None
    for ids, more in zip(row_ids, found, strict=True):
        ids += more
    rows = torch.empty(num_wanted, memory.codec.dim, dtype=out.rows.dtype)
    memory.gather(wanted, 0, memory.num_rows, rows)
    out.put(rows)
    return num_wanted
