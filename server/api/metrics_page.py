"""GET /metrics, in Prometheus' text format."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from scone.server.api.errors import error_responses
from scone.server.api.state import ServerState

router = APIRouter(tags=["Operation"])


@router.get("/metrics", response_class=PlainTextResponse, responses=error_responses(401))
async def metrics(request: Request) -> Response:
    """All metrics of this process."""
    state: ServerState = request.app.state.server
    # In a thread: collectors read /proc.
    page, content_type = await to_thread.run_sync(state.metrics.exposition)
    return Response(page, headers={"Content-Type": content_type})
