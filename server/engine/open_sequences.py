"""The sequences under way: how each begins, is heard of, and ends, giving back all that it holds.

What a sequence's token means for the next step is known at once (`note`); what its client gets of it may be
made later (`tell`): while the next step runs on a device beside the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from scone.model_store.tokenizer import Tokenizer
from scone.server.engine import scheduler
from scone.server.engine.detokenizer import Detokenizer, TokenBytes
from scone.server.engine.generation import Generation, RequestRun
from scone.server.engine.observer import EngineObserver
from scone.server.engine.recycler import Recycler
from scone.server.engine.row_overlay import RowOverlay
from scone.server.engine.row_waits import RowWaits
from scone.server.engine.sampler import SampledToken, SamplerState
from scone.server.engine.scheduler import SchedulerState, Status
from scone.server.sequence import Delta, FinishReason

logger = logging.getLogger(__name__)


_News = tuple[Generation, SampledToken | None, float]
"""A sequence's newest token, of which nobody is told yet (None: it ends without one), and when it came."""


class OpenSequences:
    """Every sequence from its request's admission to its last delta.

    Attributes:
        by_seq: the sequences by what the scheduler knows them as.
        waits: which of them wait for f-gram rows.
        recycler: is told what ends, if states are kept.
        num_finished: sequences that have ended, a counter.
        has_first_news: whether some receiver has still to be told of its sequence's first token.
    """

    def __init__(
        self,
        state: SchedulerState,
        tokenizer: Tokenizer,
        max_model_len: int,
        observer: EngineObserver,
        overlay: RowOverlay,
    ) -> None:
        self.observer = observer
        self.waits = RowWaits()
        self.recycler: Recycler | None = None
        self.num_finished = 0
        self.has_first_news = False
        self._news: deque[_News] = deque()
        self._state = state
        self._overlay = overlay
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer)
        self._max_model_len = max_model_len
        self.by_seq: dict[scheduler.Sequence, Generation] = {}

    def __contains__(self, generation: Generation) -> bool:
        return generation.seq in self.by_seq

    def begin(self, run: RequestRun, seq: scheduler.Sequence) -> Generation:
        """The next sequence of a request."""
        params = run.request.sampling
        generation = Generation(
            run=run,
            seq=seq,
            sampler=SamplerState(params, seq.index, run.request.input_ids, self._tokenizer.eos_ids),
            detokenizer=Detokenizer(
                self._token_bytes,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            ),
            eos_ids=self._tokenizer.eos_ids,
            max_model_len=self._max_model_len,
        )
        run.generations.append(generation)
        self.by_seq[seq] = generation
        self.waits.note(generation)
        return generation

    @property
    def has_news(self) -> bool:
        """Whether some receiver has still to be told of a token, or of an end."""
        return bool(self._news)

    def note(self, generation: Generation, token: SampledToken | None, now: float) -> None:
        """A sequence has its next token, or ends without one: from now on its receiver may be told.

        One that the token itself ends gives back here what it holds. One that its text ends is found by
        `tell`, and may be on its way through another step by then, of which nothing is kept.
        """
        self._news.append((generation, token, now))
        self.has_first_news |= generation.first_token_at is None
        if token is None or generation.is_ending:
            self._close(generation)

    def tell(self, only: Callable[[Generation], bool] | None = None) -> None:
        """Tells receivers, of all sequences or of some, what was noted since the last time."""
        news = self._news
        others: list[_News] = []
        if only is not None:
            news = deque([n for n in self._news if only(n[0])])
            others = [n for n in self._news if not only(n[0])]
            self._news.clear()  # in place: a receiver that fails brings us here from the loop below
            self._news.extend(others)
        self.has_first_news = any([n[0].first_token_at is None for n in others])
        gaps: dict[float, int] = {}  # as a rule one: sequences that decode have their tokens together
        while news:
            generation, token, at = news.popleft()
            if token is not None:
                gap = generation.note_token_time(at)
                if gap is None:
                    self.observer.on_first_token(generation.run.request, at - generation.run.submitted_at)
                else:
                    gaps[gap] = gaps.get(gap, 0) + 1
            self._tell(generation, token)
        for gap, num_tokens in gaps.items():
            self.observer.on_tokens(gap, num_tokens)

    def _tell(self, generation: Generation, token: SampledToken | None) -> None:
        try:
            delta = generation.delta(reason="length") if token is None else generation.accept(token)
        except Exception:
            logger.exception("request %s: its text cannot be made", generation.run.request.request_id)
            error = "internal error while making the text"
            self.finish(generation, generation.delta(reason="error", error=error))
            self.fail(generation, error)
            return
        if delta.finish_reason is None:
            self.deliver(generation, delta)
        else:
            self.finish(generation, delta)

    def fail(self, generation: Generation, message: str, *, forget: bool = False) -> None:
        """Ends the whole request of a sequence with an error."""
        self.end(generation.run, "error", message, forget=forget)

    def end(
        self, run: RequestRun, reason: FinishReason, error: str | None = None, *, forget: bool = False
    ) -> None:
        """Ends all open sequences of a request, also those that have not begun, once what they had is told.

        With `forget`, none of their blocks is found again: what they hold may be damaged.
        """
        self.tell(lambda generation: generation.run is run)
        for index in range(len(run.generations), run.request.n):
            seq = scheduler.Sequence(
                arrival=run.arrival,
                index=index,
                token_ids=list(run.request.input_ids),
                status=Status.FINISHED,
            )
            self.begin(run, seq)
        for generation in run.generations:
            if generation in self:
                self.finish(generation, generation.delta(reason=reason, error=error), forget=forget)

    def finish(self, generation: Generation, delta: Delta, *, forget: bool = False) -> None:
        """Gives back everything a sequence holds, if it has not yet, and delivers its last delta."""
        assert delta.finish_reason is not None
        assert delta.usage is not None
        if generation in self:
            self._close(generation, forget)
        run = generation.run
        run.num_open -= 1
        self.num_finished += 1
        if self.recycler is not None:
            self.recycler.keep_result(generation, delta)
        seconds = time.monotonic() - run.submitted_at
        self.observer.on_sequence_finished(run.request, delta.finish_reason, delta.usage, seconds)
        self.deliver(generation, delta)

    def deliver(self, generation: Generation, delta: Delta) -> None:
        """Tells the request's receiver; if that fails, the request is aborted."""
        try:
            generation.run.on_delta(delta)
        except Exception:
            logger.exception("request %s: its receiver failed", generation.run.request.request_id)
            if delta.finish_reason is None:
                self.end(generation.run, "abort")

    def _close(self, generation: Generation, forget: bool = False) -> None:
        del self.by_seq[generation.seq]
        self.waits.forget(generation)
        if not self.by_seq:
            self.waits.clear()
        self._overlay.forget_batch()
        if self.recycler is not None:
            self.recycler.forget(generation)
        if generation.rows is not None:
            generation.rows.cancel()
        if generation.seq.status is not Status.FINISHED:
            scheduler.finish(self._state, generation.seq, forget=forget)
