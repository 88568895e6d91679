"""CUDA graphs of the forward pass: a graph for each of a few shapes of a step.

A step is padded up to the next shape with tokens that store nothing and tiles that have no queries. Steps
that decode, of one token a sequence, have shapes of their own, since their attention is another kernel's; the
others, with chunks of prompts, are told apart by their number of tokens alone. All graphs share one pool of
memory, since only one runs at a time, and read fixed addresses; they are captured at start-up, the largest
first.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scone.server.engine.scheduler import Chunk

logger = logging.getLogger(__name__)

FEWEST_TOKENS = 16
MOST_TOKENS = 2048
"""Of a step with chunks of prompts that a graph does: computing more takes longer than launching it."""


class StepShape(NamedTuple):
    """What a graph is captured for.

    Attributes:
        decodes: each tile has one token.
    """

    num_tokens: int
    num_tiles: int
    decodes: bool


class StepShapes:
    """The shapes that steps are padded to."""

    def __init__(self, max_num_seqs: int, max_num_tokens: int, queries_per_tile: int) -> None:
        """For steps of so many sequences and tokens at most, with tiles of so many queries."""
        self._decode = decode_sizes(max_num_seqs)
        self._mixed = mixed_sizes(min(max_num_tokens, MOST_TOKENS))
        self._max_num_seqs, self._queries_per_tile = max_num_seqs, queries_per_tile

    def all(self) -> list[StepShape]:
        """Falling, those that need most memory first."""
        mixed = [self._mixed_shape(size) for size in self._mixed]
        decode = [StepShape(size, size, True) for size in self._decode]
        return sorted(mixed + decode, reverse=True)

    def padded(self, chunks: Sequence[Chunk]) -> StepShape | None:
        """The least shape that holds the chunks; None: they are more than any."""
        num_tokens = sum([c.num_tokens for c in chunks])
        if num_tokens == len(chunks):
            num_padded = _at_least(self._decode, num_tokens)
            return StepShape(num_padded, num_padded, True)
        if num_tokens > self._mixed[-1]:
            return None
        return self._mixed_shape(_at_least(self._mixed, num_tokens))

    def _mixed_shape(self, num_tokens: int) -> StepShape:
        """With as many tiles as so many tokens can take: each sequence's last may be a part of one."""
        num_seqs = min(num_tokens, self._max_num_seqs)
        return StepShape(num_tokens, min(num_tokens, num_tokens // self._queries_per_tile + num_seqs), False)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then 16 apart up to 64, 32 up to 256, 128 beyond, and `max_num_seqs` itself, rising."""
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    size = 16
    while size < max_num_seqs:
        sizes.append(size)
        size += 16 if size < 64 else 32 if size < 256 else 128
    return [*sizes, max_num_seqs]


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """16 apart up to 128, then a quarter of a power of two apart, and `max_num_tokens` itself, rising."""
    sizes = []
    size = FEWEST_TOKENS
    while size < max_num_tokens:
        sizes.append(size)
        size += max(FEWEST_TOKENS, (1 << (size.bit_length() - 1)) // 4)
    return [*sizes, max_num_tokens]


class StepGraphs:
    """One graph per shape; for the thread that runs the model."""

    def __init__(
        self,
        shapes: Sequence[StepShape],
        prepare: Callable[[StepShape], object],
        run: Callable[[StepShape], Tensor],
    ) -> None:
        """Captures `run(shape)`, which must do the same work on the same addresses each time.

        `prepare(shape)` writes inputs there that do no harm.
        """
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        began = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for shape in shapes:
            prepare(shape)
            # Once outside: kernels are compiled and libraries take their workspace on the first call.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(shape)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile, as one that loads a table does
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = run(shape)
            self._graphs[shape] = (graph, result)
        seconds = time.monotonic() - began
        logger.info("%d CUDA graphs in %.1f s", len(shapes), seconds)

    def replay(self, shape: StepShape) -> Tensor:
        """Queues the work of a shape; its result, valid until any graph runs again."""
        graph, result = self._graphs[shape]
        graph.replay()
        return result


def _at_least(sizes: Sequence[int], num: int) -> int:
    """The least of the rising sizes that is not below `num`."""
    return sizes[bisect_left(sizes, num)]
