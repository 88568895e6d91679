"""POST /v1/embeddings: pooled hidden states, computed in the same steps as everybody's completions."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from scone.server.api.embedding_schema import EmbeddingRequest, EmbeddingResponse
from scone.server.api.errors import error_responses
from scone.server.api.generation import Generation, PromptDelta
from scone.server.api.json_body import JsonRoute
from scone.server.api.prompt_tokens import fit_max_tokens, prompt_token_ids, split_prompts
from scone.server.api.respond import respond_whole
from scone.server.api.state import ServedModel, ServerState
from scone.server.errors import InvalidRequestError
from scone.server.sequence import GenerationRequest, PoolingParams, SamplingParams

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingResponse,
    responses=error_responses(400, 401, 404, 413, 415, 500, 503, 504),
)
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """One vector for each input."""
    state: ServerState = request.app.state.server
    model = state.model_named(body.model)
    state.warn_unknown(body.refuse_unsupported())
    pooling = _pooling(body, model)
    prompts = split_prompts(body.input, state.config.max_prompts, "input")
    call_id = f"embd-{uuid.uuid4().hex}"
    requests = [
        GenerationRequest(
            request_id=f"{call_id}-{i}",
            input_ids=tuple(await _input_ids(body, model, prompt)),
            sampling=SamplingParams(max_tokens=0),
            pooling=pooling,
            cache_salt=body.cache_salt,
        )
        for i, prompt in enumerate(prompts)
    ]
    generation = Generation(state, model, requests, request.state.request_id)
    generation.start()
    return await respond_whole(request, generation, partial(_answer, body, model, generation))


def _pooling(body: EmbeddingRequest, model: ServedModel) -> PoolingParams:
    """The engine's form; raises InvalidRequestError for what this model does not have."""
    if body.dimensions not in (None, model.dim):
        raise InvalidRequestError(
            f"dimensions is {body.dimensions}, wanted {model.dim} or nothing: vectors are not cut here.",
            param="dimensions",
        )
    if body.layer is not None and body.layer > model.num_layers:
        raise InvalidRequestError(f"layer is {body.layer}, wanted 0 to {model.num_layers}.", param="layer")
    return PoolingParams(kind=body.pooling, layer=None if body.layer == model.num_layers else body.layer)


async def _input_ids(body: EmbeddingRequest, model: ServedModel, prompt: str | list[int]) -> list[int]:
    input_ids = await prompt_token_ids(model, prompt, body.add_special_tokens, "input")
    fit_max_tokens(model, len(input_ids), 0, "input")
    return input_ids


def _answer(
    body: EmbeddingRequest, model: ServedModel, generation: Generation, deltas: Sequence[PromptDelta]
) -> bytes:
    vectors = {index: delta.embedding for index, delta in deltas if delta.embedding is not None}
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vectors[i], body.encoding_format)}
        for i in sorted(vectors)
    ]
    usage = generation.usage()
    del usage["completion_tokens"]
    answer = {"object": "list", "data": data, "model": model.name, "usage": usage}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _encoded(vector: NDArray[np.float32], encoding_format: str) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector
