"""From a prompt to token ids that fit the model, off the event loop where the text is long."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from anyio import to_thread

from scone.server.api.sampling_fields import check_token_ids
from scone.server.errors import InvalidRequestError

if TYPE_CHECKING:
    from scone.server.api.completion_schema import Prompt
    from scone.server.api.state import ServedModel

INLINE_CHARS = 8192
"""Texts up to here are tokenised in a few milliseconds; a thread's round trip is not worth it."""


def split_prompts(prompt: Prompt, max_prompts: int, param: str) -> list[str | list[int]]:
    """The prompts of all four forms, one by one; raises InvalidRequestError if they are too many."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > max_prompts:
        raise InvalidRequestError(
            f"{param} holds {len(prompt)} prompts, wanted at most {max_prompts} (max_prompts).", param=param
        )
    return cast("list[str | list[int]]", prompt)


async def encode(model: ServedModel, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`; raises InvalidRequestError if it is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("The text holds half a surrogate pair.", code="invalid_value") from None
    if len(text) <= INLINE_CHARS:
        return model.tokenizer.encode(text, add_special_tokens)
    return await to_thread.run_sync(model.tokenizer.encode, text, add_special_tokens)


async def prompt_token_ids(
    model: ServedModel, prompt: str | list[int], add_special_tokens: bool, param: str = "prompt"
) -> list[int]:
    """Checked token ids of one prompt; raises InvalidRequestError."""
    if isinstance(prompt, str):
        token_ids = await encode(model, prompt, add_special_tokens)
    else:
        token_ids = prompt
        check_token_ids(token_ids, model.tokenizer.vocab_size, param)
    if not token_ids:
        raise InvalidRequestError(
            f"{param} is empty, wanted at least one token.", param=param, code="empty_prompt"
        )
    return token_ids


def fit_max_tokens(model: ServedModel, num_prompt_tokens: int, max_tokens: int | None, param: str) -> int:
    """`max_tokens` cut to what the context has left (None: all of it).

    Raises InvalidRequestError if nothing is left; a prompt that is only scored may fill the context.
    """
    left = model.max_model_len - num_prompt_tokens
    if left < (0 if max_tokens == 0 else 1):
        needed = "" if max_tokens == 0 else "; at least one must be left for the answer"
        raise InvalidRequestError(
            f"This model's maximum context length is {model.max_model_len} tokens, and {param} has "
            f"{num_prompt_tokens}{needed}.",
            param=param,
            code="context_length_exceeded",
        )
    return left if max_tokens is None else min(max_tokens, left)
