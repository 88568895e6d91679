"""A step's input embeddings: rows asked for ahead of it, laid over the token embeddings in it.

What goes wrong with a sequence's rows ends its request, and nobody else's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.server.engine import scheduler
from scone.server.engine.generation import Generation
from scone.server.engine.input_rows import InputRows, SequenceRows
from scone.server.engine.model_runner import Runner
from scone.server.engine.open_sequences import OpenSequences
from scone.server.engine.row_overlay import RowOverlay
from scone.server.engine.scheduler import Chunk, SchedulerState, Status

logger = logging.getLogger(__name__)


class InputStage:
    """From token ids to what the first layer gets."""

    def __init__(self, runner: Runner, overlay: RowOverlay, sequences: OpenSequences) -> None:
        self._runner = runner
        self._overlay = overlay
        self._sequences = sequences

    # -- ahead of the step -----------------------------------------------------------------------

    def match(self, generation: Generation) -> None:
        """Matches the prompt of a new request."""
        run = generation.run
        if run.input_rows is None:
            return
        try:
            generation.rows = run.input_rows.match(run.request.input_ids)
            self._sequences.waits.note(generation)
        except RowReadError as error:
            self._sequences.fail(generation, str(error))
        except Exception:
            logger.exception("request %s: its prompt cannot be matched", run.request.request_id)
            self._sequences.fail(generation, "internal error while matching the prompt")

    def stage_waiting(self, state: SchedulerState, max_num_staged_tokens: int) -> None:
        """Issues the reads of waiting requests, oldest first, for so many tokens."""
        num_staged = 0
        for seq in list(state.waiting):
            num_staged += len(seq.token_ids)
            generation = self._sequences.by_seq[seq]
            if seq.num_stored_blocks is None:  # it may turn out to need none
                continue
            if generation.rows is not None and generation.rows.staged_from is None:
                num_blocks = max(len(scheduler.cached_blocks(state, seq)), seq.num_stored_blocks)
                self.stage(generation, num_blocks * state.pool.block_size)
            if num_staged >= max_num_staged_tokens:
                return

    def stage(self, generation: Generation, start: int) -> None:
        """Issues the reads of a sequence's inputs from `start` on."""
        if generation.input_rows is None or generation.run.input_rows is None:
            return
        try:
            generation.run.input_rows.stage(generation.input_rows, start)
            self._sequences.waits.note(generation)
        except Exception:
            logger.exception("request %s: its rows cannot be asked for", generation.run.request.request_id)
            self._sequences.fail(generation, "internal error while asking for f-gram rows")

    def extend(self, generations: Sequence[Generation]) -> None:
        """Matches the newest tokens and asks for their rows: one match and one read per table.

        Rows in memory need not be asked for: they are matched when a step lays them.
        """
        for source in {g.run.input_rows for g in generations}:
            if source is not None and not source.table.never_waits:
                group = [g for g in generations if g.run.input_rows is source]
                try:
                    self._extend_group(source, group)
                except RowReadError:  # some page of the index is damaged: find out whose
                    for generation in group:
                        self._extend_alone(source, generation)

    def _extend_group(self, source: InputRows, group: Sequence[Generation]) -> None:
        rows = [g.rows for g in group if g.rows is not None]
        pending = source.extend(rows, [g.seq.token_ids for g in group])
        if pending is not None:
            self._sequences.waits.expect(pending, group)

    def _extend_alone(self, source: InputRows, generation: Generation) -> None:
        try:
            self._extend_group(source, [generation])
        except RowReadError as error:
            self._sequences.fail(generation, str(error))

    # -- in the step -----------------------------------------------------------------------------

    def embed(self, chunks: list[Chunk]) -> tuple[list[Chunk], Tensor]:
        """Input embeddings with rows in place; requests whose rows cannot be read are ended."""
        while chunks:
            rows = self._rows_of(chunks)
            embeddings = self._runner.embed(chunks)
            try:
                if not self._overlay.lay_newest(rows, chunks, embeddings):
                    readable = self._end_unread(rows, chunks)
                    if len(readable) < len(chunks):
                        chunks = readable
                        continue
                    self._overlay.lay(rows, chunks, embeddings)
                self._lay_states(chunks, embeddings)
                return chunks, embeddings
            except RowReadError as error:  # a row in memory is damaged: find out whose
                readable = self._end_unreadable(chunks, _gather_error)
                if len(readable) == len(chunks):
                    raise RowReadError(f"rows cannot be read together: {error}") from None
                chunks = readable
        return [], torch.empty(0)

    def _end_unread(self, rows: Sequence[SequenceRows | None], chunks: list[Chunk]) -> list[Chunk]:
        """Ends the requests whose rows could not be read ahead; returns the others' chunks."""
        if not self._sequences.waits.has_read or not any([r is not None and r.reads for r in rows]):
            return chunks
        return self._end_unreadable(chunks, _read_error)

    def _lay_states(self, chunks: Sequence[Chunk], embeddings: Tensor) -> None:
        if self._sequences.recycler is not None:
            runs = [self._sequences.by_seq[chunk.seq].run for chunk in chunks]
            self._overlay.lay_states([run.states for run in runs], chunks, embeddings)

    def _rows_of(self, chunks: Sequence[Chunk]) -> list[SequenceRows | None]:
        return [self._sequences.by_seq[chunk.seq].input_rows for chunk in chunks]

    def _end_unreadable(
        self, chunks: list[Chunk], error_of: Callable[[Generation, Chunk], RowReadError | None]
    ) -> list[Chunk]:
        """Ends the requests whose rows cannot be read; returns the others' chunks."""
        for chunk in chunks:
            generation = self._sequences.by_seq.get(chunk.seq)
            if generation is not None and (error := error_of(generation, chunk)) is not None:
                self._sequences.fail(generation, str(error))
        return [chunk for chunk in chunks if chunk.seq.status is Status.RUNNING]


def _read_error(generation: Generation, chunk: Chunk) -> RowReadError | None:
    rows = generation.rows
    return None if rows is None else rows.error(chunk.start, chunk.start + chunk.num_tokens)


def _gather_error(generation: Generation, chunk: Chunk) -> RowReadError | None:
    rows = generation.rows
    return None if rows is None else rows.source.gather_error(rows, chunk)
