"""The tensors of the engine: the KV cache, one step's inputs, the forward pass, the head.

Knows neither requests nor sampling.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scone.cache.state_identity import StateIdentity
from scone.kernels.extension import native
from scone.kernels.packed_linear import Workspace
from scone.kernels.paged_attention import PagedBatch
from scone.model_store.decoder import Decoder
from scone.server.engine.cache_pages import CachePages
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.kv_dtype import KvCacheSize, choose_kv_dtype
from scone.server.engine.layer_range import ALL_LAYERS, LayerRange
from scone.server.engine.native_forward import NativeForward
from scone.server.engine.scheduler import Chunk
from scone.server.engine.torch_forward import TorchForward
from scone.server.errors import SettingError

logger = logging.getLogger(__name__)


class Forward(Protocol):
    """A decoder over a paged cache; see `TorchForward` for shapes."""

    @property
    def arithmetic(self) -> str: ...
    def embed(self, input_ids: Tensor) -> Tensor: ...
    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        batch: PagedBatch,
        k_cache: Tensor,
        v_cache: Tensor,
        num_layers: int | None = None,
        first_layer: int = 0,
    ) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor: ...
    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]: ...


class Runner(Protocol):
    """What the engine needs of a model; see `ModelRunner`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def state_identity(self) -> StateIdentity: ...
    @property
    def workspace(self) -> Workspace | None: ...
    @property
    def is_asynchronous(self) -> bool: ...
    def embed(self, chunks: Sequence[Chunk]) -> Tensor: ...
    def forward_each(
        self, chunks: Sequence[Chunk], embeddings: Tensor, ranges: Sequence[LayerRange]
    ) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor: ...
    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]: ...
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None: ...


class BlockMemory(Protocol):
    """The KV cache as blocks of bytes; see `ModelRunner`."""

    @property
    def kv_dtype(self) -> torch.dtype: ...
    @property
    def block_bytes(self) -> int: ...
    def block(self, block_id: int) -> Tensor: ...


class StateMemory(Protocol):
    """What goes into the layers, block by block, and the way back to keys and values; see `ModelRunner`."""

    @property
    def state_bytes(self) -> int: ...
    def new_states(self, num_slots: int) -> Tensor: ...
    def keep_states_in(self, states: Tensor) -> None: ...
    def restore_blocks(
        self, states: Tensor, slots: Sequence[int], block_ids: Sequence[int], first_positions: Sequence[int]
    ) -> None: ...


class RecycledMemory(BlockMemory, StateMemory, Protocol):
    """What recycling needs of a runner."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def backend(self) -> str: ...
    @property
    def num_layers(self) -> int: ...


class ModelRunner:
    """A decoder and its KV cache.

    Attributes:
        num_blocks: blocks that `kv_cache_bytes` holds, at most what `max_num_seqs` full sequences need.
        backend: `native`, `triton` or `torch`.
        cache_pages: the KV cache's memory; None on a device.
        state_identity: the runner's part of what a state depends on; hashes of model and inputs are missing.
        dtype: of embeddings and hidden states.
        kv_dtype, kv_cache_size: type of keys and values, and what is set aside for them.
        workspace: threads for native kernels that sample; None: the backend is another.
        is_asynchronous: whether a forward pass is only queued, so that the host is free while it runs.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        """Raises SettingError if a setting asks for what this machine or model cannot do."""
        self.device = decoder.device
        self.is_asynchronous = self.device.type != "cpu"
        self.block_size = config.block_size
        shape = decoder.config
        self.vocab_size, self.dim, self.num_layers = shape.vocab_size, shape.dim, shape.num_layers
        self.backend = choose_backend(decoder, config)
        self._forward = _make_forward(self.backend, decoder, config)
        self.workspace = self._forward.workspace if isinstance(self._forward, NativeForward) else None
        self.dtype = torch.float32 if self.backend == "native" else decoder.dtype
        rounds_inputs = isinstance(self._forward, NativeForward) and self._forward.rounds_inputs
        self.kv_dtype = choose_kv_dtype(
            config.kv_cache_dtype, self.backend, self.dtype, rounds_inputs=rounds_inputs
        )
        block_bytes = shape.kv_values_per_token * self.kv_dtype.itemsize * config.block_size
        most = config.max_num_seqs * config.max_blocks_per_seq
        self.num_blocks = min(config.kv_cache_bytes // block_bytes, most)
        cache_shape = (
            2,  # keys, values
            shape.num_layers,
            self.num_blocks,
            shape.num_kv_heads,
            config.block_size,
            shape.head_dim,
        )
        self.kv_cache_size = KvCacheSize(self.kv_dtype, self.num_blocks * block_bytes)
        logger.info(
            "keys and values in %s: %d blocks of %d tokens, %d MB",
            self.kv_cache_size.dtype_name,
            self.num_blocks,
            config.block_size,
            self.kv_cache_size.num_bytes >> 20,
        )
        self._kv_cache = _zeros(cache_shape, self.kv_dtype, self.device)
        self._block_bytes = self._kv_cache.view(torch.uint8)
        self.cache_pages = CachePages(self._kv_cache) if self._kv_cache.is_cpu else None
        self._states: Tensor | None = None
        # The whole shape: weights of one hash may be read with another base of rotation or another norm.
        self.state_identity = StateIdentity(
            model_hash="",
            tokenizer_hash="",
            state_dtype=f"{self.dtype}, keys and values {self.kv_dtype}",
            layout="kv:" + "x".join(map(str, self.block(0).shape)),
            rope=f"{shape.rope_theta} {shape.rope_scaling}",
            compute=f"{self._forward.arithmetic}, {shape}",
        )

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Token embeddings (num_tokens, dim) of the chunks, one after the other."""
        input_ids = [t for c in chunks for t in c.seq.token_ids[c.start : c.start + c.num_tokens]]
        return self._forward.embed(torch.tensor(input_ids, device=self.device))

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange = ALL_LAYERS) -> Tensor:
        """Hidden states (num_tokens, dim); stores the chunks' keys and values. May reuse `embeddings`.

        Those after the last of `layers`, as they are; after all layers, normalised. Of each chunk only the
        last `num_wanted` are sure to be there.
        """
        positions = [p for c in chunks for p in range(c.start, c.start + c.num_tokens)]
        return self._forward.forward(
            embeddings,
            torch.tensor(positions, dtype=torch.int32, device=self.device),
            self._paged_batch(chunks),
            self._kv_cache[0],
            self._kv_cache[1],
            layers.end,
            layers.first,
        )

    def forward_each(
        self, chunks: Sequence[Chunk], embeddings: Tensor, ranges: Sequence[LayerRange]
    ) -> Tensor:
        """Hidden states (num_tokens, dim), each chunk's through its layers: one pass for equal ranges."""
        if ranges.count(ranges[0]) == len(ranges):
            return self.forward(chunks, embeddings, ranges[0])
        sizes = [c.num_tokens for c in chunks]
        parts = list(torch.split(embeddings, sizes))
        for layers in set(ranges):
            places = [i for i, r in enumerate(ranges) if r == layers]
            group = torch.cat([parts[i] for i in places])
            hidden = self.forward([chunks[i] for i in places], group, layers)
            for i, part in zip(places, torch.split(hidden, [sizes[i] for i in places]), strict=True):
                parts[i] = part
        return torch.cat(parts)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32."""
        return self._forward.logits(hidden)

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """(n, vocab_size) float32; only the head rows of `token_ids` are computed, the rest is -inf."""
        logits = torch.full((len(hidden), self.vocab_size), -torch.inf, device=self.device)
        ids = torch.tensor(token_ids, device=self.device)
        return logits.index_copy_(1, ids, self._forward.logits_of(hidden, token_ids))

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row the token with the highest logit, int64 (n,), and that logit, float32 (n,)."""
        return self._forward.best_tokens(hidden)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, target) in all layers."""
        if pairs:
            sources, targets = (list(ids) for ids in zip(*pairs, strict=True))
            self._kv_cache[:, :, targets] = self._kv_cache[:, :, sources]

    @property
    def block_bytes(self) -> int:
        """Of one block's keys and values in all layers."""
        return self.block(0).numel()

    def block(self, block_id: int) -> Tensor:
        """View (2, num_layers, num_kv_heads, block_size, head_dim in bytes) uint8 of its keys and values.

        What the bytes mean is the backend's: see `state_identity`.
        """
        return self._block_bytes[:, :, block_id]

    @property
    def state_bytes(self) -> int:
        """Of what goes into all layers for the tokens of one block."""
        return self.num_layers * self.block_size * self.dim * self.dtype.itemsize

    def new_states(self, num_slots: int) -> Tensor:
        """Memory (num_slots, num_layers, block_size, dim) for what goes into the layers, a block a slot."""
        return _zeros((num_slots, self.num_layers, self.block_size, self.dim), self.dtype, self.device)

    def keep_states_in(self, states: Tensor) -> None:
        """From now on steps keep in `states`, as `new_states` gave it, what sequences' `state_slots` ask for.

        The native backend's do; others keep nothing.
        """
        self._states = states

    def restore_blocks(
        self, states: Tensor, slots: Sequence[int], block_ids: Sequence[int], first_positions: Sequence[int]
    ) -> None:
        """Keys and values of blocks that begin at these positions, from what went into the layers.

        The bits that a forward pass would give; of the native backend alone.
        """
        assert isinstance(self._forward, NativeForward)
        ids, to, at = (torch.tensor(x, dtype=torch.int32) for x in (slots, block_ids, first_positions))
        self._forward.restore_blocks(states, ids, to, at, self._kv_cache[0], self._kv_cache[1])

    def _state_rows(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Where the chunks' tokens have what goes into their layers kept, as `PagedBatch.state_rows`."""
        if not any([c.seq.state_slots for c in chunks]):
            return None
        size = self.block_size
        rows = [
            -1 if (slot := c.seq.state_slots.get(p // size)) is None else slot * size + p % size
            for c in chunks
            for p in range(c.start, c.start + c.num_tokens)
        ]
        return torch.tensor(rows, dtype=torch.int32)

    def _paged_batch(self, chunks: Sequence[Chunk]) -> PagedBatch:
        size = self.block_size
        width = max(len(c.seq.block_ids) for c in chunks)
        tables = [c.seq.block_ids + [0] * (width - len(c.seq.block_ids)) for c in chunks]
        slots = [
            c.seq.block_ids[p // size] * size + p % size
            for c in chunks
            for p in range(c.start, c.start + c.num_tokens)
        ]
        starts = list(accumulate((c.num_tokens for c in chunks), initial=0))
        contexts = [c.start + c.num_tokens for c in chunks]
        return PagedBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=self.device),
            slots=torch.tensor(slots, device=self.device),
            num_wanted=torch.tensor([c.num_wanted for c in chunks], dtype=torch.int32),
            states=self._states,
            state_rows=self._state_rows(chunks),
        )


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since masked keys are multiplied by zero and garbage could be NaN; SettingError without room.

    On a CPU they are pages that the kernel zeroes when first used, where torch would write them all now.
    """
    if device.type != "cpu":
        try:
            return torch.zeros(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            raise SettingError(
                f"the KV cache of {math.prod(shape) * dtype.itemsize} bytes does not fit on {device}"
                " beside the model: lower kv_cache_bytes"
            ) from None
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _make_forward(backend: str, decoder: Decoder, config: EngineConfig) -> Forward:
    if backend == "native":
        num_threads = config.num_threads or torch.get_num_threads()
        return NativeForward(decoder, config.quantization, num_threads, config.max_model_len)
    if backend == "triton":
        from scone.server.engine.triton_forward import TritonForward  # Triton may not be installed

        return TritonForward(decoder, config.max_model_len)
    return TorchForward(decoder)


def choose_backend(decoder: Decoder, config: EngineConfig) -> str:
    """`native` or `triton` wherever it can run, unless the settings say otherwise; raises SettingError."""
    device = decoder.device.type
    why_not_triton = None if device == "cuda" else f"the model is on {device}"
    if why_not_triton is None and importlib.util.find_spec("triton") is None:
        why_not_triton = "Triton is not installed (pip install 'scone-serve[cuda]')"
    if config.backend == "triton" and why_not_triton is not None:
        raise SettingError(f"backend triton needs a CUDA device and Triton, but {why_not_triton}")
    why_not = None
    if native is None:
        why_not = "the native extension was not built"
    elif device != "cpu":
        why_not = f"the model is on {device}"
    elif decoder.config.head_dim % 8:
        why_not = f"the model's head_dim is {decoder.config.head_dim}, not a multiple of 8"
    if config.backend == "torch":
        why_not = "backend is torch"
    if why_not is None:
        return "native"
    for name, needed in (
        ("backend native", config.backend == "native"),
        (f"quantization {config.quantization}", config.quantization in ("bfloat16", "int8", "int4")),
        ("deterministic", config.deterministic),
    ):
        if needed:
            raise SettingError(f"{name} needs the native CPU kernels, but {why_not}")
    if device == "cuda" and config.backend != "torch":
        if why_not_triton is None:
            return "triton"
        logger.warning(
            "%s: plain torch computes, several times slower and without CUDA graphs", why_not_triton
        )
    return "torch"
