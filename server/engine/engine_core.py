"""One step after the other: schedule, prepare inputs, forward, sample, match, deliver.

Single-threaded and without a clock of its own to obey: `Engine` runs it on a thread, tests step it.
What goes wrong with one request (rows that cannot be read, logits that are not finite, a callback
that raises) ends that request alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scone.cache.device import Device
from scone.cache.errors import RowReadError
from scone.cache.recycle_cost import RecycleCost
from scone.cache.recycled_store import RecycledStore
from scone.cache.state_identity import StateIdentity
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine import scheduler
from scone.server.engine.block_restorer import Post
from scone.server.engine.detokenizer import Detokenizer, TokenBytes
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.generation import Generation, RequestRun
from scone.server.engine.head import sample_tokens, score_prompt
from scone.server.engine.input_rows import InputRows, SequenceRows
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.model_runner import BlockMemory, Runner
from scone.server.engine.observer import EngineObserver, step_stats
from scone.server.engine.pooling import Pooler
from scone.server.engine.recycler import Found, Recycler
from scone.server.engine.row_overlay import RowOverlay, staging_device
from scone.server.engine.row_waits import RowWaits
from scone.server.engine.sampler import SamplerState
from scone.server.engine.scheduler import Chunk, Schedule, SchedulerState, Status
from scone.server.sequence import Delta, FinishReason

logger = logging.getLogger(__name__)


class EngineCore:
    """All requests under way, and the step that advances them."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        tokenizer: Tokenizer,
        model_hash: str,
        observer: EngineObserver,
        device: Device | None = None,
    ) -> None:
        """`device` stages rows for the runner; without one, the runner's own."""
        self.config = config
        self.observer = observer
        self.overlay = RowOverlay(
            device or staging_device(runner.device), config.max_num_batched_tokens, runner.dim, runner.dtype
        )
        self._runner = runner
        self._token_bytes = TokenBytes(tokenizer)
        self._tokenizer = tokenizer
        self._model_hash = model_hash
        self.state = SchedulerState(
            pool=BlockPool(runner.num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
        )
        self._generations: dict[scheduler.Sequence, Generation] = {}
        self._step_seconds = 0.0  # of the last step, without waiting for rows
        self._row_waits = RowWaits()
        self.recycler: Recycler | None = None

    def recycle(
        self, store: RecycledStore, cost: RecycleCost, memory: BlockMemory, num_layers: int, post: Post
    ) -> None:
        """Fetches from `store` what it holds instead of computing it; to be called before the first request.

        `memory` is the runner's KV cache; `post` has something run between two steps, from any thread.
        """
        self.recycler = Recycler(
            store,
            cost,
            memory,
            self.overlay.device,
            self.state,
            num_layers,
            post,
            lambda: self.observer,
            self._recall,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._generations)

    def add(self, run: RequestRun) -> None:
        """Queues a request: matches its prompt and begins to read its rows."""
        request = run.request
        if request.sampling.prompt_logprobs is not None:
            run.prompt_logprobs = [None] * len(request.input_ids)
        run.root = self._identity(run.input_rows).root(request.cache_salt)
        # Blocks of a shallow forward pass hold only some layers' keys and values: they get no name.
        names_blocks = self.config.enable_prefix_caching and run.num_layers is None
        seq = scheduler.Sequence(
            arrival=run.arrival,
            index=0,
            token_ids=list(request.input_ids),
            root_hash=run.root if names_blocks else b"",
            reuse_prefix=not run.needs_all_positions,
        )
        generation = self._begin(run, seq)
        scheduler.add(self.state, seq)
        if run.input_rows is not None:
            try:
                generation.rows = run.input_rows.match(request.input_ids)
                self._row_waits.note(generation)
            except RowReadError as error:
                self._fail(generation, str(error))
            except Exception:
                logger.exception("request %s: its prompt cannot be matched", request.request_id)
                self._fail(generation, "internal error while matching the prompt")
        if self.recycler is not None and generation.seq in self._generations:
            self.recycler.look_up(generation)

    def abort(self, run: RequestRun) -> None:
        """Ends a request in whatever state; its sequences get a last delta with reason `abort`."""
        self._end(run, "abort")

    def step(self) -> bool:
        """Advances whatever can be; false if nothing could, for want of requests or of rows."""
        began = time.monotonic()
        if self.recycler is not None:
            self.recycler.poll(self._step_seconds)
        self._stage_waiting()
        self._row_waits.poll()
        self._row_waits.wait(len(self.state.running), self._step_seconds)
        schedule = scheduler.schedule(self.state)
        self._settle(schedule)
        chunks = schedule.chunks
        if chunks:
            try:
                advanced = time.monotonic()
                with torch.inference_mode():
                    self._advance(chunks)
                self._step_seconds = time.monotonic() - advanced
                if self.recycler is not None:
                    self.recycler.note_speed(chunks, self._step_seconds)
            except Exception:
                logger.exception("a step over %d sequences failed; they are ended", len(chunks))
                for chunk in chunks:
                    self._fail(self._generations.get(chunk.seq), "internal error while computing this step")
        self._report(schedule, time.monotonic() - began)
        return bool(chunks)

    # -- before the forward pass ---------------------------------------------------------------

    def _stage_waiting(self) -> None:
        """Issues the reads of waiting requests, oldest first, within `max_num_staged_tokens`."""
        num_staged = 0
        for seq in list(self.state.waiting):
            num_staged += len(seq.token_ids)
            generation = self._generations[seq]
            if seq.num_stored_blocks is None:  # it may turn out to need none
                continue
            if generation.rows is not None and generation.rows.staged_from is None:
                num_blocks = max(len(scheduler.cached_blocks(self.state, seq)), seq.num_stored_blocks)
                self._stage(generation, num_blocks * self.config.block_size)
            if num_staged >= self.config.max_num_staged_tokens:
                return

    def _stage(self, generation: Generation, start: int) -> None:
        if generation.input_rows is not None and generation.run.input_rows is not None:
            try:
                generation.run.input_rows.stage(generation.input_rows, start)
                self._row_waits.note(generation)
            except Exception:
                logger.exception(
                    "request %s: its rows cannot be asked for", generation.run.request.request_id
                )
                self._fail(generation, "internal error while asking for f-gram rows")

    def _settle(self, schedule: Schedule) -> None:
        """Follows up what the scheduler decided: reads to give up, reads to issue, times to note."""
        now = time.monotonic()
        for seq in schedule.preempted:
            generation = self._generations[seq]
            if generation.rows is not None:
                generation.rows.cancel()
                self._row_waits.note(generation)
        if self.recycler is not None:
            self.recycler.follow(schedule, self._generations)
        for seq in schedule.starved:
            generation = self._generations[seq]
            if generation.starved_since is None:
                generation.starved_since = now
            self._stage(generation, seq.num_computed_tokens)
        for chunk in schedule.chunks:
            generation = self._generations[chunk.seq]
            if generation.run.started_at is None:
                generation.run.started_at = now
            if generation.starved_since is not None:
                self.observer.on_rows_waited(now - generation.starved_since)
                generation.starved_since = None

    def _embed(self, chunks: list[Chunk]) -> tuple[list[Chunk], Tensor]:
        """Input embeddings with rows in place; requests whose rows cannot be read are ended."""
        rows = self._rows_of(chunks)
        if self._row_waits.has_read and any([r is not None and r.reads for r in rows]):
            chunks = self._end_unreadable(chunks, self._read_error)
            rows = self._rows_of(chunks)
        while chunks:
            embeddings = self._runner.embed(chunks)
            try:
                self.overlay.lay(rows, chunks, embeddings)
                if self.recycler is not None:
                    runs = [self._generations[chunk.seq].run for chunk in chunks]
                    self.overlay.lay_states([run.states for run in runs], chunks, embeddings)
                return chunks, embeddings
            except RowReadError as error:  # a row in memory is damaged: find out whose
                readable = self._end_unreadable(chunks, self._gather_error)
                if len(readable) == len(chunks):
                    raise RowReadError(f"rows cannot be read together: {error}") from None
                chunks, rows = readable, self._rows_of(readable)
        return [], torch.empty(0)

    def _rows_of(self, chunks: Sequence[Chunk]) -> list[SequenceRows | None]:
        return [self._generations[chunk.seq].input_rows for chunk in chunks]

    def _end_unreadable(
        self, chunks: list[Chunk], error_of: Callable[[Generation, Chunk], RowReadError | None]
    ) -> list[Chunk]:
        """Ends the requests whose rows cannot be read; returns the others' chunks."""
        for chunk in chunks:
            generation = self._generations.get(chunk.seq)
            if generation is not None and (error := error_of(generation, chunk)) is not None:
                self._fail(generation, str(error))
        return [chunk for chunk in chunks if chunk.seq.status is Status.RUNNING]

    def _read_error(self, generation: Generation, chunk: Chunk) -> RowReadError | None:
        rows = generation.rows
        return None if rows is None else rows.error(chunk.start, chunk.start + chunk.num_tokens)

    def _gather_error(self, generation: Generation, chunk: Chunk) -> RowReadError | None:
        rows = generation.rows
        return None if rows is None else rows.source.gather_error(rows, chunk)

    # -- the step ------------------------------------------------------------------------------

    def _advance(self, chunks: list[Chunk]) -> None:
        chunks, embeddings = self._embed(chunks)
        if not chunks:
            return
        ranges = [self._generations[c.seq].run.layers for c in chunks]
        parts = self._runner.forward_each(chunks, embeddings, ranges)
        sampling: list[tuple[Generation, Tensor]] = []
        for chunk, part in zip(chunks, parts, strict=True):
            generation = self._generations[chunk.seq]
            scheduler.commit(self.state, chunk)
            if num_new := generation.run.count_prompt_tokens(chunk.seq.num_computed_tokens):
                self.observer.on_prompt_tokens(num_new)
            if self._row_waits.has_read and generation.rows is not None:
                generation.rows.drop_before(chunk.seq.num_computed_tokens)
            if self.recycler is not None and chunk.start < len(generation.run.request.input_ids):
                self.recycler.keep(generation, chunk, part)
            if generation.needs_prompt_logits:
                score_prompt(self._runner, generation.run, chunk, part)
            if generation.run.pooler is not None:
                self._pool(generation, generation.run.pooler, chunk, part)
            elif chunk.reaches_end:
                sampling += [(g, part[-1]) for g in self._fork(generation)]
        self._sample(sampling)

    def _pool(self, generation: Generation, pooler: Pooler, chunk: Chunk, hidden: Tensor) -> None:
        pooler.add(chunk.start, hidden)
        if not chunk.reaches_end:
            return
        embedding = pooler.result()
        if not np.isfinite(embedding).all():
            self._fail(generation, "the model's output is not finite", forget=True)
            return
        self._close(generation)
        self._finish(generation, replace(generation.delta(reason="stop"), embedding=embedding))

    def _fork(self, generation: Generation) -> list[Generation]:
        """The sequences to sample from this one's logits: itself and, the first time, its siblings."""
        run = generation.run
        generation.seq.reuse_prefix = True  # the prompt is scored: from now on cached blocks will do
        if len(run.generations) == run.request.n:
            return [generation]
        started = [generation]
        copies: list[tuple[int, int]] = []
        for index in range(1, run.request.n):
            seq = scheduler.Sequence(
                arrival=run.arrival,
                index=index,
                token_ids=list(run.request.input_ids),
                root_hash=generation.seq.root_hash,
                num_cached_tokens=generation.seq.num_cached_tokens,
            )
            sibling = self._begin(run, seq)
            sibling.rows = None if generation.rows is None else generation.rows.fork()
            blocks = scheduler.fork(self.state, generation.seq, seq)
            if blocks is not None:
                copies += blocks
                started.append(sibling)
            elif sibling.rows is not None:
                sibling.rows.cancel()  # it computes the prompt itself
            self._row_waits.note(sibling)
        self._runner.copy_blocks(copies)
        return started

    def _sample(self, sampling: list[tuple[Generation, Tensor]]) -> None:
        finished: list[tuple[Generation, Delta]] = []
        deltas: list[tuple[Generation, Delta]] = []
        wanted = []
        for generation, hidden in sampling:
            if generation.run.request.sampling.max_tokens == 0:
                finished.append((generation, generation.delta(reason="length")))
            else:
                wanted.append((generation, hidden))
        tokens = sample_tokens(self._runner, [(g.sampler, hidden) for g, hidden in wanted])
        now = time.monotonic()
        for (generation, _), token in zip(wanted, tokens, strict=True):
            if token.token_id is None and generation.seq in self._generations:
                self._fail(generation, "the model's output is not finite", forget=True)
        for (generation, _), token in zip(wanted, tokens, strict=True):
            if generation.seq in self._generations:  # neither it nor a sibling has failed
                generation.note_token_time(now, self.observer)
                delta = generation.accept(token)
                (deltas if delta.finish_reason is None else finished).append((generation, delta))
        # The reads are issued first: they go on while the deltas are delivered.
        self._extend_rows([g for g, _ in deltas])
        for generation, delta in finished:
            if generation.seq in self._generations:
                self._close(generation)
                self._finish(generation, delta)
        for generation, delta in deltas:
            if generation.seq in self._generations:  # no receiver of a sibling has failed
                self._deliver(generation, delta)

    def _extend_rows(self, generations: Sequence[Generation]) -> None:
        """Matches the newest tokens and asks for their rows: one match and one read per table.

        Rows in memory need not be asked for: they are matched when a step lays them.
        """
        for source in {g.run.input_rows for g in generations}:
            if source is not None and source.reads_ahead:
                group = [g for g in generations if g.run.input_rows is source]
                try:
                    self._extend_group(source, group)
                except RowReadError:  # some page of the index is damaged: find out whose
                    for generation in group:
                        self._extend_alone(source, generation)

    def _extend_group(self, source: InputRows, group: Sequence[Generation]) -> None:
        rows = [g.rows for g in group if g.rows is not None]
        if source.extend(rows, [g.seq.token_ids for g in group]):
            for generation in group:
                self._row_waits.note(generation)

    def _extend_alone(self, source: InputRows, generation: Generation) -> None:
        try:
            self._extend_group(source, [generation])
        except RowReadError as error:
            self._fail(generation, str(error))

    # -- ends ----------------------------------------------------------------------------------

    def _fail(self, generation: Generation | None, message: str, *, forget: bool = False) -> None:
        """Ends the whole request of a sequence with an error."""
        if generation is not None:
            self._end(generation.run, "error", message, forget=forget)

    def _end(
        self, run: RequestRun, reason: FinishReason, error: str | None = None, *, forget: bool = False
    ) -> None:
        """Ends all open sequences of a request, also those that have not begun."""
        for index in range(len(run.generations), run.request.n):
            seq = scheduler.Sequence(
                arrival=run.arrival,
                index=index,
                token_ids=list(run.request.input_ids),
                status=Status.FINISHED,
            )
            self._begin(run, seq)
        for generation in run.generations:
            if generation.seq in self._generations:
                self._close(generation, forget=forget)
                self._finish(generation, generation.delta(reason=reason, error=error))

    def _close(self, generation: Generation, *, forget: bool = False) -> None:
        """Gives back everything a sequence holds."""
        del self._generations[generation.seq]
        self._row_waits.forget(generation)
        self.overlay.forget_batch()
        if self.recycler is not None:
            self.recycler.forget(generation)
        if generation.rows is not None:
            generation.rows.cancel()
        if generation.seq.status is not Status.FINISHED:
            scheduler.finish(self.state, generation.seq, forget=forget)

    def _finish(self, generation: Generation, delta: Delta) -> None:
        assert delta.finish_reason is not None
        assert delta.usage is not None
        run = generation.run
        run.num_open -= 1
        if self.recycler is not None:
            self.recycler.keep_result(generation, delta)
        seconds = time.monotonic() - run.submitted_at
        self.observer.on_sequence_finished(run.request, delta.finish_reason, delta.usage, seconds)
        self._deliver(generation, delta)

    def _deliver(self, generation: Generation, delta: Delta) -> None:
        try:
            generation.run.on_delta(delta)
        except Exception:
            logger.exception("request %s: its receiver failed", generation.run.request.request_id)
            if delta.finish_reason is None:
                self._end(generation.run, "abort")

    # -- recycled states -----------------------------------------------------------------------

    def _identity(self, input_rows: InputRows | None) -> StateIdentity:
        """What the states of a request with these rows depend on, besides its token ids and salt."""
        return replace(
            self._runner.state_identity,
            model_hash=self._model_hash,
            tokenizer_hash=self._tokenizer.hash,
            table_id="" if input_rows is None else input_rows.table_id,
            row_codec="" if input_rows is None else input_rows.row_codec,
        )

    def _recall(self, generation: Generation, found: Found) -> None:
        """Puts to use what a look-up has found for a waiting sequence."""
        run = generation.run
        if found.result is not None:
            run.is_recalled = True
            run.started_at = time.monotonic()
            if num_new := run.count_prompt_tokens(len(run.request.input_ids)):
                self.observer.on_prompt_tokens(num_new)
            generation.num_generated = len(found.result.token_ids)
            if generation.num_generated:
                generation.note_token_time(run.started_at, self.observer)
            self._close(generation)
            self._finish(generation, found.result.delta(generation.usage()))
        elif found.states is not None:
            run.first_layer, run.states = found.layer, found.states
            self._row_waits.note(generation)

    # -- small parts ---------------------------------------------------------------------------

    def _begin(self, run: RequestRun, seq: scheduler.Sequence) -> Generation:
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
            max_model_len=self.config.max_model_len,
        )
        run.generations.append(generation)
        self._generations[seq] = generation
        self._row_waits.note(generation)
        return generation

    def _report(self, schedule: Schedule, seconds: float) -> None:
        if not schedule.chunks and not schedule.preempted:
            return
        self.observer.on_step(step_stats(self.state, schedule, seconds))
