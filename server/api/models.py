"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from scone.server.api.errors import error_responses
from scone.server.api.state import ServedModel, ServerState

router = APIRouter(tags=["OpenAI"])


class ModelCard(BaseModel):
    """One served model; `max_model_len` is the longest prompt plus answer in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["scone-serve"] = "scone-serve"
    max_model_len: int


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models", response_model=ModelList, responses=error_responses(401, 503))
async def list_models(request: Request) -> Any:
    """The one model that this server has."""
    state: ServerState = request.app.state.server
    return ModelList(data=[_card(state.model)])


# `:path`, because names like `org/model` are usual.
@router.get("/v1/models/{model_id:path}", response_model=ModelCard, responses=error_responses(401, 404, 503))
async def get_model(model_id: str, request: Request) -> Any:
    """One model by name."""
    state: ServerState = request.app.state.server
    return _card(state.model_named(model_id))


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, max_model_len=model.max_model_len)
