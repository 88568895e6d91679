"""The store of recycled states, /admin/recycled: what it holds, its budgets, emptying it."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from scone.cache.errors import CacheError
from scone.cache.recycled_stats import Kind
from scone.server.api.errors import ApiError, error_responses
from scone.server.api.state import ServerState
from scone.server.served_recycled import ServedRecycled

router = APIRouter(tags=["Operation"])


class RecycledTier(BaseModel):
    """What one tier holds of a kind."""

    tier: str
    entries: int
    bytes: int


class RecycledKind(BaseModel):
    """One kind of states; counters are this process's, since it started."""

    kind: Kind
    tiers: list[RecycledTier]
    queries: int
    hits: int
    evictions: int
    dropped: int
    damaged: int


class RecycledMemory(BaseModel):
    """The budget that states share with the table's rows."""

    total_bytes: int
    used_bytes: dict[str, int]
    staging_bytes: int


class RecycledDisk(BaseModel):
    """What the store's files may take, and take."""

    total_bytes: int
    used_bytes: int


class RecycledBudgets(BaseModel):
    """Budgets from now on, until the server starts again; what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    ram_bytes: int | None = Field(default=None, ge=0)
    disk_bytes: int | None = Field(default=None, ge=0)


class RecycledCost(BaseModel):
    """Measured speeds; null where nothing was measured yet."""

    compute_tokens_per_second: float
    break_even_bytes_per_second: float | None
    read_bytes_per_second: dict[str, float | None]


class RecycledCard(BaseModel):
    """The store; everything but `path` is left out where the server keeps no states."""

    path: str | None
    block_form: str | None = None
    kinds: list[RecycledKind] = []
    memory: RecycledMemory | None = None
    disk: RecycledDisk | None = None
    cost: RecycledCost | None = None


class RecycledCleared(BaseModel):
    """How many states were dropped."""

    num_cleared: int


@router.get("/admin/recycled", response_model=RecycledCard, responses=error_responses(401, 503))
async def show_recycled(request: Request) -> Any:
    """What is kept of computed states, and what fetching and computing them takes."""
    state: ServerState = request.app.state.server
    recycled = state.model.recycled
    return RecycledCard(path=None) if recycled is None else await to_thread.run_sync(recycled.view)


@router.patch("/admin/recycled", response_model=RecycledCard, responses=error_responses(400, 401, 503))
async def resize_recycled(budgets: RecycledBudgets, request: Request) -> Any:
    """Sets other budgets and shows what is left; states beyond them are evicted, least worth first.

    The budget of memory is the server's, for states and the table's rows; that of the disk holds for every
    process that shares the store. Requests under way go on: what they were to fetch is computed.
    """
    recycled = _store_of(request.app.state.server)
    try:
        return await to_thread.run_sync(recycled.resize, budgets.ram_bytes, budgets.disk_bytes)
    except CacheError as error:
        raise ApiError(400, f"The budgets were not changed: {error}.", code="invalid_budget") from None


@router.delete("/admin/recycled", response_model=RecycledCleared, responses=error_responses(400, 401, 503))
async def clear_recycled(request: Request, kind: Kind | None = None) -> Any:
    """Drops all states, or those of one kind; requests that were to use them compute instead."""
    recycled = _store_of(request.app.state.server)
    return RecycledCleared(num_cleared=await to_thread.run_sync(recycled.clear, kind))


def _store_of(state: ServerState) -> ServedRecycled:
    recycled = state.model.recycled
    if recycled is None:
        raise ApiError(400, "This server keeps no states (setting recycled).", code="no_store")
    return recycled
