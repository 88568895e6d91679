"""The model runner on CUDA: inputs in one copy a step, decoding by graphs.

Nothing here waits for the device; the sampler does, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scone.cache.device import Device
from scone.kernels.triton_attention import queries_per_tile
from scone.model_store.decoder import Decoder
from scone.server.engine.decode_graphs import DecodeGraphs, batch_sizes, padded_size
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.model_runner import ALL_LAYERS, ModelRunner
from scone.server.engine.scheduler import Chunk
from scone.server.engine.step_inputs import Step, StepInputs
from scone.server.engine.triton_forward import TritonForward


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
        self._inputs = StepInputs(
            device,
            max_num_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_blocks=-(-config.max_model_len // config.block_size),
            block_size=config.block_size,
            queries_per_tile=queries_per_tile(decoder.config.num_heads, decoder.config.num_kv_heads),
        )
        shape = (config.max_num_batched_tokens, self.dim)
        self._embeddings = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._prepared: tuple[Sequence[Chunk], Step] | None = None
        self.num_replays = 0
        self._graphs: DecodeGraphs | None = None
        if not config.enforce_eager:
            sizes = batch_sizes(config.max_num_seqs)
            with torch.inference_mode():
                self._graphs = DecodeGraphs(sizes, self._prepare_padding, self._decode)

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """As `ModelRunner.embed`, in memory that the next call uses again."""
        step = self._prepare(chunks)
        embeddings = self._embeddings[: sum([c.num_tokens for c in chunks])]
        self._triton.embed_into(step.input_ids[: len(embeddings)], embeddings)
        return embeddings

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange = ALL_LAYERS) -> Tensor:
        """As `ModelRunner.forward`; valid until the next call."""
        num_tokens = len(embeddings)
        prepared = self._prepared
        step = prepared[1] if prepared is not None and prepared[0] is chunks else self._prepare(chunks)
        is_in_place = embeddings.data_ptr() == self._embeddings.data_ptr()
        if self._graphs is not None and step.decodes and layers == ALL_LAYERS and is_in_place:
            self.num_replays += 1
            return self._graphs.replay(len(step.input_ids))[:num_tokens]
        return self._run(step.first(num_tokens) if step.decodes else step, embeddings, layers)

    def _prepare(self, chunks: Sequence[Chunk]) -> Step:
        """Queues the copy of the chunks' inputs, padded where a graph is to read them."""
        num_padded = 0
        if self._graphs is not None and all([c.num_tokens == 1 for c in chunks]):
            num_padded = padded_size(self._graphs.sizes, len(chunks))
        step = self._inputs.put(chunks, num_padded)
        self._prepared = (chunks, step)
        return step

    def _prepare_padding(self, size: int) -> None:
        self._inputs.put([], size)

    def _decode(self, size: int) -> Tensor:
        """What a graph does: a step of `size` tokens from the fixed buffers."""
        return self._run(self._inputs.step(size, size), self._embeddings[:size], ALL_LAYERS)

    def _run(self, step: Step, embeddings: Tensor, layers: LayerRange) -> Tensor:
        k_cache, v_cache = self._kv_cache[0], self._kv_cache[1]
        return self._triton.forward(
            embeddings, step.positions, step.batch, k_cache, v_cache, layers.end, layers.first
        )
