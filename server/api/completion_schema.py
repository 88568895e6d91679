"""Bodies of POST /v1/completions, in and out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from scone.server.api.json_types import JsonBool, JsonInt, TokenIds
from scone.server.api.sampling_fields import INT64_MAX, MAX_LOGPROBS, MAX_N, SamplingFields

PromptText = Annotated[str, Field(min_length=1)]
PromptIds = Annotated[TokenIds, Field(min_length=1)]


def _prompt_form(value: object) -> str:
    """Which of the four forms a prompt has; looked up at its first element only.

    In angle brackets, so that error messages can leave it out of a field's name.
    """
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    if isinstance(first, str):
        return "<texts>"
    return "<id_lists>" if isinstance(first, list) else "<ids>"


Prompt = Annotated[
    Annotated[PromptText, Tag("<text>")]
    | Annotated[Annotated[list[PromptText], Field(min_length=1)], Tag("<texts>")]
    | Annotated[PromptIds, Tag("<ids>")]
    | Annotated[Annotated[list[PromptIds], Field(min_length=1)], Tag("<id_lists>")],
    Discriminator(_prompt_form),
]


class CompletionRequest(SamplingFields):
    """What may be asked of POST /v1/completions."""

    prompt: Prompt = Field(
        description="A text, a list of texts, a list of token ids, or a list of such lists."
    )
    max_tokens: Annotated[JsonInt, Field(ge=0, le=INT64_MAX)] = Field(
        16, description="Cut to what the context has left; 0 only with echo."
    )
    echo: JsonBool = Field(False, description="Begin the answer with the prompt.")
    logprobs: Annotated[JsonInt, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Log-probabilities of the tokens and of so many alternatives each."
    )
    best_of: Annotated[JsonInt, Field(ge=1, le=MAX_N)] | None = Field(
        None, description="Only n itself: choosing among hidden answers is not done here."
    )
    add_special_tokens: JsonBool = Field(
        True, description="Put the model's begin-of-text token before a text."
    )


class CompletionLogprobs(BaseModel):
    """Four lists of equal length; `text_offset` counts characters of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(BaseModel):
    """One answer, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class FGramUsage(BaseModel):
    """What was read from the f-gram table for the request."""

    matched_tokens: int
    rows_by_tier: dict[str, int]


class Usage(BaseModel):
    """Token counts of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    fgram: FGramUsage


class CompletionResponse(BaseModel):
    """Answer of POST /v1/completions; choice prompt_index * n + k is answer k to that prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


def event_stream_response(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a 200 that is JSON, or events if `stream` was asked for."""
    data = {"type": "string", "description": "A chunk or an ErrorBody, as JSON; the last is [DONE]."}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {200: {"model": model, "content": {"text/event-stream": {"schema": event}}}}
