"""CUDA graphs of the forward pass of steps that decode: a graph for each of a few batch sizes.

A step of one token each is padded up to the next size. All graphs share one pool of memory, since only one
runs at a time, and read fixed addresses; they are captured at start-up, the largest first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_EVERY = 16
"""Sizes from here on are this far apart up to 64, twice as far up to 256, then eight times."""


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 48, 64, 96, 128, ... and `max_num_seqs` itself, rising."""
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    size = _EVERY
    while size < max_num_seqs:
        sizes.append(size)
        size += _EVERY if size < 64 else 2 * _EVERY if size < 256 else 8 * _EVERY
    return [*sizes, max_num_seqs]


def padded_size(sizes: list[int], num_seqs: int) -> int:
    """The least size that holds so many."""
    return next(size for size in sizes if size >= num_seqs)


class DecodeGraphs:
    """One graph per size of `sizes`; for the thread that runs the model."""

    def __init__(
        self, sizes: list[int], prepare: Callable[[int], None], run: Callable[[int], Tensor]
    ) -> None:
        """Captures `run(size)`, which must do the same work on the same addresses each time.

        `prepare(size)` writes inputs there that do no harm.
        """
        self.sizes = sizes
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        began = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):
            prepare(size)
            # Once outside: kernels are compiled and libraries take their workspace on the first call.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile, as one that loads a table does
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = run(size)
            self._graphs[size] = (graph, result)
        seconds = time.monotonic() - began
        logger.info("%d CUDA graphs, of up to %d sequences, in %.1f s", len(sizes), sizes[-1], seconds)

    def replay(self, size: int) -> Tensor:
        """Queues the work of a size; its result, valid until any graph runs again."""
        graph, result = self._graphs[size]
        graph.replay()
        return result
