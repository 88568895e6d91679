"""One line in the log for each finished generation request; never its text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("scone.server.request")


def log_request(
    *,
    request_id: str,
    num_prompts: int,
    usage: Mapping[str, Any],
    queue_seconds: float | None,
    time_to_first_token_seconds: float | None,
    seconds: float,
    finish_reasons: Mapping[str, int],
) -> None:
    """Writes the line; with JSON logs its parts are fields of their own."""
    fields = {
        "request_id": request_id,
        "prompts": num_prompts,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "matched_tokens": usage["fgram"]["matched_tokens"],
        "queue_ms": _ms(queue_seconds),
        "ttft_ms": _ms(time_to_first_token_seconds),
        "e2e_ms": _ms(seconds),
        "finish": ",".join(f"{reason}x{n}" if n > 1 else reason for reason, n in finish_reasons.items()),
    }
    line = " ".join(f"{key}={'-' if value is None else value}" for key, value in fields.items())
    logger.info("finished %s", line, extra={"fields": fields})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
