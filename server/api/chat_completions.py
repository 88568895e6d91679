"""POST /v1/chat/completions: the model's chat template around the same engine."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from scone.server.api.chat_schema import ChatRequest, ChatResponse
from scone.server.api.chat_template import render_chat
from scone.server.api.completion_schema import event_stream_response
from scone.server.api.errors import error_responses
from scone.server.api.generation import Generation, PromptDelta
from scone.server.api.json_body import JsonRoute
from scone.server.api.prompt_tokens import fit_max_tokens, prompt_token_ids
from scone.server.api.respond import respond
from scone.server.api.sse import ChunkFrames
from scone.server.api.state import ServedModel, ServerState
from scone.server.api.token_text import json_logprob, token_text
from scone.server.errors import InvalidRequestError
from scone.server.sequence import Delta, GenerationRequest, TokenLogprob

if TYPE_CHECKING:
    from scone.model_store.tokenizer import Tokenizer

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatResponse,
    responses={
        **event_stream_response(ChatResponse),
        **error_responses(400, 401, 404, 413, 415, 500, 503, 504),
    },
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """The assistant's next turn; 400 for a model without a chat template."""
    state: ServerState = request.app.state.server
    model = state.model_named(body.model)
    state.warn_unknown(body.refuse_unsupported())
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    chat = _Chat(state, model, body)
    await chat.admit(request.state.request_id)
    return await respond(request, chat.generation, chat, stream=body.stream)


class _Chat:
    """One request: what it asks of the engine, and its answer in both shapes."""

    def __init__(self, state: ServerState, model: ServedModel, body: ChatRequest) -> None:
        self._state = state
        self._model = model
        self._body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()
        options = body.stream_options
        includes_usage = options is not None and options.include_usage
        self._frames = ChunkFrames(self._envelope("chat.completion.chunk"), with_usage=includes_usage)
        self.generation: Generation

    async def admit(self, request_id: str) -> None:
        """Renders, tokenises and submits; raises InvalidRequestError and UnavailableError."""
        body, model = self._body, self._model
        messages = [message.for_template() for message in body.messages]
        # In a thread: a template is a program, and not ours.
        text = await to_thread.run_sync(render_chat, model.tokenizer, messages)
        # The template writes the special tokens itself.
        input_ids = await prompt_token_ids(model, text, add_special_tokens=False, param="messages")
        asked = body.max_completion_tokens or body.max_tokens
        if asked is not None and body.min_tokens > asked:
            raise InvalidRequestError(
                f"min_tokens is {body.min_tokens}, wanted at most {asked}.", param="min_tokens"
            )
        sampling = body.sampling_params(
            model.tokenizer.vocab_size,
            fit_max_tokens(model, len(input_ids), asked, "messages"),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=None,
        )
        engine_request = GenerationRequest(
            request_id=self._id,
            input_ids=tuple(input_ids),
            sampling=sampling,
            n=body.n,
            cache_salt=body.cache_salt,
        )
        self.generation = Generation(self._state, model, [engine_request], request_id)
        self.generation.start()

    def whole(self, deltas: Sequence[PromptDelta]) -> bytes:
        """The answer that is not streamed."""
        by_index: dict[int, list[Delta]] = defaultdict(list)
        for _, delta in deltas:
            by_index[delta.index].append(delta)
        choices = [self._choice(index, by_index[index]) for index in sorted(by_index)]
        envelope = self._envelope("chat.completion")
        return orjson.dumps(envelope | {"choices": choices, "usage": self.generation.usage()})

    def events(self, deltas: Sequence[PromptDelta]) -> bytes:
        """What a stream says of `deltas`: a choice's first event has the role, its last the reason."""
        events = []
        for _, delta in deltas:
            if delta.index not in self._begun:
                self._begun.add(delta.index)
                role = {"role": "assistant", "content": ""}
                opening = {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
                events.append(self._frames.chunk(opening))
            if delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids:
                said = {"content": delta.text} if delta.text or delta.logprobs else {}
                events.append(self._frames.chunk({"delta": said, **self._shared([delta])}))
        return b"".join(events)

    def last_event(self) -> bytes:
        """The event with the usage, if it was asked for."""
        return self._frames.last(self.generation.usage())

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        content = "".join(delta.text for delta in deltas)
        return {"message": {"role": "assistant", "content": content}, **self._shared(deltas)}

    def _shared(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """What a choice says besides its text, of consecutive deltas."""
        last = deltas[-1]
        shared: dict[str, Any] = {
            "index": last.index,
            "logprobs": self._logprobs([token for delta in deltas for token in delta.logprobs or ()]),
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if self._body.return_token_ids:
            shared["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        return shared

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        tokenizer, num_top = self._model.tokenizer, self._body.top_logprobs or 0
        return {
            "content": [
                _alternative(tokenizer, token.token_id, token.logprob)
                | {"top_logprobs": [_alternative(tokenizer, *top) for top in token.top[:num_top]]}
                for token in tokens
            ]
        }

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}


def _alternative(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": token_text(tokenizer, token_id), "logprob": json_logprob(logprob), "bytes": list(raw)}
