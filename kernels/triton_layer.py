"""The parts of a decoder's layer between its products, on CUDA, each in one launch: norm with the
residual, rotation with the store into the cache, gated activation.

Triton twins of what `model_store/decoder.py` says in plain torch, equal up to rounding: they round where
torch does, but sum in another order, and rotate in float32. Nothing depends on the host but addresses, so
that a CUDA graph may hold them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATION_BLOCK = 1024


@triton.jit
def norm_kernel(
    hidden,  # (num_tokens, DIM); gets the sum where there is a delta
    delta,  # (num_tokens, DIM)
    weight,  # (DIM,)
    out,  # (num_tokens, DIM)
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    mask = column < DIM
    at = tl.program_id(0).to(tl.int64) * DIM + column
    x = tl.load(hidden + at, mask=mask, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(hidden + at, x, mask=mask)
    wide = x.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)).to(x.dtype)
    w = tl.load(weight + column, mask=mask, other=0.0)
    tl.store(out + at, (scaled.to(tl.float32) * w.to(tl.float32)).to(x.dtype), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])  # else compiled anew for many steps
def rotate_kernel(
    qkv,  # (num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, 2 * HALF); the queries are rotated in place
    positions,  # int32*: (num_tokens,)
    slots,  # int32*: (num_tokens,); a negative one stores nothing
    cos,  # (any, HALF)
    sin,
    q_norm,  # (2 * HALF,), unused without HAS_NORM
    k_norm,
    k_cache,  # (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HALF)
    v_cache,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, HALF_PADDED)
    mask = column < HALF
    source = qkv + (token.to(tl.int64) * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * (2 * HALF) + column
    a = tl.load(source, mask=mask, other=0.0)
    b = tl.load(source + HALF, mask=mask, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if head < NUM_HEADS + NUM_KV_HEADS:
        x, y = a.to(tl.float32), b.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / (2 * HALF) + eps)
            norm = q_norm
            if head >= NUM_HEADS:
                norm = k_norm
            w_a = tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
            w_b = tl.load(norm + HALF + column, mask=mask, other=0.0).to(tl.float32)
            x = ((x * scale).to(a.dtype).to(tl.float32) * w_a).to(a.dtype).to(tl.float32)
            y = ((y * scale).to(a.dtype).to(tl.float32) * w_b).to(a.dtype).to(tl.float32)
        at = tl.load(positions + token).to(tl.int64) * HALF + column
        c = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
        a, b = (x * c - y * s).to(a.dtype), (y * c + x * s).to(a.dtype)
    if head < NUM_HEADS:
        tl.store(source, a, mask=mask)
        tl.store(source + HALF, b, mask=mask)
    elif head < NUM_HEADS + NUM_KV_HEADS:
        kept = mask & (slot >= 0)
        target = (
            k_cache + ((block * NUM_KV_HEADS + head - NUM_HEADS) * BLOCK_SIZE + place) * (2 * HALF) + column
        )
        tl.store(target, a, mask=kept)
        tl.store(target + HALF, b, mask=kept)
    else:
        kept = mask & (slot >= 0)
        of_values = head - NUM_HEADS - NUM_KV_HEADS
        target = v_cache + ((block * NUM_KV_HEADS + of_values) * BLOCK_SIZE + place) * (2 * HALF) + column
        tl.store(target, a, mask=kept)
        tl.store(target + HALF, b, mask=kept)


@triton.jit
def activation_kernel(
    gate_up,  # (num_tokens, 2 * DIM)
    out,  # (num_tokens, DIM)
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < DIM
    gate = tl.load(gate_up + token * (2 * DIM) + column, mask=mask, other=0.0)
    up = tl.load(gate_up + token * (2 * DIM) + DIM + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(
        out + token * DIM + column, (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask
    )


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMS norm (num_tokens, dim) of hidden + delta, which `hidden` then holds."""
    out = torch.empty_like(hidden)
    dim = hidden.shape[1]
    norm_kernel[(len(hidden),)](
        hidden,
        hidden if delta is None else delta,
        weight,
        out,
        eps,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        HAS_DELTA=delta is not None,
    )
    return out


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """Rotates the queries of qkv in place; rotates keys, and stores keys and values in one layer's cache.

    Args:
        qkv: (num_tokens, num_heads + 2 num_kv_heads, head_dim), contiguous: queries, keys, values.
        positions, slots: (num_tokens,) int32; a token with a negative slot stores nothing.
        cos, sin: (max_position, head_dim / 2).
        norms: weights (head_dim,) of the norms of queries and keys, applied before, and their epsilon.
    """
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    half = head_dim // 2
    q_norm, k_norm = norms or (cos, cos)
    rotate_kernel[(num_tokens, num_all_heads)](
        qkv,
        positions,
        slots,
        cos,
        sin,
        q_norm,
        k_norm,
        k_cache,
        v_cache,
        eps,
        NUM_HEADS=num_all_heads - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        HALF_PADDED=triton.next_power_of_2(half),
        BLOCK_SIZE=block_size,
        HAS_NORM=norms is not None,
        num_warps=1,
    )


def gated_activation(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (num_tokens, dim) of gate_up (num_tokens, 2 dim), contiguous."""
    num_tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, dim, dtype=gate_up.dtype, device=gate_up.device)
    activation_kernel[(num_tokens, triton.cdiv(dim, ACTIVATION_BLOCK))](
        gate_up, out, DIM=dim, BLOCK=ACTIVATION_BLOCK
    )
    return out
