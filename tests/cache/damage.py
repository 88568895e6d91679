"""Damage to a store's files, as a disk does it: behind the store's back."""

from __future__ import annotations

from pathlib import Path


def flip_bit(folder: Path, needle: bytes) -> bool:
    """Flips a bit of the first byte of `needle` where it first lies; whether one of the files has it."""
    for file in folder.glob("shard-*.lmdb"):
        position = file.read_bytes().find(needle)
        if position >= 0:
            with file.open("r+b") as raw:
                raw.seek(position)
                raw.write(bytes([needle[0] ^ 4]))
            return True
    return False
