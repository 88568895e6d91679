"""Rotary position embedding, with the scalings found in published Llama-family checkpoints.

Formulas: RoFormer (arXiv 2104.09864); `llama3` as in Meta's Llama 3.1 reference code; `yarn` as in
arXiv 2309.00071. Layout is Hugging Face's: the two halves of a head are rotated against each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scone.model_store.errors import CheckpointError
from scone.model_store.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies (head_dim / 2,) float32, and the factor that cos and sin are multiplied by."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies, 1.0
    if kind == "divisors":  # as GGUF stores a scaling that was worked out beforehand
        return frequencies / torch.tensor(scaling["divisors"]), 1.0
    if kind == "linear":
        return frequencies / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, scaling, config)
    raise CheckpointError(f"rope_scaling is {kind!r}, wanted one of default, linear, llama3, yarn")


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, old_context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > old_context / low, frequencies / factor, frequencies)
    smooth = (old_context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelengths >= old_context / high) & (wavelengths <= old_context / low)
    return torch.where(between, blended, scaled)


def _yarn(frequencies: Tensor, scaling: Mapping[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    factor = float(scaling["factor"])
    old_context = float(scaling.get("original_max_position_embeddings") or config.max_position)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0

    def correction_dim(rotations: float) -> float:
        turns = math.log(old_context / (rotations * 2 * math.pi))
        return config.head_dim * turns / (2 * math.log(config.rope_theta))

    low = max(math.floor(correction_dim(float(scaling.get("beta_fast") or 32))), 0)
    high = min(math.ceil(correction_dim(float(scaling.get("beta_slow") or 1))), config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return frequencies / factor * (1 - keep) + frequencies * keep, float(attention_factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads x (..., num_heads, head_dim) by cos, sin (..., 1, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
