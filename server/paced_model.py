"""A model and an accelerator that only take time: the serving path around them is real, at a GPU's pace.

For measurements on a machine without one. Work of the model is queued and takes as long as it is told to;
copies take their bytes' time at PCIe speed. The host sleeps until the device is done where a real one would
make it wait, and the tokens "sampled" follow texts given in advance, so that f-grams match as in these texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import CpuDevice, Event, Stream
from scone.cache.state_identity import StateIdentity
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.scheduler import Chunk

COPY_SECONDS = 10e-6
"""From the call to the first byte; a usual figure for a small copy from pinned memory."""

COPY_BYTES_PER_SECOND = 25e9
"""PCIe 4.0 x16."""


class Moment:
    """When a stream reaches a point."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0


class PacedDevice(CpuDevice):
    """Rows lie where the host writes them (moving them is not the host's work), but arrive as if copied."""

    is_host = False

    def __init__(self) -> None:
        super().__init__()
        self._compute, self._copy = Moment(), Moment()  # until when each stream is busy

    def compute(self, seconds: float) -> None:
        """Queues work of the model."""
        self._compute.at = max(self._compute.at, time.perf_counter()) + seconds

    def finish(self) -> None:
        """Blocks until the model's work is done, as reading a result would."""
        _sleep_until(self._compute.at)

    def launch(self, kernel: Callable[[], object]) -> None:
        pass  # moves no data that the model would look at, and takes the device no time to speak of

    def event(self) -> Event:
        return Moment()

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        num_bytes = source.nbytes
        self.usage.copied_bytes += num_bytes
        self._copy.at = (
            max(self._copy.at, time.perf_counter()) + COPY_SECONDS + num_bytes / COPY_BYTES_PER_SECOND
        )

    def record(self, event: Event, stream: Stream) -> None:
        event.at = self._moment(stream).at

    def wait(self, stream: Stream, event: Event) -> None:
        moment = self._moment(stream)
        moment.at = max(moment.at, event.at)

    def reached(self, event: Event) -> bool:
        return time.perf_counter() >= float(event.at)

    def synchronize(self, event: Event) -> None:
        _sleep_until(event.at)

    def _moment(self, stream: Stream) -> Moment:
        return self._copy if stream is Stream.COPY else self._compute


class PacedModel:
    """Stands in for `ModelRunner`; request number r is continued as in texts[r].

    Args:
        decode_seconds: a step that decodes takes this long, for however many sequences.
        prefill_tokens_per_second: what a step's prompt tokens take in addition.
    """

    device = torch.device("cpu")
    dtype = torch.bfloat16
    state_identity = StateIdentity(model_hash="", tokenizer_hash="", compute="paced")
    workspace = None

    def __init__(
        self,
        device: PacedDevice,
        texts: Sequence[NDArray[np.int64]],
        *,
        dim: int,
        vocab_size: int,
        num_blocks: int,
        max_num_tokens: int,
        decode_seconds: float,
        prefill_tokens_per_second: float,
    ) -> None:
        self.dim, self.vocab_size, self.num_blocks = dim, vocab_size, num_blocks
        self._device, self._texts = device, texts
        self._decode_seconds, self._prefill_speed = decode_seconds, prefill_tokens_per_second
        self._embeddings = torch.zeros(max_num_tokens, dim, dtype=self.dtype)
        self._next_tokens = torch.zeros(max_num_tokens, 1)

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        return self._embeddings[: sum(chunk.num_tokens for chunk in chunks)]

    def forward_each(
        self, chunks: Sequence[Chunk], embeddings: Tensor, ranges: Sequence[LayerRange]
    ) -> Tensor:
        """Hidden states (n, 1): the token that follows, where one is to be sampled."""
        num_decode = sum(chunk.num_tokens == 1 for chunk in chunks)
        seconds = self._decode_seconds if num_decode else 0.0
        self._device.compute(seconds + (len(embeddings) - num_decode) / self._prefill_speed)
        next_tokens = self._next_tokens.numpy()
        end = 0
        for chunk in chunks:
            end += chunk.num_tokens
            if chunk.reaches_end:
                next_tokens[end - 1, 0] = self._texts[chunk.seq.arrival][chunk.start + chunk.num_tokens]
        return self._next_tokens[:end]

    def logits(self, hidden: Tensor) -> Tensor:
        token_ids, _ = self.best_tokens(hidden)
        return torch.nn.functional.one_hot(token_ids, self.vocab_size).float()

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        return self.logits(hidden)

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self._device.finish()
        return hidden[:, 0].long(), torch.ones(len(hidden))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass


def _sleep_until(moment: float) -> None:
    while (seconds := moment - time.perf_counter()) > 0:
        time.sleep(seconds)
