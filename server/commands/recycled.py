"""`scone recycled`: what a store of recycled states holds; emptying and resizing it while servers use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scone.cache.errors import CacheError, StoreVersionError
from scone.cache.recycled_disk import RecycledDisk, is_store, remove_store
from scone.cache.recycled_stats import KINDS, Kind, RecycledStats
from scone.server.errors import SettingError
from scone.server.settings import Command, Resolved, Setting, parse_bool, parse_bytes

_ACTIONS = ("stats", "clear", "resize")


def run(settings: Resolved) -> int:
    path: Path = settings.path
    if not is_store(path):
        raise CacheError(f"there is no store of recycled states at {path}")
    if settings.action == "clear":
        num_cleared = clear(path, settings.kind)
        print(f"{path}: {num_cleared} states removed" if num_cleared is not None else f"{path}: removed")
        return 0
    if settings.action == "resize":
        if settings.disk_bytes is None:
            raise SettingError("disk_bytes is missing: give the store's new budget, as in --disk-bytes 4GiB")
        RecycledDisk(path, settings.disk_bytes, RecycledStats()).close()
    facts = store_facts(path)
    if settings.json:
        print(json.dumps(facts))
        return 0
    print(f"{facts['file_bytes']:,} of {facts['disk_bytes']:,} bytes")
    for kind in KINDS:
        print(f"{kind:10} {facts[kind]['entries']:>12,} states {facts[kind]['payload_bytes']:>18,} bytes")
    return 0


def store_facts(path: Path) -> dict[str, Any]:
    """Budget, bytes on disk, and entries and bytes by kind; raises CacheError."""
    disk = RecycledDisk(path, None, RecycledStats())
    try:
        return {
            "disk_bytes": disk.disk_bytes,
            "file_bytes": disk.file_bytes,
            **{
                kind: {"entries": entries, "payload_bytes": num_bytes}
                for kind, (entries, num_bytes) in disk.usage().items()
            },
        }
    finally:
        disk.close()


def clear(path: Path, kind: Kind | None) -> int | None:
    """Removes states; how many, or None of another format version, whose files all go."""
    try:
        disk = RecycledDisk(path, None, RecycledStats())
    except StoreVersionError:
        if kind is not None:
            raise
        remove_store(path)
        return None
    try:
        return disk.clear(kind)
    finally:
        disk.close()


COMMAND = Command(
    name="recycled",
    help="show, empty or resize a store of recycled states; running servers keep what they have in memory",
    settings=(
        Setting(name="action", positional=True, required=True, choices=_ACTIONS, help="what to do"),
        Setting(name="path", kind=Path, positional=True, required=True, help="folder of the store"),
        Setting(name="kind", choices=KINDS, help="clear only these (default: all)"),
        Setting(
            name="disk_bytes", kind=parse_bytes, help="resize to this budget, for all servers that use it"
        ),
        Setting(name="json", kind=parse_bool, default=False, help="print one JSON object"),
    ),
    run=run,
)
