"""Limits and choices of the HTTP side; the settings of `scone serve` that it needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Times are in seconds.

    Attributes:
        api_keys: any of them opens the server; none means it is open.
        metrics_need_key: whether /metrics asks for a key too.
        max_prompts: prompts of one completion request.
        queue_timeout: longest wait of an admitted request for its first step; 0 is no limit.
        request_timeout: longest duration of a whole request; 0 is no limit.
        stall_timeout: /health fails if the engine has work and makes no step for so long.
        keep_alive_interval: a silent stream gets a comment line each so often.
        drain_delay: how long the server still takes requests after /ready says no.
        drain_timeout: how long requests in flight may then go on.
    """

    api_keys: tuple[str, ...] = ()
    metrics_need_key: bool = False
    cors_allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_prompts: int = 128
    queue_timeout: float = 0.0
    request_timeout: float = 0.0
    stall_timeout: float = 60.0
    keep_alive_interval: float = 15.0
    drain_delay: float = 0.0
    drain_timeout: float = 30.0
