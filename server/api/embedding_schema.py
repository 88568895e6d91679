"""Bodies of POST /v1/embeddings, in and out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from scone.server.api.completion_schema import FGramUsage, Prompt, PromptTokensDetails
from scone.server.api.json_types import JsonBool, JsonInt, JsonModel
from scone.server.api.sampling_fields import INT64_MAX, unknown_fields

# As for completions: known from other servers, not done here, and no answer without them would be right.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "normalize": (False,),
    "truncate_prompt_tokens": (),
    "messages": (),
    "instruction": ("",),
}


class EmbeddingRequest(JsonModel):
    """What may be asked of POST /v1/embeddings."""

    input: Prompt = Field(
        description="A text, a list of texts, a list of token ids, or a list of such lists."
    )
    model: str | None = Field(None, description="Name from /v1/models; the served model if left out.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64 is of the vector's float32 values, little-endian."
    )
    dimensions: Annotated[JsonInt, Field(ge=1, le=INT64_MAX)] | None = Field(
        None, description="Only the size of the model's hidden states: they cannot be cut short."
    )
    pooling: Literal["mean", "last"] = Field(
        "mean", description="The mean of all positions' hidden states, or the last position's."
    )
    layer: Annotated[JsonInt, Field(ge=0, le=INT64_MAX)] | None = Field(
        None,
        description="Hidden states after so many layers; 0 is the input with f-gram rows in place. "
        "The default is all of them and the final norm.",
    )
    add_special_tokens: JsonBool = Field(
        True, description="Put the model's begin-of-text token before a text."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests with the same salt share cached prefixes."
    )
    user: str | None = Field(None, description="Accepted and not used.")

    def refuse_unsupported(self) -> list[str]:
        """Names of unknown fields, for a warning; raises InvalidRequestError for known ones not done here."""
        return unknown_fields(self.model_extra or {}, UNSUPPORTED)


class Embedding(BaseModel):
    """The vector of input `index`."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts of the whole request."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    fgram: FGramUsage


class EmbeddingResponse(BaseModel):
    """Answer of POST /v1/embeddings, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
