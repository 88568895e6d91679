"""The engine's door: thread-safe submission and abortion around a single engine thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from scone.cache.device import Device
from scone.cache.fgram_table import FGramTable
from scone.cache.recycle_cost import RecycleCost
from scone.cache.recycled_store import RecycledStore
from scone.model_store.decoder import Decoder
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.admission import check_request
from scone.server.engine.cache_pages import CachePages
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.engine_core import EngineCore
from scone.server.engine.generation import OnDelta, RequestRun
from scone.server.engine.input_rows import InputRows, read_ahead
from scone.server.engine.kv_dtype import KvCacheSize
from scone.server.engine.model_runner import ModelRunner, Runner, choose_backend
from scone.server.engine.observer import EngineObserver, SilentObserver
from scone.server.engine.recycler import Recycler
from scone.server.engine.row_overlay import RowOverlay, staging_device
from scone.server.engine.scheduler import Status
from scone.server.engine.step_clock import StepClock
from scone.server.errors import InvalidRequestError, UnavailableError
from scone.server.sequence import GenerationRequest

logger = logging.getLogger(__name__)

STARVED_WAIT_SECONDS = 0.0005
"""How often the engine looks again when every sequence waits for rows."""

POSTED_WAIT_SECONDS = 0.01
"""The same where all wait for a store of recycled states, whose workers tell when they have something."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot.

    Attributes:
        num_running, num_waiting: sequences; a request with n > 1 counts once until its prompt is done.
        last_step_monotonic: when the engine last ended a step or had nothing to do, `time.monotonic()`.
    """

    num_running: int
    num_waiting: int
    num_queued_tokens: int
    kv_cache_usage: float
    has_work: bool
    last_step_monotonic: float


class Engine:
    """Generates for many requests at once.

    Attributes:
        recycle_cost: what computing and fetching states take; None where no states are kept.

    >>> engine = Engine(config, decoder, tokenizer, None, model_hash)
    >>> engine.start()
    >>> engine.submit(GenerationRequest(request_id="a", input_ids=(1, 2)), on_delta=print)
    >>> engine.shutdown(timeout_seconds=10)
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder | Runner,
        tokenizer: Tokenizer,
        table: FGramTable | None,
        model_hash: str,
        *,
        observer: EngineObserver | None = None,
        device: Device | None = None,
        recycled: RecycledStore | None = None,
    ) -> None:
        """Table and store stay the caller's to close, after `shutdown`; nothing of the decoder is kept but
        what the backend needs. `device` stages the table's rows; without one, the model's own does. States
        are fetched from `recycled` and kept there. Raises SettingError for settings that this machine or
        model cannot do.
        """
        self.config = config
        if isinstance(model, Decoder):
            device = device or staging_device(model.device)
            runner: Runner = runner_for(model, config, device)
        else:
            runner = model
        self._runner = runner
        self._eos_ids = tokenizer.eos_ids
        self._core = EngineCore(config, runner, tokenizer, model_hash, observer or SilentObserver(), device)
        self.recycle_cost: RecycleCost | None = None
        if recycled is not None:
            assert isinstance(runner, ModelRunner)
            cost = self.recycle_cost = RecycleCost(recycled.read_speeds)
            self._core.recycle(recycled, cost, runner, self._post)
        self._changed = threading.Condition()
        # All below is guarded by _changed.
        self._input_rows = None if table is None else read_ahead(table, self.overlay.device)
        self._retired: list[tuple[InputRows | None, Callable[[], None]]] = []
        self._commands: deque[Callable[[], None]] = deque()
        self._queued: dict[str, RequestRun] = {}
        self._open: dict[str, RequestRun] = {}
        self._num_queued_tokens = 0
        self._num_arrivals = 0
        self._num_settled = 0  # sequences that had ended when the books were last looked through
        self._is_draining = False
        self._is_stopping = False
        self._last_step = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def observer(self) -> EngineObserver:
        return self._core.observer

    @observer.setter
    def observer(self, observer: EngineObserver) -> None:
        """Set it before `start`."""
        self._core.observer = observer

    @property
    def overlay(self) -> RowOverlay:
        """How rows get to the model; its numbers may be read from any thread."""
        return self._core.overlay

    @property
    def clock(self) -> StepClock:
        """What the steps' time goes into; may be read from any thread."""
        return self._core.clock

    @property
    def recycler(self) -> Recycler | None:
        """How states are fetched and kept; its numbers may be read from any thread. None: they are not."""
        return self._core.recycler

    def start(self) -> None:
        """Starts the engine thread."""
        self._thread.start()

    @property
    def cache_pages(self) -> CachePages | None:
        """The KV cache's memory; None where the engine does not know it, or on a device."""
        return self._runner.cache_pages if isinstance(self._runner, ModelRunner) else None

    @property
    def kv_cache_size(self) -> KvCacheSize | None:
        """None where the engine does not know it."""
        return self._runner.kv_cache_size if isinstance(self._runner, ModelRunner) else None

    def after_deliveries(self, call: Callable[[], None]) -> None:
        """Has `call` called, on the engine's thread, after deltas were delivered: once for all of a step."""
        self._core.after_deliveries = call

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        """Admits a request; `on_delta` is called on the engine thread and must be quick.

        Raises:
            InvalidRequestError: the request can never be served.
            UnavailableError: `queue_full` or `shutting_down`.
        """
        self.submit_batch([(request, on_delta)])

    def submit_batch(self, batch: Sequence[tuple[GenerationRequest, OnDelta]]) -> None:
        """Admits all of the requests or none; raises as `submit` does."""
        for request, _ in batch:
            check_request(
                request,
                vocab_size=self._runner.vocab_size,
                max_model_len=self.config.max_model_len,
                eos_ids=self._eos_ids,
            )
        num_tokens = sum(len(request.input_ids) for request, _ in batch)
        with self._changed:
            self._check_room(len(batch), num_tokens, {request.request_id for request, _ in batch})
            now = time.monotonic()
            for request, on_delta in batch:
                run = RequestRun(
                    request=request,
                    on_delta=on_delta,
                    arrival=self._num_arrivals,
                    submitted_at=now,
                    input_rows=self._input_rows,
                )
                self._num_arrivals += 1
                self._queued[request.request_id] = self._open[request.request_id] = run
                self._commands.append(lambda run=run: self._core.add(run))  # type: ignore[misc]
            self._num_queued_tokens += num_tokens
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """Ends a request in any state with a last delta per open sequence; unknown ids are ignored."""
        with self._changed:
            run = self._open.get(request_id)
            if run is not None:
                self._commands.append(lambda: self._core.abort(run))
                self._changed.notify_all()

    def swap_table(self, table: FGramTable | None, on_retired: Callable[[], None]) -> None:
        """New requests use `table`, requests under way keep the one they began with.

        `on_retired` is called, on a thread of its own, once nothing uses the old one; close it then.
        """
        self.swap_rows(None if table is None else read_ahead(table, self.overlay.device), on_retired)

    def swap_rows(self, input_rows: InputRows | None, on_retired: Callable[[], None]) -> None:
        """As `swap_table`, for rows from elsewhere."""
        with self._changed:
            self._retired.append((self._input_rows, on_retired))
            self._input_rows = input_rows
            self._commands.append(lambda: None)  # a round of the loop, which looks for what is retired
            self._changed.notify_all()

    def drain(self) -> None:
        """Admits nothing more; what is admitted goes on."""
        with self._changed:
            self._is_draining = True

    def shutdown(self, timeout_seconds: float) -> bool:
        """Drains, aborts what is left after `timeout_seconds`, ends the thread; true if nothing was left."""
        self.drain()
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            drained = self._changed.wait_for(
                lambda: not self._open or not self.is_alive(), deadline - time.monotonic()
            )
            for run in list(self._open.values()):
                self._commands.append(lambda run=run: self._core.abort(run))  # type: ignore[misc]
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        if self._core.recycler is not None:
            self._core.recycler.close()
        if self.cache_pages is not None:
            self.cache_pages.stop()
        if self._input_rows is not None:
            self._input_rows.close()
        return drained

    def is_queued(self, request_id: str) -> bool:
        """Whether the request waits for its first step."""
        with self._changed:
            return request_id in self._queued

    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        state = self._core.state
        with self._changed:
            return EngineStats(
                num_running=len(state.running),
                num_waiting=len(state.waiting),
                num_queued_tokens=self._num_queued_tokens,
                kv_cache_usage=1 - state.pool.num_free / state.pool.num_blocks,
                has_work=bool(self._open),
                last_step_monotonic=self._last_step,
            )

    def _post(self, command: Callable[[], None]) -> None:
        """Has `command` run on the engine thread, between two steps."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    # -- admission -----------------------------------------------------------------------------

    def _check_room(self, num_requests: int, num_tokens: int, request_ids: set[str]) -> None:
        if self._is_draining or not self.is_alive():
            raise UnavailableError("the engine is shutting down", code="shutting_down")
        duplicates = sorted(request_ids & self._open.keys())
        if duplicates or len(request_ids) != num_requests:
            raise InvalidRequestError(f"a request with id {(duplicates or ['given twice'])[0]} is under way")
        if len(self._queued) + num_requests > self.config.max_num_queued_reqs:
            raise UnavailableError(
                f"{len(self._queued)} requests are queued, at most {self.config.max_num_queued_reqs} may be "
                "(max_num_queued_reqs)",
                code="queue_full",
            )
        if self._num_queued_tokens + num_tokens > self.config.max_num_queued_tokens:
            raise UnavailableError(
                f"{self._num_queued_tokens} prompt tokens are queued, at most "
                f"{self.config.max_num_queued_tokens} may be (max_num_queued_tokens)",
                code="queue_full",
            )

    # -- the engine thread ---------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            if self._runner.device.type == "cuda":
                torch.cuda.set_device(self._runner.device)  # of this thread: kernels are launched on it
            progressed = True
            while True:
                with self._changed:
                    if not self._commands and not progressed:
                        waiting = self._waiting_seconds() if self._core.has_work else None
                        self._last_step = time.monotonic()
                        if self._is_stopping and not self._core.has_work:
                            return
                        self._changed.wait(waiting)
                    commands, self._commands = self._commands, deque()
                    self._last_step = time.monotonic()
                for command in commands:
                    command()
                if commands:
                    self._core.after_deliveries()
                progressed = self._core.has_work and self._core.step()
                self._core.after_deliveries()  # of what has failed
                self._forget_settled()
        except BaseException:
            logger.critical("the engine thread died", exc_info=True)
            raise
        finally:
            with self._changed:
                self._changed.notify_all()

    def _waiting_seconds(self) -> float:
        state = self._core.state
        is_told = all(seq.status is Status.RESTORING for seq in state.running)
        is_told = is_told and all(seq.num_stored_blocks is None for seq in state.waiting)
        return POSTED_WAIT_SECONDS if is_told else STARVED_WAIT_SECONDS

    def _forget_settled(self) -> None:
        """Takes started requests off the queue's count and ended ones off the books, if there may be any."""
        num_finished = self._core.num_finished
        if not (self._queued or self._retired) and num_finished == self._num_settled:
            return
        self._num_settled = num_finished
        with self._changed:
            for request_id, run in list(self._queued.items()):
                if run.started_at is not None or run.is_over:
                    del self._queued[request_id]
                    self._num_queued_tokens -= len(run.request.input_ids)
            ended = [request_id for request_id, run in self._open.items() if run.is_over]
            for request_id in ended:
                del self._open[request_id]
            if ended and not self._open:
                self._changed.notify_all()
            in_use = {run.input_rows for run in self._open.values()}
            retired = [(rows, call) for rows, call in self._retired if rows not in in_use]
            self._retired = [(rows, call) for rows, call in self._retired if rows in in_use]
        for rows, on_retired in retired:
            # Closing waits for reads under way, which is not for this thread.
            threading.Thread(
                target=_retire, args=(rows, on_retired), name="retire-table", daemon=True
            ).start()


def runner_for(decoder: Decoder, config: EngineConfig, device: Device) -> ModelRunner:
    """What runs a decoder where it lies; `device` copies to there. Raises SettingError."""
    if choose_backend(decoder, config) == "triton":
        from scone.server.engine.cuda_runner import CudaRunner  # Triton may not be installed

        return CudaRunner(decoder, config, device)
    return ModelRunner(decoder, config)


def _retire(rows: InputRows | None, on_retired: Callable[[], None]) -> None:
    if rows is not None:
        rows.close()
    on_retired()
