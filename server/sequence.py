"""What the engine is asked and what it answers: the nouns that `api` and `engine` share.

Knows neither HTTP nor tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token and when to end; already validated by the caller.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        seed: one generator per sequence; sequence k of `n` uses `seed + k`. None draws one.
        allowed_token_ids: if given, only these head rows are computed.
        logprobs: number of alternatives per generated token; 0 gives the chosen token's alone; None is off.
        prompt_logprobs: the same for each prompt token (the first has none).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def final_ids(self, eos_ids: Iterable[int]) -> set[int]:
        """Tokens that end the sequence, and may not be chosen before `min_tokens`."""
        return {*(() if self.ignore_eos else eos_ids), *self.stop_token_ids}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """One vector instead of a continuation.

    Attributes:
        kind: the mean of all positions' hidden states, or the last position's.
        layer: states after so many layers, 0 being the input embeddings with f-gram rows in place; None:
            after all of them and the final norm, as the head gets them.
    """

    kind: Literal["mean", "last"] = "mean"
    layer: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt, already tokenised and checked against the vocabulary and the context length.

    With `pooling`, `sampling` must be that of no tokens (`max_tokens=0`) and `n` 1.
    """

    request_id: str
    input_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    cache_salt: str | None = None
    pooling: PoolingParams | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of its likeliest rivals, by falling probability."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestUsage:
    """What a sequence cost, sent with its last delta."""

    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0
    num_matched_tokens: int = 0
    rows_by_tier: Mapping[str, int] = field(default_factory=dict)
    queue_seconds: float = 0.0
    time_to_first_token_seconds: float = 0.0


@dataclass(slots=True, kw_only=True)  # not frozen: one is made for each token, in a third of the time
class Delta:
    """What one step added to sequence `index` of a request; the last one has a finish reason.

    `text` never holds half a character nor any part of a stop string; `token_ids` may therefore run
    ahead of `text`. Concatenated, the texts of all deltas are the completion. `embedding` (dim,)
    float32 comes with the last delta of a request with `pooling`.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: RequestUsage | None = None
    embedding: NDArray[np.float32] | None = None
    error: str | None = None
