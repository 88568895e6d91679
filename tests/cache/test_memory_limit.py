"""How much memory the cgroups above leave."""

from __future__ import annotations

from pathlib import Path

from scone.cache.memory_limit import cgroup_headroom


def test_the_tightest_cgroup_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "memory/a").mkdir(parents=True)
    cgroup = tmp_path / "cgroup"
    cgroup.write_text("0::/a/b\n")
    assert cgroup_headroom(cgroup, tmp_path) is None
    (tmp_path / "a/memory.max").write_text("1000\n")
    (tmp_path / "a/memory.current").write_text("400\n")
    (tmp_path / "a/b/memory.max").write_text("max\n")
    (tmp_path / "a/b/memory.current").write_text("300\n")
    assert cgroup_headroom(cgroup, tmp_path) == 600
    cgroup.write_text("4:memory:/a\n")
    (tmp_path / "memory/a/memory.limit_in_bytes").write_text("500\n")
    (tmp_path / "memory/a/memory.usage_in_bytes").write_text("800\n")
    assert cgroup_headroom(cgroup, tmp_path) == 0
    assert cgroup_headroom(tmp_path / "nowhere", tmp_path) is None
