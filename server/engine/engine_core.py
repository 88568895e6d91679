"""One step after the other: schedule, prepare inputs, forward, sample, match, deliver.

Where a device computes beside the host, a step is delivered while the next one runs: it ends where its tokens
are known, with what the next one needs to know of them. A stop string is found that much later, when its
sequence is in the next step already; what that makes of it is dropped.

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

from scone.cache.device import Device, Stream
from scone.cache.recycle_cost import RecycleCost
from scone.cache.recycled_store import RecycledStore
from scone.cache.state_identity import StateIdentity
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine import scheduler
from scone.server.engine.block_forms import open_forms
from scone.server.engine.block_restorer import Post
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.generation import Generation, RequestRun
from scone.server.engine.head import sample_tokens, score_prompt
from scone.server.engine.input_rows import InputRows
from scone.server.engine.input_stage import InputStage
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.model_runner import RecycledMemory, Runner
from scone.server.engine.observer import EngineObserver, step_stats
from scone.server.engine.open_sequences import OpenSequences
from scone.server.engine.pooling import Pooler
from scone.server.engine.recycler import Found, Recycler
from scone.server.engine.row_overlay import RowOverlay, staging_device
from scone.server.engine.sampler import SampledToken
from scone.server.engine.scheduler import Chunk, Schedule, SchedulerState
from scone.server.engine.step_clock import StepClock

logger = logging.getLogger(__name__)


class EngineCore:
    """All requests under way, and the step that advances them.

    Attributes:
        clock: what the steps' time goes into.
        after_deliveries: called once for all that a step delivers.
    """

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
        self.overlay = RowOverlay(
            device or staging_device(runner.device), config.max_num_batched_tokens, runner.dim, runner.dtype
        )
        self._runner = runner
        self._tokenizer = tokenizer
        self._model_hash = model_hash
        self.state = SchedulerState(
            pool=BlockPool(runner.num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
        )
        self._sequences = OpenSequences(self.state, tokenizer, config.max_model_len, observer, self.overlay)
        self._inputs = InputStage(runner, self.overlay, self._sequences)
        self.clock = StepClock()
        self.after_deliveries: Callable[[], None] = lambda: None
        self._sampled = self.overlay.device.event()
        self._step_seconds = 0.0  # of the last step, without waiting for rows

    @property
    def observer(self) -> EngineObserver:
        return self._sequences.observer

    @observer.setter
    def observer(self, observer: EngineObserver) -> None:
        self._sequences.observer = observer

    @property
    def recycler(self) -> Recycler | None:
        """How states are fetched and kept; None: they are not."""
        return self._sequences.recycler

    def recycle(self, store: RecycledStore, cost: RecycleCost, memory: RecycledMemory, post: Post) -> None:
        """Fetches from `store` what it holds instead of computing it; to be called before the first request.

        `memory` is the runner; `post` has something run between two steps, from any thread. Raises
        SettingError.
        """
        forms = open_forms(
            self.config.recycled_blocks,
            memory,
            self.overlay.device,
            self.state.pool,
            store.measure_disk,
        )
        logger.info("recycled states: %s", forms.reason)
        self._sequences.recycler = Recycler(
            store,
            cost,
            forms,
            self.state,
            memory.num_layers,
            memory.dtype,
            post,
            lambda: self.observer,
            self._recall,
        )

    @property
    def num_finished(self) -> int:
        """Sequences that have ended, a counter."""
        return self._sequences.num_finished

    @property
    def has_work(self) -> bool:
        return bool(self._sequences.by_seq) or self._sequences.has_news

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
            wants_all_states=run.prompt_logprobs is not None or run.pooler is not None,
        )
        generation = self._sequences.begin(run, seq)
        scheduler.add(self.state, seq)
        self._inputs.match(generation)
        if self.recycler is not None and generation in self._sequences:
            self.recycler.look_up(generation)

    def abort(self, run: RequestRun) -> None:
        """Ends a request in whatever state; its sequences get a last delta with reason `abort`."""
        self._sequences.end(run, "abort")

    def step(self) -> bool:
        """Advances whatever can be; false if nothing could, for want of requests or of rows."""
        try:
            return self._step()
        finally:
            self.clock.leave()

    def _step(self) -> bool:
        began = time.monotonic()
        self.clock.enter("schedule")
        if self.recycler is not None:
            self.recycler.poll(self._step_seconds)
        self._inputs.stage_waiting(self.state, self.config.max_num_staged_tokens)
        if self._sequences.waits.expects_rows:
            self._deliver()  # the disk is slower than this
            self.clock.enter("rows")
            self._sequences.waits.poll()
            self._sequences.waits.wait(len(self.state.running), self._step_seconds)
            self.clock.enter("schedule")
        schedule = scheduler.schedule(self.state)
        self._settle(schedule)
        if schedule.chunks:
            self._compute(schedule.chunks)
        else:
            self._deliver()
        if schedule.chunks or schedule.preempted:
            self.observer.on_step(step_stats(self.state, schedule, time.monotonic() - began))
        return bool(schedule.chunks)

    def _settle(self, schedule: Schedule) -> None:
        """Follows up what the scheduler decided: reads to give up, reads to issue, times to note."""
        now = time.monotonic()
        generations = self._sequences.by_seq
        for seq in schedule.preempted:
            generation = generations[seq]
            if generation.rows is not None:
                generation.rows.cancel()
                self._sequences.waits.note(generation)
        if self.recycler is not None:
            self.recycler.follow(schedule, generations)
        for seq in schedule.starved:
            generation = generations[seq]
            if generation.starved_since is None:
                generation.starved_since = now
            self._inputs.stage(generation, seq.num_computed_tokens)
        for chunk in schedule.chunks:
            generation = generations[chunk.seq]
            if generation.run.started_at is None:
                generation.run.started_at = now
            if generation.starved_since is not None:
                self.observer.on_rows_waited(now - generation.starved_since)
                generation.starved_since = None

    def _compute(self, chunks: list[Chunk]) -> None:
        """Computes the chunks and what follows from them; an error ends their requests."""
        try:
            began = time.monotonic()
            with torch.inference_mode():
                self._advance(chunks)
            self._step_seconds = time.monotonic() - began
            if self.recycler is not None:
                self.recycler.note_speed(chunks, self._step_seconds)
        except Exception:
            logger.exception("a step over %d sequences failed; they are ended", len(chunks))
            for chunk in chunks:
                generation = self._sequences.by_seq.get(chunk.seq)
                if generation is not None:
                    self._sequences.fail(generation, "internal error while computing this step")

    def _advance(self, chunks: list[Chunk]) -> None:
        self.clock.enter("inputs")
        chunks, embeddings = self._inputs.embed(chunks)
        if not chunks:
            return
        self.clock.enter("forward")
        generations = [self._sequences.by_seq[chunk.seq] for chunk in chunks]
        if self.recycler is not None:
            self.recycler.expect(generations, chunks)
        hidden = self._runner.forward_each(chunks, embeddings, [g.run.layers for g in generations])
        self.clock.enter("sample")
        sampling: list[tuple[Generation, int]] = []
        end = 0
        for generation, chunk in zip(generations, chunks, strict=True):
            begin, end = end, end + chunk.num_tokens
            scheduler.commit(self.state, chunk)
            if self._sequences.waits.has_read and generation.rows is not None:
                generation.rows.drop_before(chunk.seq.num_computed_tokens)
            if chunk.start < len(generation.run.request.input_ids):
                self._commit_prompt(generation, chunk, hidden[begin:end])
            if generation.run.pooler is not None:
                self._pool(generation, generation.run.pooler, chunk, hidden[begin:end])
            elif chunk.reaches_end:
                if generation.num_generated:
                    sampling.append((generation, end - 1))
                else:
                    sampling += [(g, end - 1) for g in self._fork(generation)]
        self._sample(hidden, sampling)

    def _commit_prompt(self, generation: Generation, chunk: Chunk, hidden: Tensor) -> None:
        """Notes that a chunk of a prompt is computed: its hidden states are (num_tokens, dim)."""
        run = generation.run
        if num_new := run.count_prompt_tokens(chunk.seq.num_computed_tokens):
            self.observer.on_prompt_tokens(num_new)
        if self.recycler is not None:
            self.recycler.keep(generation, chunk, hidden)
        if generation.needs_prompt_logits:
            score_prompt(self._runner, run, chunk, hidden)

    def _pool(self, generation: Generation, pooler: Pooler, chunk: Chunk, hidden: Tensor) -> None:
        pooler.add(chunk.start, hidden)
        if not chunk.reaches_end:
            return
        embedding = pooler.result()
        if not np.isfinite(embedding).all():
            self._sequences.fail(generation, "the model's output is not finite", forget=True)
            return
        self._sequences.finish(generation, replace(generation.delta(reason="stop"), embedding=embedding))

    def _fork(self, generation: Generation) -> list[Generation]:
        """What to sample from the logits after a prompt: its sequence and, of the first one, siblings."""
        run = generation.run
        # The prompt is scored: from now on cached blocks will do, and the last token's state.
        generation.seq.reuse_prefix, generation.seq.wants_all_states = True, False
        started = [generation]
        if len(run.generations) == run.request.n:
            return started
        copies: list[tuple[int, int]] = []
        for index in range(1, run.request.n):
            seq = scheduler.Sequence(
                arrival=run.arrival,
                index=index,
                token_ids=list(run.request.input_ids),
                root_hash=generation.seq.root_hash,
                num_cached_tokens=generation.seq.num_cached_tokens,
                wants_all_states=False,
            )
            sibling = self._sequences.begin(run, seq)
            sibling.rows = None if generation.rows is None else generation.rows.fork()
            blocks = scheduler.fork(self.state, generation.seq, seq)
            if blocks is not None:
                copies += blocks
                started.append(sibling)
            elif sibling.rows is not None:
                sibling.rows.cancel()  # it computes the prompt itself
            self._sequences.waits.note(sibling)
        self._runner.copy_blocks(copies)
        return started

    def _sample(self, hidden: Tensor, sampling: list[tuple[Generation, int]]) -> None:
        """One token for each sequence, from its row of `hidden` (num_tokens, dim); ends those done."""
        silent = [g for g, _ in sampling if not g.num_generated and g.run.request.sampling.max_tokens == 0]
        wanted = [(g, row) for g, row in sampling if g not in silent] if silent else sampling
        read_tokens = sample_tokens(self._runner, hidden, [(g.sampler, row) for g, row in wanted])
        if wanted:
            self.overlay.device.record(self._sampled, Stream.COMPUTE)
        if self._runner.is_asynchronous:
            self._deliver()  # the former step's
        if wanted:
            self.clock.enter("device")
            self.overlay.device.synchronize(self._sampled)
        self.clock.enter("accept")
        self._accept([g for g, _ in wanted], read_tokens())
        for generation in silent:
            if generation in self._sequences:
                self._sequences.note(generation, None, time.monotonic())
        if not self._runner.is_asynchronous:
            self._deliver()
        elif self._sequences.has_first_news:  # clients wait for these
            self._deliver(lambda generation: generation.first_token_at is None)

    def _accept(self, generations: Sequence[Generation], tokens: Sequence[SampledToken]) -> None:
        """Appends each token and asks for its row; requests of which one was not drawn are ended."""
        now, is_open = time.monotonic(), self._sequences.by_seq
        if any([token.token_id is None for token in tokens]):
            self._end_undrawn(generations, tokens)
        # Those that a stop string has ended since this step was begun are not there any more.
        drawn = [(g, t) for g, t in zip(generations, tokens, strict=True) if g.seq in is_open]
        # The reads are issued first: they go on while text is made and delivered.
        self._inputs.extend([g for g, token in drawn if g.append(token)])
        for generation, token in drawn:
            if generation.seq in is_open:  # its f-gram could be looked for
                self._sequences.note(generation, token, now)

    def _end_undrawn(self, generations: Sequence[Generation], tokens: Sequence[SampledToken]) -> None:
        for generation, token in zip(generations, tokens, strict=True):
            if token.token_id is None:
                if generation in self._sequences:
                    self._sequences.fail(generation, "the model's output is not finite", forget=True)
                else:  # its blocks are given back
                    scheduler.forget_prefix(self.state, generation.seq)

    def _deliver(self, only: Callable[[Generation], bool] | None = None) -> None:
        """Tells receivers, of all sequences or of some, what they have not been told."""
        if self._sequences.has_news:
            self.clock.enter("deliver")
            self._sequences.tell(only)
            self.after_deliveries()

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
                generation.note_token_time(run.started_at)
                self.observer.on_first_token(run.request, run.started_at - run.submitted_at)
            self._sequences.finish(generation, found.result.delta(generation.usage()))
        elif found.states is not None:
            run.first_layer, run.states = found.layer, found.states
            generation.seq.root_hash = b""  # its blocks will lack the lower layers' keys and values
            self._sequences.waits.note(generation)
