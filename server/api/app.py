"""The ASGI application: routes, and around them request ids, keys and the body limit."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from scone.server.api import (
    chat_completions,
    completions,
    embeddings,
    health,
    metrics_page,
    models,
    recycled,
    tables,
    tokenization,
)
from scone.server.api.body_limit import BodyLimitMiddleware
from scone.server.api.errors import ErrorBody, ErrorMiddleware, add_error_handlers
from scone.server.api.keys import KeyMiddleware
from scone.server.api.request_id import RequestIdMiddleware
from scone.server.api.state import ServerState
from scone.server.version import version

OPEN_PATHS = ("/health", "/ready")


def create_app(state: ServerState) -> FastAPI:
    """The application over `state`; it answers 503 `model_loading` until `state` has a model."""
    config = state.config
    app = FastAPI(
        title="scone-serve",
        version=version(),
        middleware=[
            # Plain ASGI only, outermost first: Starlette's BaseHTTPMiddleware hides disconnects.
            Middleware(RequestIdMiddleware),
            Middleware(ErrorMiddleware),
            *_cors(config.cors_allow_origins),
            Middleware(
                KeyMiddleware,
                keys=config.api_keys,
                open_paths=OPEN_PATHS if config.metrics_need_key else (*OPEN_PATHS, "/metrics"),
            ),
            Middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes),
        ],
        # FastAPI would otherwise trace and measure each request itself.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        redirect_slashes=False,
    )
    app.state.server = state
    add_error_handlers(app)
    for routes in (
        completions,
        chat_completions,
        embeddings,
        models,
        tables,
        recycled,
        tokenization,
        health,
        metrics_page,
    ):
        app.include_router(routes.router)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without the 422 that it adds to every route with a body: here that is a 400."""
    document = FastAPI.openapi(app)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= error.pop("$defs") | {"ErrorBody": error}
    return document


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    if not origins:
        return []
    return [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])]
