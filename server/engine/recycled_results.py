"""Whole-text results: what a text was answered with, so that the same question runs no forward pass.

Kept are answers that the text alone determines: pooled vectors, and the log-probabilities of a prompt with at
most one token after it, chosen greedily. Stored as little-endian arrays behind a header of JSON; floats keep
all their bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import orjson
from numpy.typing import NDArray

from scone.server.engine.sampler import GREEDY_BELOW
from scone.server.sequence import Delta, FinishReason, GenerationRequest, RequestUsage, TokenLogprob

_LENGTH = np.dtype("<u4")


def result_name(request: GenerationRequest, root: bytes) -> bytes | None:
    """What the request's answer is stored under; None if the text alone does not determine it.

    `root` names model, table and salt (`StateIdentity.root`).
    """
    sampling, pooling = request.sampling, request.pooling
    if pooling is not None:
        question = f"vector {pooling.kind} {pooling.layer}"
    elif sampling.prompt_logprobs is None or request.n != 1 or sampling.max_tokens > 1:
        return None
    elif sampling.max_tokens == 0:
        question = f"scores {sampling.prompt_logprobs}"
    elif sampling.temperature < GREEDY_BELOW:
        question = f"scores {replace(sampling, seed=None)}"
    else:
        return None
    return named(root, "result", question, request.input_ids)


def named(root: bytes, kind: str, question: str, token_ids: Sequence[int]) -> bytes:
    """SHA-256 over everything that a stored state of a whole text depends on; 32 bytes."""
    digest = hashlib.sha256(root)
    for part in (kind.encode(), question.encode(), np.array(token_ids, "<i4").tobytes()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def pack_result(delta: Delta) -> bytes | None:
    """The bytes of a one-delta answer; None if some number in it is not finite."""
    ids: list[int] = []
    counts: list[int] = []
    values: list[float] = []
    for token in (*(delta.prompt_logprobs or ()), *(delta.logprobs or ())):
        counts.append(-1 if token is None else len(token.top))
        if token is not None:
            ids += [token.token_id, *(i for i, _ in token.top)]
            values += [token.logprob, *(v for _, v in token.top)]
    vector = np.empty(0, "<f4") if delta.embedding is None else delta.embedding.astype("<f4")
    header = orjson.dumps(
        {
            "text": delta.text,
            "token_ids": delta.token_ids,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "num_prompt": None if delta.prompt_logprobs is None else len(delta.prompt_logprobs),
            "has_logprobs": delta.logprobs is not None,
            "sizes": [len(counts), len(ids), len(vector)],
        }
    )
    numbers = np.array(values, "<f8")
    if not (np.isfinite(numbers).all() and np.isfinite(vector).all()):
        return None
    arrays = (np.array(counts, "<i4"), np.array(ids, "<i4"), numbers, vector)
    return b"".join((np.array(len(header), _LENGTH).tobytes(), header, *(a.tobytes() for a in arrays)))


@dataclass(frozen=True, slots=True)
class Result:
    """A stored answer."""

    text: str
    token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    embedding: NDArray[np.float32] | None

    def delta(self, usage: RequestUsage) -> Delta:
        """The one delta of the answer."""
        return Delta(
            index=0,
            text=self.text,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            usage=usage,
            embedding=self.embedding,
        )


def unpack_result(payload: NDArray[np.uint8]) -> Result:
    """From what `pack_result` gave, which the store's checksum has vouched for."""
    data = payload.tobytes()
    length = int(np.frombuffer(data, _LENGTH, 1)[0])
    header = orjson.loads(data[_LENGTH.itemsize : _LENGTH.itemsize + length])
    num_counts, num_ids, num_values = header["sizes"]
    offset = _LENGTH.itemsize + length
    parts = []
    for dtype, size in (("<i4", num_counts), ("<i4", num_ids), ("<f8", num_ids), ("<f4", num_values)):
        parts.append(np.frombuffer(data, dtype, size, offset))
        offset += parts[-1].nbytes
    tokens = list(_tokens(*(part.tolist() for part in parts[:3])))
    num_prompt = header["num_prompt"]
    return Result(
        text=header["text"],
        token_ids=tuple(header["token_ids"]),
        prompt_logprobs=None if num_prompt is None else tuple(tokens[:num_prompt]),
        logprobs=tuple(t for t in tokens[num_prompt or 0 :] if t) if header["has_logprobs"] else None,
        finish_reason=header["finish_reason"],
        stop_reason=header["stop_reason"],
        embedding=parts[3].astype(np.float32) if num_values else None,
    )


def _tokens(counts: list[int], ids: list[int], values: list[float]) -> list[TokenLogprob | None]:
    tokens: list[TokenLogprob | None] = []
    at = 0
    for count in counts:
        if count < 0:
            tokens.append(None)
            continue
        top = tuple(zip(ids[at + 1 : at + 1 + count], values[at + 1 : at + 1 + count], strict=True))
        tokens.append(TokenLogprob(ids[at], values[at], top))
        at += 1 + count
    return tokens
