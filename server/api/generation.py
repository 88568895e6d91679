"""One HTTP request's sequences: submitted together, heard on the event loop, aborted together."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from scone.server.api.errors import ApiError
from scone.server.api.request_log import log_request
from scone.server.api.state import ServedModel, ServerState
from scone.server.errors import UnavailableError
from scone.server.sequence import Delta, GenerationRequest, RequestUsage

PromptDelta = tuple[int, Delta]
"""Which prompt of the request, and what was added to one of its sequences."""


class Generation:
    """Deltas of all sequences of one HTTP request. Whoever starts it closes it.

    Attributes:
        loop: on which it is awaited.
    """

    def __init__(
        self, state: ServerState, model: ServedModel, requests: Sequence[GenerationRequest], request_id: str
    ) -> None:
        self.request_id = request_id
        self._state = state
        self._model = model
        self._requests = requests
        self._deltas: deque[PromptDelta] = deque()
        self._is_noted = False
        self._waiter: asyncio.Future[None] | None = None
        self.loop = asyncio.get_running_loop()
        self._unfinished = {(i, k) for i, request in enumerate(requests) for k in range(request.n)}
        self._interruption: ApiError | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._started = time.monotonic()
        self._usages: dict[tuple[int, int], RequestUsage] = {}
        self._finish_reasons: Counter[str] = Counter()

    def start(self) -> None:
        """Admits all sequences or, raising UnavailableError, none."""
        try:
            self._state.check_admission()
            self._model.engine.submit_batch(
                [(request, partial(self._on_delta, i)) for i, request in enumerate(self._requests)]
            )
        except UnavailableError as error:
            self._state.metrics.admission_rejections.labels(error.code).inc()
            raise
        self._state.in_flight.add(self)
        self._set_limits()

    @property
    def keep_alive_interval(self) -> float:
        return self._state.config.keep_alive_interval

    @property
    def is_finished(self) -> bool:
        return not self._unfinished

    async def next_deltas(self) -> list[PromptDelta]:
        """What has come since the last call, at least one delta; [] once all sequences have ended.

        Raises ApiError if the request ran out of time, was interrupted, or failed in the engine.
        """
        while self._interruption is None and not self._deltas:
            if self.is_finished:
                return []
            self._waiter = self.loop.create_future()
            await self._waiter
        if self._interruption is not None:
            raise self._interruption
        fresh: list[PromptDelta] = []
        while self._deltas:
            fresh.append(self._deltas.popleft())
        for i, (prompt_index, delta) in enumerate(fresh):
            try:
                self._account(prompt_index, delta)
            except ApiError as error:
                if i == 0:
                    raise
                # What came before the failure is still sent, however the two fell together.
                self._interruption = error
                return fresh[:i]
        return fresh

    def interrupt(self, error: ApiError) -> None:
        """Ends the request with `error`, whatever else has come."""
        self._interruption = error
        self._end_wait()

    def wake(self) -> None:
        """To be called on the event loop once there are deltas."""
        # First the flag, then the look at the deltas: one that is appended in between wakes us once more for
        # nothing, but none is left lying.
        self._is_noted = False
        self._end_wait()

    def _end_wait(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, with what was read from the f-gram table."""
        prompt_usages = [u for (_, k), u in self._usages.items() if k == 0]
        num_prompt = sum(len(request.input_ids) for request in self._requests)
        num_generated = sum(u.num_generated_tokens for u in self._usages.values())
        rows_by_tier: Counter[str] = Counter()
        for usage in self._usages.values():
            rows_by_tier.update(usage.rows_by_tier)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(u.num_cached_tokens for u in prompt_usages)},
            "fgram": {
                "matched_tokens": sum(u.num_matched_tokens for u in self._usages.values()),
                "rows_by_tier": dict(rows_by_tier),
            },
        }

    def close(self) -> None:
        """Aborts what is unfinished, writes the log line; further calls do nothing."""
        if self not in self._state.in_flight:
            return
        self._state.in_flight.discard(self)
        for timer in self._timers:
            timer.cancel()
        for prompt_index in {i for i, _ in self._unfinished}:
            self._model.engine.abort(self._requests[prompt_index].request_id)
        self._finish_reasons["abort"] += len(self._unfinished)
        log_request(
            request_id=self.request_id,
            num_prompts=len(self._requests),
            usage=self.usage(),
            queue_seconds=max((u.queue_seconds for u in self._usages.values()), default=None),
            time_to_first_token_seconds=min(
                (u.time_to_first_token_seconds for u in self._usages.values()), default=None
            ),
            seconds=time.monotonic() - self._started,
            finish_reasons=+self._finish_reasons,
        )

    def _on_delta(self, prompt_index: int, delta: Delta) -> None:
        """Called on the engine's thread."""
        self._deltas.append((prompt_index, delta))
        if not self._is_noted:
            self._is_noted = True
            self._state.doorbell.note(self)

    def _set_limits(self) -> None:
        config = self._state.config
        if config.request_timeout:
            too_long = ApiError(
                504,
                f"The request took longer than {config.request_timeout:g} s; ask for fewer tokens.",
                code="timeout",
            )
            self._timers.append(self.loop.call_later(config.request_timeout, self.interrupt, too_long))
        if config.queue_timeout:
            self._timers.append(self.loop.call_later(config.queue_timeout, self._interrupt_if_queued))

    def _interrupt_if_queued(self) -> None:
        if any(self._model.engine.is_queued(request.request_id) for request in self._requests):
            self._state.metrics.admission_rejections.labels("queue_timeout").inc()
            seconds = self._state.config.queue_timeout
            message = f"The request waited longer than {seconds:g} s for its turn."
            self.interrupt(ApiError(503, message, code="queue_timeout", headers={"Retry-After": "2"}))

    def _account(self, prompt_index: int, delta: Delta) -> None:
        key = (prompt_index, delta.index)
        if delta.usage is not None:
            self._usages[key] = delta.usage
        if delta.finish_reason is None:
            return
        self._unfinished.discard(key)
        self._finish_reasons[delta.finish_reason] += 1
        if delta.finish_reason == "error":
            raise ApiError(500, delta.error or "The engine failed on this request.", code="generation_failed")
        if delta.finish_reason == "abort":
            raise ApiError(503, "The request was aborted.", code="aborted")
