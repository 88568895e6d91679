"""How much memory this process may use: the machine's, or less where a cgroup says so."""

from __future__ import annotations

from pathlib import Path

_SELF_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """What can be allocated now without swapping or meeting the cgroup's limit."""
    available = _meminfo_available(_MEMINFO)
    headroom = cgroup_headroom(_SELF_CGROUP, _CGROUP_ROOT)
    return available if headroom is None else min(available, headroom)


def cgroup_headroom(self_cgroup: Path, root: Path) -> int | None:
    """Bytes below the tightest limit of the process's cgroup and its ancestors; None without a limit.

    Reads version 2 (memory.max) and version 1 (memory.limit_in_bytes).
    """
    try:
        lines = self_cgroup.read_text().splitlines()
    except OSError:
        return None
    headrooms: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            headrooms += _limits(root, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            headrooms += _limits(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(headrooms, default=None)


def _limits(root: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    """The headroom of each group from `path` up to `root` that has a limit."""
    found = []
    group = Path(path.lstrip("/"))
    # Inside a container the path may be the host's: then only the root itself exists.
    for folder in [root / group, *(root / parent for parent in group.parents)]:
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
        except (OSError, ValueError):
            continue
        if limit != "max" and int(limit) < 1 << 60:  # version 1 writes "no limit" as a huge number
            found.append(max(0, int(limit) - usage))
    return found


def _meminfo_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")
