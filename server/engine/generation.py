"""A request under way: its sequences, what each has generated, and when each ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from scone.server.engine import scheduler
from scone.server.engine.detokenizer import Detokenizer
from scone.server.engine.input_rows import InputRows, SequenceRows
from scone.server.engine.layer_range import ALL_LAYERS, LayerRange
from scone.server.engine.layer_states import LayerStates
from scone.server.engine.pooling import Pooler
from scone.server.engine.sampler import SampledToken, SamplerState
from scone.server.sequence import Delta, FinishReason, GenerationRequest, RequestUsage, TokenLogprob

OnDelta = Callable[[Delta], None]
_Ending = tuple[FinishReason | None, str | int | None]
"""Why a sequence ends, and which stop string or token did it."""


@dataclass(eq=False, slots=True)
class RequestRun:
    """One request: what its sequences share.

    Attributes:
        input_rows: the table generation it began with and keeps; None without a table.
        prompt_logprobs: by prompt position, filled while the prompt is computed; None if not wanted.
        generations: the sequences that have begun; the first one computes the prompt for all `n`.
        pooler: makes the one vector of a request with `pooling`, else None.
        num_open: sequences that have not had their last delta.
        num_counted_tokens: prompt tokens that the observer has been told of.
        root: names model, table and salt: what names of states are chained to (`StateIdentity.root`).
        first_layer, states: the forward pass begins after so many layers, from these states
            (num_tokens, dim) on the host; None: from the embeddings.
        layer_states: collects those that are to be kept.
        is_recalled: whether the answer is a stored one.
    """

    request: GenerationRequest
    on_delta: OnDelta
    arrival: int
    submitted_at: float
    input_rows: InputRows | None
    started_at: float | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    generations: list[Generation] = field(default_factory=list)
    pooler: Pooler | None = None
    num_open: int = 0
    num_counted_tokens: int = 0
    root: bytes = b""
    first_layer: int = 0
    states: Tensor | None = None
    layer_states: LayerStates | None = None
    is_recalled: bool = False

    def __post_init__(self) -> None:
        self.num_open = self.request.n
        if self.request.pooling is not None:
            self.pooler = Pooler(self.request.pooling)

    @property
    def num_layers(self) -> int | None:
        """How deep the request's forward pass goes; None is all the way."""
        return None if self.request.pooling is None else self.request.pooling.layer

    @property
    def layers(self) -> LayerRange:
        """Those that the request's forward pass goes through."""
        if self.first_layer == 0 and self.request.pooling is None:
            return ALL_LAYERS
        return LayerRange(self.first_layer, self.num_layers)

    @property
    def needs_all_positions(self) -> bool:
        """Whether the states of the whole prompt are wanted, so that none may come from the cache."""
        pooling = self.request.pooling
        return self.prompt_logprobs is not None or (pooling is not None and pooling.kind == "mean")

    def count_prompt_tokens(self, num_computed_tokens: int) -> int:
        """How many are new; not those that a preempted sequence or a sibling computes again."""
        num_new = max(0, min(num_computed_tokens, len(self.request.input_ids)) - self.num_counted_tokens)
        self.num_counted_tokens += num_new
        return num_new

    @property
    def is_over(self) -> bool:
        """Whether every sequence has had its last delta."""
        return self.num_open == 0


@dataclass(eq=False, slots=True)
class Generation:
    """One sequence of a request."""

    run: RequestRun
    seq: scheduler.Sequence
    sampler: SamplerState
    detokenizer: Detokenizer
    eos_ids: Sequence[int]
    max_model_len: int
    rows: SequenceRows | None = None
    num_generated: int = 0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    starved_since: float | None = None
    was_awaited: bool = False
    is_first_delta: bool = True
    num_kept_blocks: int = 0
    _ending: _Ending = (None, None)
    _final_ids: frozenset[int] = field(init=False)
    _max_generated: int = field(init=False)

    def __post_init__(self) -> None:
        request = self.run.request
        self._final_ids = frozenset(request.sampling.final_ids(self.eos_ids))
        room = self.max_model_len - len(request.input_ids)
        self._max_generated = min(request.sampling.max_tokens, room)

    @property
    def input_rows(self) -> SequenceRows | None:
        """The rows that its inputs need: none where the states above the inputs are known."""
        return self.rows if self.run.states is None else None

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether prompt positions are still to be scored, so that none may come from the cache."""
        return self.run.prompt_logprobs is not None and self.num_generated == 0 and self.seq.index == 0

    @property
    def is_ending(self) -> bool:
        """Whether the token appended last ends the sequence, whatever its text is."""
        return self._ending[0] is not None

    def append(self, token: SampledToken) -> bool:
        """Appends a sampled token; whether the sequence goes on, unless its text ends it."""
        token_id = token.token_id
        assert token_id is not None
        self.seq.token_ids.append(token_id)
        self.sampler.append(token_id)
        self.num_generated += 1
        if token_id not in self._final_ids and self.num_generated < self._max_generated:
            return True
        self._ending = self._end_after(token_id)
        return False

    def accept(self, token: SampledToken) -> Delta:
        """The delta of the token appended last; it has a finish reason if that was the last one."""
        assert token.token_id is not None
        params = self.run.request.sampling
        reason, stop_reason = self._ending
        may_stop = self.num_generated >= params.min_tokens
        if reason == "stop" and not params.include_stop_str_in_output:
            text = ""
        else:
            text = self.detokenizer.append(token.token_id, may_stop=may_stop)
        if self.detokenizer.stop_string is not None:
            reason, stop_reason = "stop", self.detokenizer.stop_string
        if reason is not None:
            text += self.detokenizer.finish()
        logprobs = None if token.logprob is None else (token.logprob,)
        return self.delta(text, (token.token_id,), logprobs, reason, stop_reason)

    def _end_after(self, token_id: int) -> _Ending:
        """Why the sequence ends with this token, just appended, whatever its text is."""
        if token_id in self.run.request.sampling.stop_token_ids:
            return "stop", token_id
        return ("stop", None) if token_id in self._final_ids else ("length", None)

    def note_token_time(self, now: float) -> float | None:
        """A token came; the seconds since the one before it, None for the first."""
        last, self.last_token_at = self.last_token_at, now
        if self.first_token_at is None:
            self.first_token_at = now
            return None
        return now - last

    def delta(
        self,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> Delta:
        """The sequence's next delta; the first carries the prompt's log-probabilities, the last the usage."""
        prompt_logprobs = None
        if self.is_first_delta and self.run.prompt_logprobs is not None and error is None:
            prompt_logprobs = tuple(self.run.prompt_logprobs)
        self.is_first_delta = False
        return Delta(
            index=self.seq.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=None if reason is None else self.usage(),
            error=error,
        )

    def usage(self) -> RequestUsage:
        """What the sequence has cost so far."""
        run, rows, table = self.run, self.rows, self.run.input_rows
        num_inputs = len(run.request.input_ids) + max(0, self.num_generated - 1)
        started_at = run.started_at if run.started_at is not None else time.monotonic()
        first_at = self.first_token_at
        return RequestUsage(
            num_prompt_tokens=len(run.request.input_ids),
            num_generated_tokens=self.num_generated,
            num_cached_tokens=self._num_cached_tokens(),
            num_matched_tokens=0 if rows is None else rows.num_matched(num_inputs),
            rows_by_tier={} if rows is None or table is None else table.count_tiers(rows, num_inputs),
            queue_seconds=started_at - run.submitted_at,
            time_to_first_token_seconds=0.0 if first_at is None else first_at - run.submitted_at,
        )

    def _num_cached_tokens(self) -> int:
        num_prompt_tokens = len(self.run.request.input_ids)
        return (
            num_prompt_tokens if self.run.is_recalled else min(self.seq.num_cached_tokens, num_prompt_tokens)
        )
