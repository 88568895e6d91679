"""POST /tokenize and /detokenize, GET /tokenizer_info, in the shapes that vLLM gave them."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from scone.server.api.chat_schema import ChatMessage
from scone.server.api.chat_template import render_chat
from scone.server.api.errors import error_responses
from scone.server.api.json_body import JsonRoute
from scone.server.api.json_types import JsonBool, JsonModel, TokenIds
from scone.server.api.prompt_tokens import encode
from scone.server.api.sampling_fields import check_token_ids
from scone.server.api.state import ServerState
from scone.server.api.token_text import token_text
from scone.server.errors import InvalidRequestError

router = APIRouter(route_class=JsonRoute, tags=["Tokens"])
BODY_ERRORS = error_responses(400, 401, 404, 413, 415, 503)


class TokenizeRequest(JsonModel):
    """A text to cut into tokens, or messages to put through the model's chat template first."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    model: str | None = None
    add_special_tokens: JsonBool | None = Field(
        None,
        description="Put the model's begin-of-text token before it; by default for a prompt, and not for "
        "messages, whose template writes it.",
    )
    return_token_strs: JsonBool = False


class TokenizeResponse(BaseModel):
    """The token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(JsonModel):
    """Token ids to make text of."""

    tokens: Annotated[TokenIds, Field(max_length=1 << 20)]
    model: str | None = None


class DetokenizeResponse(BaseModel):
    """The text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to tokenise as the server does; lm-eval's remote tokenizer reads `eos_token`."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


@router.post("/tokenize", response_model=TokenizeResponse, responses=BODY_ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Any:
    """Token ids of a text, or of a chat as POST /v1/chat/completions would see it."""
    state: ServerState = request.app.state.server
    model = state.model_named(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give one of prompt and messages.", param="prompt")
    text, adds_special_tokens = body.prompt or "", True
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        text = await to_thread.run_sync(render_chat, model.tokenizer, messages)
        adds_special_tokens = False
    if body.add_special_tokens is not None:
        adds_special_tokens = body.add_special_tokens
    tokens = await encode(model, text, adds_special_tokens)
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=model.max_model_len,
        tokens=tokens,
        token_strs=[token_text(model.tokenizer, i) for i in tokens] if body.return_token_strs else None,
    )


@router.post("/detokenize", response_model=DetokenizeResponse, responses=BODY_ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Any:
    """Text of token ids, special tokens included."""
    state: ServerState = request.app.state.server
    model = state.model_named(body.model)
    check_token_ids(body.tokens, model.tokenizer.vocab_size, "tokens")
    return DetokenizeResponse(prompt=model.tokenizer.decode(body.tokens, skip_special_tokens=False))


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=error_responses(401, 503))
async def tokenizer_info(request: Request) -> Any:
    """The tokenizer's sizes, special tokens and chat template."""
    state: ServerState = request.app.state.server
    model = state.model
    tokenizer = model.tokenizer
    return TokenizerInfo(
        tokenizer_class=type(tokenizer.backend.model).__name__,
        vocab_size=tokenizer.vocab_size,
        model_max_length=model.max_model_len,
        bos_token=None if tokenizer.bos_id is None else token_text(tokenizer, tokenizer.bos_id),
        eos_token=token_text(tokenizer, tokenizer.eos_ids[0]) if tokenizer.eos_ids else None,
        chat_template=tokenizer.chat_template,
    )
