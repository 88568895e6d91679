"""How a request body is read: content type checked, strict JSON, errors in the nested form."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from scone.server.api.errors import ApiError


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is `application/json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            if content_type.partition(";")[0].strip().lower() != "application/json":
                raise ApiError(
                    415,
                    f"Content-Type is {content_type[:100]!r}, wanted application/json.",
                    code="unsupported_media_type",
                )
            json_request = JsonRequest(request.scope, request.receive)
            # Read here: FastAPI turns every error of reading, a body over the limit too, into a 400.
            await json_request.body()
            return await handle(json_request)

        return handle_json


class JsonRequest(Request):
    """Reads its body as JSON without Python's additions to the language."""

    async def json(self) -> Any:
        """The parsed body; raises json.JSONDecodeError for everything that is not JSON."""
        body = await self.body()
        try:
            # Not orjson: it calls integers over 64 bits malformed, where we can name the field.
            return json.loads(body, parse_constant=_refuse_constant)
        except json.JSONDecodeError:
            raise
        except UnicodeDecodeError:
            raise json.JSONDecodeError("not UTF-8", "", 0) from None
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", "", 0) from None
        except ValueError:  # int() of more digits than Python converts
            raise json.JSONDecodeError("a number is too long", "", 0) from None


def _refuse_constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is not JSON", "", 0)
