"""Which requests can be served at all: what must hold, or the engine itself would suffer."""

from __future__ import annotations

from collections.abc import Sequence

from scone.server.errors import InvalidRequestError
from scone.server.sequence import GenerationRequest, SamplingParams


def check_request(
    request: GenerationRequest, *, vocab_size: int, max_model_len: int, eos_ids: Sequence[int]
) -> None:
    """Raises InvalidRequestError; finer checks are the caller's."""
    ids, sampling = request.input_ids, request.sampling
    if not ids:
        raise InvalidRequestError("the prompt is empty, wanted at least one token", param="prompt")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(f"token id is {wrong}, wanted 0 <= id < {vocab_size}", param="prompt")
    # A full-length prompt can be scored but not continued.
    if len(ids) + min(1, sampling.max_tokens) > max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(ids)} tokens, but the longest context here is {max_model_len} "
            "(prompt and completion)",
            param="prompt",
            code="context_length_exceeded",
        )
    for name, token_ids in (
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
    ):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"{name} holds token id {token_id}, wanted 0 <= id < {vocab_size}", param=name
                )
    _check_choice(sampling, vocab_size, eos_ids)


def _check_choice(sampling: SamplingParams, vocab_size: int, eos_ids: Sequence[int]) -> None:
    """Before `min_tokens` no token that ends the answer may be chosen; another one must be left."""
    if min(sampling.min_tokens, sampling.max_tokens) == 0:
        return
    allowed: Sequence[int] = range(vocab_size)
    where = "the vocabulary"
    if sampling.allowed_token_ids is not None:
        allowed, where = sampling.allowed_token_ids, "allowed_token_ids"
    final_ids = sampling.final_ids(eos_ids)
    if all(token_id in final_ids for token_id in allowed):
        raise InvalidRequestError(
            f"min_tokens is {sampling.min_tokens}, but every token of {where} ends the answer (end of text"
            " or stop_token_ids): allow another token, or set min_tokens to 0",
            param="min_tokens",
        )
