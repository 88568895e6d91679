"""Errors of the server.

ServerError(SconeError)
├── SettingError        a setting that is unknown or has a bad value
├── InvalidRequestError a request that can never succeed (HTTP 400, with the parameter's name)
└── UnavailableError    a request that may succeed later (HTTP 503 with Retry-After, with a code)
"""

from scone.kernels.errors import SconeError


class ServerError(SconeError):
    """Root of this floor's errors."""


class SettingError(ServerError):
    """A setting that is unknown or has a bad value."""


class InvalidRequestError(ServerError):
    """A request that can never succeed; `param` names the field, `code` is OpenAI's error code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnavailableError(ServerError):
    """A request that may succeed later: `queue_full`, `model_loading` or `shutting_down`."""

    def __init__(self, message: str, *, code: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_seconds = retry_after_seconds
