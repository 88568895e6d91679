"""What the process costs its host, beyond prometheus_client's own collector: page faults and kinds of memory.

Source: proc(5), /proc/self/stat fields 10 and 12, /proc/self/status.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_RSS_LINE = re.compile(r"^Rss(Anon|File|Shmem):\s+(\d+) kB$", re.MULTILINE)


class ProcessMemoryCollector(Collector):
    """Read anew at each scrape; exports nothing where there is no /proc."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc

    def collect(self) -> Iterator[Metric]:
        try:
            # The command's name may hold spaces and brackets: count fields from its last bracket.
            fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
            status = (self._proc / "status").read_text()
        except OSError:
            return
        for kind, field in (("minor", 7), ("major", 9)):
            yield CounterMetricFamily(
                f"scone_process_{kind}_page_faults",
                f"{kind.capitalize()} page faults.",
                value=int(fields[field]),
            )
        resident = GaugeMetricFamily(
            "scone_process_resident_bytes",
            "Resident memory by kind; file pages can be dropped.",
            labels=["kind"],
        )
        for kind, kibibytes in _RSS_LINE.findall(status):
            resident.add_metric([kind.lower()], int(kibibytes) * 1024)
        yield resident
