"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, on every route.

Messages are sanitised: no file paths, no addresses, no traces, and echoed input is cut short. (An
unlimited echo turns a small bad request into an error body thousands of times its size.)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scone.server.errors import InvalidRequestError, UnavailableError

logger = logging.getLogger(__name__)

MAX_ECHO_CHARS = 200
MAX_LISTED_ERRORS = 10
_PATH = re.compile(r"(?<![\w.:/<])(?:/[\w.@+~-]+){2,}/?")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


class ErrorDetail(BaseModel):
    """The four keys that OpenAI's schema requires."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer whose status is 400 or more."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than success; raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's class of error for this status."""
        return {
            400: "invalid_request_error",
            401: "authentication_error",
            404: "not_found_error",
            405: "invalid_request_error",
            409: "conflict_error",
            413: "invalid_request_error",
            415: "invalid_request_error",
            503: "unavailable_error",
            504: "timeout_error",
        }.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body, sanitised."""
        message = sanitise(self.message)
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole HTTP answer."""
        return Response(
            orjson.dumps(self.body()),
            status_code=self.status,
            media_type="application/json",
            headers=self.headers,
        )


def as_api_error(error: Exception) -> ApiError:
    """The HTTP form of any exception; unexpected ones are logged with their trace, told in general words."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), code=error.code, param=error.param)
    if isinstance(error, UnavailableError):
        headers = {"Retry-After": str(error.retry_after_seconds)}
        return ApiError(503, str(error), code=error.code, headers=headers)
    if isinstance(error, RequestValidationError):
        return _validation_error(error.errors())
    if isinstance(error, HTTPException):
        return _http_error(error)
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Gives the errors of `app` the nested form; ErrorMiddleware does it for unexpected ones."""

    async def handle(request: Request, error: Exception) -> Response:
        answer = as_api_error(error)
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            answer.headers |= _allowed_methods(request)
        return answer.response()

    for kind in (ApiError, InvalidRequestError, UnavailableError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


class ErrorMiddleware:
    """Answers 500 to what nobody caught. Starlette's own would answer outside of our other middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting_start)
        except Exception as error:
            if has_started or scope["type"] != "http":
                raise
            await as_api_error(error).response()(scope, receive, send)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that can answer these statuses."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        # Not "model": FastAPI would give it the media type of the route's success, as in /metrics.
        described[status] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
        }
    return described


def sanitise(message: str) -> str:
    """`message` without file paths and addresses, on one line, at most 1000 characters long."""
    one_line = " ".join(message.split())
    return _ADDRESS.sub("<address>", _PATH.sub("<path>", one_line))[:1000]


def shorten(value: object) -> str:
    """`value` as JSON-like text, cut to MAX_ECHO_CHARS characters."""
    # A slice first: the repr of a large list or string would cost more than the request itself.
    sliced = value[: MAX_ECHO_CHARS + 1] if isinstance(value, str | list) else value
    text = repr(sliced)
    return text if len(text) <= MAX_ECHO_CHARS else text[:MAX_ECHO_CHARS] + "..."


def _validation_error(errors: Sequence[Any]) -> ApiError:
    first = errors[0]
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "malformed")
        return ApiError(400, f"The body is not valid JSON: {detail}.", code="invalid_json")
    lines = [f"{_field(e['loc']) or 'body'}: {e['msg']}{_got(e)}" for e in errors[:MAX_LISTED_ERRORS]]
    if len(errors) > MAX_LISTED_ERRORS:
        lines.append(f"and {len(errors) - MAX_LISTED_ERRORS} more")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, "; ".join(lines) + ".", code=code, param=_field(first["loc"]))


def _got(error: Mapping[str, Any]) -> str:
    return "" if error["type"] == "missing" else f" (got {shorten(error.get('input'))})"


def _field(location: Sequence[str | int]) -> str | None:
    """`("body", "prompt", "<texts>", 1)` as `prompt.1`: what is in angle brackets is no part of the body."""
    if location and location[0] in {"body", "query", "path", "header"}:
        location = location[1:]
    names = (str(part) for part in location if not str(part).startswith("<"))
    return ".".join(names)[:MAX_ECHO_CHARS] or None


def _allowed_methods(request: Request) -> dict[str, str]:
    """The header that a 405 needs: the router names the methods of the path's first route only."""
    path = getattr(request.scope.get("route"), "path_format", None)
    methods = request.app.openapi()["paths"].get(path)
    return {} if methods is None else {"Allow": ", ".join(sorted(method.upper() for method in methods))}


def _http_error(error: HTTPException) -> ApiError:
    message = {
        404: "No such route.",
        405: "This route does not answer this method.",
    }.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers)
