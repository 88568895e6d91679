"""What the f-gram table is (GET /v1/tables), what it says of a text (POST /v1/fgrams/match), and another one
in its place (POST /admin/tables/reload).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from scone.model_store.errors import TableError
from scone.server.api.completion_schema import PromptIds, PromptText
from scone.server.api.errors import ApiError, error_responses
from scone.server.api.json_body import JsonRoute
from scone.server.api.json_types import JsonBool, JsonModel
from scone.server.api.prompt_tokens import prompt_token_ids
from scone.server.api.state import ServedModel, ServerState
from scone.server.api.token_text import token_text
from scone.server.served_table import ServedTable

logger = logging.getLogger(__name__)

router = APIRouter(route_class=JsonRoute, tags=["F-grams"])


class TierCard(BaseModel):
    """A range of rows that are read in one way."""

    tier: str
    rows: int
    bytes: int


class TableCard(BaseModel):
    """One loaded table; `table_id` is a hash over everything that determines its bytes."""

    name: str
    object: Literal["fgram_table"] = "fgram_table"
    num_fgrams: int
    dim: int
    dtype: str
    codec: str
    backend: str
    max_n: int
    generation: int
    table_id: str
    tiers: list[TierCard]


class TableList(BaseModel):
    """All loaded tables."""

    object: Literal["list"] = "list"
    data: list[TableCard]


class TableReload(BaseModel):
    """The table in use now; `changed` is false if it was in use before."""

    changed: bool
    table: TableCard


class MatchRequest(JsonModel):
    """A text or token ids to look up."""

    prompt: PromptText | PromptIds
    model: str | None = None
    add_special_tokens: JsonBool = Field(
        True, description="Put the model's begin-of-text token before a text."
    )


class MatchedToken(BaseModel):
    """One token and the longest f-gram that ends with it; matched_len 1 and row_id -1 where there is none."""

    id: int
    text: str
    matched_len: int
    row_id: int
    count: int | None
    tier: str | None


class MatchResponse(BaseModel):
    """One entry a token, in order."""

    tokens: list[MatchedToken]


@router.get("/v1/tables", response_model=TableList, responses=error_responses(401, 503))
async def list_tables(request: Request) -> Any:
    """The table in use, or none."""
    state: ServerState = request.app.state.server
    served = state.model.table
    return TableList(data=[] if served is None else [_card(served)])


@router.post(
    "/admin/tables/reload", response_model=TableReload, responses=error_responses(400, 401, 409, 503)
)
async def reload_table(request: Request) -> Any:
    """Opens what lies at the table's path now and switches to it; running requests keep the table they have.

    409 if that is no table for this model: the old one goes on.
    """
    state: ServerState = request.app.state.server
    async with state.reloading:
        model = state.model
        served = _table_of(model)
        try:
            newest = await to_thread.run_sync(served.open_newest)
        except TableError as error:
            state.metrics.table_reloads.labels("refused").inc()
            logger.error("the table was not reloaded: %s", error)
            raise ApiError(409, f"The table was not reloaded: {error}.", code="table_refused") from None
        if newest is None:
            state.metrics.table_reloads.labels("unchanged").inc()
            return TableReload(changed=False, table=_card(served))
        # First what this side looks at: the former may be closed as soon as the engine has the newest.
        former = served.switch(newest)
        try:
            await to_thread.run_sync(model.engine.swap_table, newest.table, former.close)
        except BaseException:
            served.switch(former)
            newest.close()
            raise
        state.metrics.table_reloads.labels("switched").inc()
        logger.info(
            "table generation %d: %s, %s", newest.number, newest.folder, newest.table.manifest.table_id
        )
        return TableReload(changed=True, table=_card(served))


@router.post(
    "/v1/fgrams/match",
    response_model=MatchResponse,
    responses=error_responses(400, 401, 404, 413, 415, 500, 503),
)
async def match_fgrams(body: MatchRequest, request: Request) -> Any:
    """Which f-gram's row replaces each token's embedding."""
    state: ServerState = request.app.state.server
    model = state.model_named(body.model)
    served = _table_of(model)
    input_ids = await prompt_token_ids(model, body.prompt, body.add_special_tokens)
    with served.current.hold() as table:
        matches = await to_thread.run_sync(table.explain, input_ids)
    return MatchResponse(
        tokens=[
            MatchedToken(
                id=token_id,
                text=token_text(model.tokenizer, token_id),
                matched_len=match.matched_len,
                row_id=match.row_id,
                count=match.count,
                tier=match.tier,
            )
            for token_id, match in zip(input_ids, matches, strict=True)
        ]
    )


def _table_of(model: ServedModel) -> ServedTable:
    """Raises ApiError (400) if the model is served without a table."""
    if model.table is None:
        raise ApiError(400, "This server has no f-gram table (setting table).", code="no_table")
    return model.table


def _card(served: ServedTable) -> TableCard:
    manifest = served.table.manifest
    return TableCard(
        name=served.name,
        num_fgrams=manifest.num_fgrams,
        dim=manifest.dim,
        dtype=manifest.dtype,
        codec=manifest.codec,
        backend=manifest.backend,
        max_n=manifest.max_n,
        generation=served.current.number,
        table_id=manifest.table_id,
        tiers=[TierCard(tier=t.name, rows=t.num_rows, bytes=t.num_bytes) for t in served.table.tiers],
    )
