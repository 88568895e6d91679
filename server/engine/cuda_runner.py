"""The model runner on CUDA: inputs in one copy a step, forward passes by graphs.

Nothing here waits for the device; the sampler does, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scone.cache.device import Device
from scone.kernels.triton_attention import queries_per_tile
from scone.model_store.decoder import Decoder
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.layer_range import ALL_LAYERS, LayerRange
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk
from scone.server.engine.step_graphs import StepGraphs, StepShape, StepShapes
from scone.server.engine.step_inputs import Step, StepInputs
from scone.server.engine.triton_forward import TritonForward


class _Prepared(NamedTuple):
    """A step whose inputs are on their way; `shape` is that of its graph, if it has one."""

    chunks: Sequence[Chunk]
    shape: StepShape | None
    step: Step


class CudaRunner(ModelRunner):
    """A `ModelRunner` whose steps are queued from fixed buffers; for the thread that runs the model.

    Attributes:
        num_replays: steps that a graph did, a counter.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig, device: Device) -> None:
        """`device` copies the inputs. Raises SettingError as `ModelRunner` does."""
        super().__init__(decoder, config)
        assert isinstance(self._forward, TritonForward)
        self._triton = self._forward
        tile = queries_per_tile(decoder.config.num_heads, decoder.config.num_kv_heads)
        self._inputs = StepInputs(device, config, queries_per_tile=tile)
        shape = (config.max_num_batched_tokens, self.dim)
        self._embeddings = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._prepared: _Prepared | None = None
        self.num_replays = 0
        self._shapes = StepShapes(config.max_num_seqs, config.max_num_batched_tokens, tile)
        self._graphs: StepGraphs | None = None
        if not config.enforce_eager:
            with torch.inference_mode():
                self._graphs = StepGraphs(self._shapes.all(), self._prepare_padding, self._run_in_place)

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """As `ModelRunner.embed`, in memory that the next call uses again."""
        step = self._prepare(chunks).step
        embeddings = self._embeddings[: sum([c.num_tokens for c in chunks])]
        self._triton.embed_into(step.input_ids[: len(embeddings)], embeddings)
        return embeddings

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange = ALL_LAYERS) -> Tensor:
        """As `ModelRunner.forward`; valid until the next call."""
        prepared = self._prepared
        if prepared is None or prepared.chunks is not chunks:
            prepared = self._prepare(chunks)
        is_in_place = embeddings.data_ptr() == self._embeddings.data_ptr()
        if self._graphs is None or prepared.shape is None or layers != ALL_LAYERS or not is_in_place:
            return self._run(prepared.step, embeddings, layers)
        self.num_replays += 1
        return self._graphs.replay(prepared.shape)[: len(embeddings)]

    def _prepare(self, chunks: Sequence[Chunk]) -> _Prepared:
        """Queues the copy of the chunks' inputs, padded where a graph is to read them."""
        shape = None if self._graphs is None else self._shapes.padded(chunks)
        self._prepared = _Prepared(chunks, shape, self._inputs.put(chunks, shape))
        return self._prepared

    def _prepare_padding(self, shape: StepShape) -> None:
        self._inputs.put([], shape)

    def _run_in_place(self, shape: StepShape) -> Tensor:
        """What a graph does: a step of this shape from the fixed buffers."""
        return self._run(self._inputs.step(shape), self._embeddings[: shape.num_tokens], ALL_LAYERS)

    def _run(self, step: Step, embeddings: Tensor, layers: LayerRange) -> Tensor:
        k_cache, v_cache = self._kv_cache[0], self._kv_cache[1]
        return self._triton.forward(
            embeddings, step.positions, step.batch, k_cache, v_cache, layers.end, layers.first
        )
