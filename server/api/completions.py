"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from scone.server.api.completion_pieces import CompletionPieces, Piece, join_pieces
from scone.server.api.completion_schema import CompletionRequest, CompletionResponse, event_stream_response
from scone.server.api.errors import error_responses
from scone.server.api.generation import Generation, PromptDelta
from scone.server.api.json_body import JsonRoute
from scone.server.api.prompt_tokens import fit_max_tokens, prompt_token_ids, split_prompts
from scone.server.api.respond import respond
from scone.server.api.sse import ChunkFrames
from scone.server.api.state import ServedModel, ServerState
from scone.server.errors import InvalidRequestError
from scone.server.sequence import Delta, GenerationRequest

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses={
        **event_stream_response(CompletionResponse),
        **error_responses(400, 401, 404, 413, 415, 500, 503, 504),
    },
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues each prompt."""
    state: ServerState = request.app.state.server
    model = state.model_named(body.model)
    state.warn_unknown(body.refuse_unsupported())
    _check_combinations(body)
    completion = _Completion(state, model, body)
    await completion.admit(request.state.request_id)
    return await respond(request, completion.generation, completion, stream=body.stream)


def _check_combinations(body: CompletionRequest) -> None:
    if body.best_of not in (None, body.n):
        raise InvalidRequestError(
            f"best_of is {body.best_of}, wanted n ({body.n}) or nothing: hidden answers are not made here.",
            param="best_of",
            code="unsupported_parameter",
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError(
            "max_tokens is 0, wanted at least 1 unless echo is true.", param="max_tokens"
        )
    if body.min_tokens > body.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {body.min_tokens}, wanted at most max_tokens ({body.max_tokens}).",
            param="min_tokens",
        )


class _Completion:
    """One request: what it asks of the engine, and its answer in both shapes."""

    def __init__(self, state: ServerState, model: ServedModel, body: CompletionRequest) -> None:
        self._state = state
        self._model = model
        self._body = body
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._pieces: list[CompletionPieces] = []
        options = body.stream_options
        includes_usage = options is not None and options.include_usage
        self._frames = ChunkFrames(self._envelope(), with_usage=includes_usage)
        self.generation: Generation

    async def admit(self, request_id: str) -> None:
        """Tokenises and submits; raises InvalidRequestError and UnavailableError."""
        prompts = split_prompts(self._body.prompt, self._state.config.max_prompts, "prompt")
        requests = [await self._request(i, prompt) for i, prompt in enumerate(prompts)]
        self.generation = Generation(self._state, self._model, requests, request_id)
        self.generation.start()

    async def _request(self, prompt_index: int, prompt: str | list[int]) -> GenerationRequest:
        body, model = self._body, self._model
        input_ids = await prompt_token_ids(model, prompt, body.add_special_tokens)
        max_tokens = fit_max_tokens(model, len(input_ids), body.max_tokens, "prompt")
        text = prompt if isinstance(prompt, str) else ""
        if body.echo and not isinstance(prompt, str):
            text = model.tokenizer.decode(input_ids, skip_special_tokens=body.skip_special_tokens)
        for k in range(body.n):
            self._pieces.append(
                CompletionPieces(prompt_index * body.n + k, input_ids, text, body, model.tokenizer)
            )
        sampling = body.sampling_params(
            model.tokenizer.vocab_size,
            max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        return GenerationRequest(
            request_id=f"{self._id}-{prompt_index}",
            input_ids=tuple(input_ids),
            sampling=sampling,
            n=body.n,
            cache_salt=body.cache_salt,
        )

    def whole(self, deltas: Sequence[PromptDelta]) -> bytes:
        """The answer that is not streamed."""
        pieces: dict[int, list[Piece]] = defaultdict(list)
        for prompt_index, delta in deltas:
            piece = self._piece(prompt_index, delta)
            if piece is not None:
                pieces[piece["index"]].append(piece)
        choices = [join_pieces(pieces[index]) for index in sorted(pieces)]
        return orjson.dumps(self._envelope() | {"choices": choices, "usage": self.generation.usage()})

    def events(self, deltas: Sequence[PromptDelta]) -> bytes:
        """What a stream says of `deltas`; b"" if there is nothing to show yet."""
        events = b""
        for prompt_index, delta in deltas:
            piece = self._piece(prompt_index, delta)
            if piece is not None:
                events += self._frames.chunk(piece)
        return events

    def last_event(self) -> bytes:
        """The event with the usage, if it was asked for."""
        return self._frames.last(self.generation.usage())

    def _piece(self, prompt_index: int, delta: Delta) -> Piece | None:
        return self._pieces[prompt_index * self._body.n + delta.index].piece(delta)

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
        }
