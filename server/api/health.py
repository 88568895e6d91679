"""GET /health (is the process well?), /ready (should it get requests?) and /version."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel

from scone.kernels.errors import SconeError
from scone.server.api.errors import ApiError, error_responses
from scone.server.api.state import Phase, ServerState
from scone.server.version import version

router = APIRouter(tags=["Operation"])


class HealthStatus(BaseModel):
    """Which phase the server is in."""

    status: Phase


class Version(BaseModel):
    """Version of this server."""

    version: str


@router.get("/health", response_model=HealthStatus, responses=error_responses(503))
async def health(request: Request) -> Any:
    """200 while the process can do its work, also while it loads and drains; restart it on 503."""
    state: ServerState = request.app.state.server
    failure = state.failure()
    if failure is not None:
        raise ApiError(503, failure, code="unhealthy")
    return HealthStatus(status=state.phase)


@router.get("/ready", response_model=HealthStatus, responses=error_responses(503))
async def ready(request: Request) -> Any:
    """200 while requests should be sent here: loaded, healthy, not stopping, and the table can be read."""
    state: ServerState = request.app.state.server
    model = state.model
    failure = state.failure()
    if failure is not None:
        raise ApiError(503, failure, code="unhealthy")
    if state.phase != "ready":
        raise ApiError(
            503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"}
        )
    if model.table is not None:
        try:
            with model.table.current.hold() as table:
                await to_thread.run_sync(table.check_readable)
        except SconeError as error:
            raise ApiError(
                503, f"The f-gram table cannot be read: {error}", code="table_unreadable"
            ) from None
    return HealthStatus(status=state.phase)


@router.get("/version", response_model=Version, responses=error_responses(401))
async def get_version() -> Any:
    """The version of the installed distribution."""
    return Version(version=version())
