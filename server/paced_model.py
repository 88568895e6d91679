"""A model and an accelerator that only take time: the serving path around them is real, at a GPU's pace.

For measurements on a machine without one. Work of the model is queued and takes as long as it is told to;
copies take their bytes' time at PCIe speed. The host writes each step's inputs as it does for `CudaRunner`,
but launches no kernels. It sleeps until the device is done where a real one would make it wait, and the
tokens "sampled" follow texts given in advance, so that f-grams match as in these texts.
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
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.scheduler import Chunk
from scone.server.engine.step_inputs import StepInputs

COPY_SECONDS = 10e-6
"""From the call to the first byte; a usual figure for a small copy from pinned memory."""

QUERIES_PER_TILE = 16
"""What attention kernels take of a prompt together; a usual figure."""

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
    """Stands in for `ModelRunner`; request number r is continued as in texts[r], taken in turn.

    Args:
        config: of the engine that it is for.
        decode_seconds: a step that decodes takes this long, for however many sequences.
        prefill_tokens_per_second: what a step's prompt tokens take in addition.
    """

    device = torch.device("cpu")
    dtype = torch.bfloat16
    state_identity = StateIdentity(model_hash="", tokenizer_hash="", compute="paced")
    workspace = None
    is_asynchronous = True

    def __init__(
        self,
        device: PacedDevice,
        texts: Sequence[NDArray[np.int64]],
        config: EngineConfig,
        *,
        dim: int,
        vocab_size: int,
        num_blocks: int,
        decode_seconds: float,
        prefill_tokens_per_second: float,
    ) -> None:
        self.dim, self.vocab_size, self.num_blocks = dim, vocab_size, num_blocks
        self._device, self._texts = device, texts
        self._decode_seconds, self._prefill_speed = decode_seconds, prefill_tokens_per_second
        self._embeddings = torch.zeros(config.max_num_batched_tokens, dim, dtype=self.dtype)
        self._next_tokens = torch.zeros(config.max_num_batched_tokens, 1)
        self._inputs = StepInputs(device, config, queries_per_tile=QUERIES_PER_TILE)

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        self._inputs.put(chunks)
        return self._embeddings[: sum(chunk.num_tokens for chunk in chunks)]

    def forward_each(
        self, chunks: Sequence[Chunk], embeddings: Tensor, ranges: Sequence[LayerRange]
    ) -> Tensor:
        """Hidden states (n, 1): the token that follows, where one is to be sampled."""
        num_decode = sum(chunk.num_tokens == 1 for chunk in chunks)
        seconds = self._decode_seconds if num_decode else 0.0
        self._device.compute(seconds + (len(embeddings) - num_decode) / self._prefill_speed)
        texts, ends = self._texts, [c.start + c.num_tokens for c in chunks]
        next_tokens = [texts[c.seq.arrival % len(texts)][end] for c, end in zip(chunks, ends, strict=True)]
        places = np.cumsum([c.num_tokens for c in chunks]) - 1
        self._next_tokens.numpy()[places, 0] = next_tokens
        return self._next_tokens[: len(embeddings)]

    def logits(self, hidden: Tensor) -> Tensor:
        token_ids, _ = self.best_tokens(hidden)
        return torch.nn.functional.one_hot(token_ids, self.vocab_size).float()

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        return self.logits(hidden)

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden[:, 0].long(), torch.ones(len(hidden))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass


def _sleep_until(moment: float) -> None:
    while (seconds := moment - time.perf_counter()) > 0:
        time.sleep(seconds)
