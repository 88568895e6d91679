"""What requests change of the model's logits before a token is chosen: bias, minimum length, penalties.

A sequence keeps one entry a token that is changed, and the entries of a step's sequences are laid over its
logits together: it takes as long for many sequences as for one, and nothing is copied but their values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.server.engine.batch_draw import to_device
from scone.server.sequence import SamplingParams


class LogitEdits:
    """One sequence's. A logit x becomes y = x + bias, then y / repetition (y * repetition, if that is not
    positive), then loses its offset: the presence penalty, and the frequency penalty once for each time that
    the token was generated. Repetition is of prompt and generated tokens, and of others 1.

    Attributes:
        num_generated: tokens so far.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], final_ids: Sequence[int]) -> None:
        """`final_ids` may not be chosen before `min_tokens` are generated."""
        self.num_generated = 0
        self._params = params
        self._final_ids = final_ids if params.min_tokens > 0 else ()
        self._has_penalty = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._places: dict[int, int] = {}
        self._token_ids = np.empty(16, np.int64)
        self._values = np.empty((16, 3), np.float32)  # bias, repetition, offset
        self._counts: Counter[int] = Counter()
        for token_id, bias in params.logit_bias.items():
            self._entry(token_id)[0] = bias
        for token_id in self._final_ids:
            self._entry(token_id)[0] = -np.inf
        if params.repetition_penalty != 1.0:
            for token_id in prompt_ids:
                self._entry(token_id)[1] = params.repetition_penalty

    def __len__(self) -> int:
        return len(self._places)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """(num_entries,): view, valid until `append`."""
        return self._token_ids[: len(self)]

    @property
    def values(self) -> NDArray[np.float32]:
        """(num_entries, 3): bias, repetition, offset; view, valid until `append`."""
        return self._values[: len(self)]

    def append(self, token_id: int) -> None:
        """Counts a token that was generated."""
        params = self._params
        self.num_generated += 1
        if self._final_ids and self.num_generated == params.min_tokens:
            self._allow_end()
        if self._has_penalty:
            self._counts[token_id] += 1
            offset = params.presence_penalty + params.frequency_penalty * self._counts[token_id]
            self._entry(token_id)[1:] = params.repetition_penalty, offset

    def _allow_end(self) -> None:
        for token_id in self._final_ids:
            self._entry(token_id)[0] = self._params.logit_bias.get(token_id, 0.0)
        if not (self._has_penalty or self._params.logit_bias):
            self._places.clear()

    def _entry(self, token_id: int) -> NDArray[np.float32]:
        """(3,): the token's bias, repetition and offset, which are made if there are none."""
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, self._token_ids])
                self._values = np.concatenate([self._values, self._values])
            self._token_ids[place] = token_id
            self._values[place] = 0.0, 1.0, 0.0
        entry: NDArray[np.float32] = self._values[place]
        return entry


class EditedLogits:
    """Logits (num_seqs, vocab) with each row's edits laid over them, in place, until `restore`."""

    def __init__(self, logits: Tensor, edits: Sequence[LogitEdits]) -> None:
        """Rows that are not finite are not afterwards either: a NaN stays one."""
        rows = [(row, e) for row, e in enumerate(edits) if len(e)]
        self._is_edited = bool(rows)
        if not rows:
            return
        vocab_size = logits.shape[1]
        places: Any = np.concatenate([e.token_ids + row * vocab_size for row, e in rows])
        values: Any = np.concatenate([e.values for _, e in rows])
        self._logits: Any = logits.view(-1)
        if logits.is_cuda:
            places, values = (to_device(torch.from_numpy(x), logits.device) for x in (places, values))
        else:  # in NumPy: torch's threads take longer to meet than all of this
            self._logits = self._logits.numpy()
        self._places = places
        self._former = self._logits[places]
        bias, repetition, offset = values.T
        biased = self._former + bias
        edited = biased.clip(0, None) / repetition + biased.clip(None, 0) * repetition - offset
        self._logits[places] = edited

    def restore(self) -> None:
        """Gives the logits the values that they had."""
        if self._is_edited:
            self._logits[self._places] = self._former
