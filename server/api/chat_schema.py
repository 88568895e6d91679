"""Bodies of POST /v1/chat/completions, in and out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from scone.server.api.completion_schema import Usage
from scone.server.api.json_types import JsonBool, JsonInt, JsonModel, text_or_list
from scone.server.api.sampling_fields import INT64_MAX, MAX_LOGPROBS, SamplingFields


class TextPart(JsonModel):
    """A part of a message; this server takes only text."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Annotated[list[TextPart], Field(min_length=1)], Tag("<list>")],
    Discriminator(text_or_list),
]


class ChatMessage(JsonModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As templates expect it: content is one text."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": self.role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class ChatRequest(SamplingFields):
    """What may be asked of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[JsonInt, Field(ge=1, le=INT64_MAX)] | None = Field(
        None, description="Cut to what the context has left, which is also the default."
    )
    max_tokens: Annotated[JsonInt, Field(ge=1, le=INT64_MAX)] | None = Field(
        None, description="Older name of max_completion_tokens."
    )
    logprobs: JsonBool = Field(False, description="Log-probabilities of the answer's tokens.")
    top_logprobs: Annotated[JsonInt, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Alternatives per token; needs logprobs: true."
    )


class TokenAlternative(BaseModel):
    """A token that could have been; `bytes` also where they are only part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenAlternative):
    """A token of the answer."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[ChatTokenLogprob]


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
