"""A Prometheus histogram of values that come many at a time, all alike: those of a step's tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class WeightedHistogram(Collector):
    """For one thread to observe with; any may collect."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        """`bounds` rise; one of infinity is added."""
        self._name, self._text = name, text
        self._bounds = (*bounds, float("inf"))
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, num: int) -> None:
        """The value came so many times."""
        self._counts[bisect_left(self._bounds, value)] += num
        self._sum += value * num

    def collect(self) -> Iterator[Metric]:
        totals = accumulate(self._counts)
        names = map(floatToGoString, self._bounds)
        buckets = list(zip(names, totals, strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)
