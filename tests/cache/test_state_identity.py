"""Names tell apart whatever changes a state, and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest

from scone.cache.state_identity import StateIdentity, extend_block_hashes

IDENTITY = StateIdentity(model_hash="m", tokenizer_hash="t", table_id="x", layout="kv", rope="1e4")


def test_hashes_tell_apart_all_that_matters() -> None:
    roots = [
        IDENTITY.root(None),
        replace(IDENTITY, model_hash="mt", tokenizer_hash="").root(None),
        replace(IDENTITY, table_id="y").root(None),
        IDENTITY.root("salt"),
    ]
    hashes: list[list[bytes]] = []
    for root in roots:
        hashes.append([])
        extend_block_hashes(hashes[-1], root, [1, 2, 3, 4, 5], 2, 2)
    other: list[bytes] = []
    extend_block_hashes(other, roots[0], [1, 2, 3, 5], 2, 2)
    assert other[0] == hashes[0][0]
    assert other[1] != hashes[0][1]
    shifted: list[bytes] = []
    extend_block_hashes(shifted, roots[0], [3, 4, 3, 4], 2, 2)
    flat = [h for chain in hashes for h in chain] + [other[1], *shifted]
    assert len(set(flat)) == len(flat)
    again = hashes[0][:1]
    extend_block_hashes(again, roots[0], [1, 2, 3, 4, 5], 2, 2)
    assert again == hashes[0]


@pytest.mark.parametrize("name", [field.name for field in fields(StateIdentity)])
def test_every_part_changes_the_root(name: str) -> None:
    changed = replace(IDENTITY, **{name: getattr(IDENTITY, name) + "'"})
    assert changed.root(None) != IDENTITY.root(None)


def test_bytes_moved_from_one_part_to_the_next_change_the_root() -> None:
    parts = [field.name for field in fields(StateIdentity)]
    whole = StateIdentity(**dict.fromkeys(parts, "ab"))
    for first, second in pairwise(parts):
        assert replace(whole, **{first: "aba", second: "b"}).root(None) != whole.root(None)
