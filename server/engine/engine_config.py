"""Limits and choices of the engine; the settings of `scone serve` that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["auto", "none", "bfloat16", "int8", "int4"]
Backend = Literal["auto", "native", "triton", "torch"]
KvCacheDtype = Literal["auto", "float32", "bfloat16"]
RecycledBlocks = Literal["auto", "kv", "hidden"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Checked at construction: ValueError names the setting.

    Attributes:
        max_model_len: longest prompt plus completion, in tokens.
        max_num_seqs: sequences that share one step.
        max_num_batched_tokens: tokens that one step computes; longer prompts are cut into chunks.
        block_size: tokens per KV block, the unit of allocation and of prefix reuse.
        kv_cache_bytes: memory for keys and values.
        kv_cache_dtype: how they are held; `auto` is the type of weights and activations, but with native
            kernels bfloat16 where the inputs of linear maps are rounded, float32 where they are not.
        max_num_queued_reqs, max_num_queued_tokens: admitted requests (prompt tokens) not yet started;
            past either, `submit` answers `queue_full`.
        max_num_staged_tokens: prompt tokens of waiting requests whose rows may be read ahead.
        enable_prefix_caching: reuse KV blocks of equal prefixes.
        quantization: how linear maps are computed (native backend only): `none` in float32, on weights
            held in the smallest format that keeps every bit of them; `auto` with inputs rounded as well
            where a checkpoint stored weights in bfloat16, 8 or 4 bits, else as `none`.
        backend: `native` kernels on a CPU, `triton` kernels on CUDA, or plain `torch`; `auto` is the first
            that can be used.
        enforce_eager: CUDA launches the kernels of each step one by one, where it would run a graph of them.
        deterministic: refuse to start unless the same request gives the same tokens and
            log-probabilities alone, in any batch, and with a cold or warm prefix cache (docs/engine.md).
        recycled_blocks: form in which blocks are kept in a store (block_forms.py); `auto` is keys and values,
            or hidden states where these are smaller and restored sooner.
        num_threads: threads of the native kernels; 0 takes torch's number.
    """

    max_model_len: int = 2048
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    kv_cache_dtype: KvCacheDtype = "auto"
    max_num_queued_reqs: int = 512
    max_num_queued_tokens: int = 1 << 20
    max_num_staged_tokens: int = 16384
    enable_prefix_caching: bool = True
    quantization: Quantization = "auto"
    backend: Backend = "auto"
    enforce_eager: bool = False
    deterministic: bool = False
    recycled_blocks: RecycledBlocks = "auto"
    num_threads: int = 0

    @property
    def max_blocks_per_seq(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_bytes",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "max_num_staged_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.num_threads < 0:
            raise ValueError(f"num_threads is {self.num_threads}, wanted 0 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, "
                f"wanted at least max_num_seqs ({self.max_num_seqs})"
            )
