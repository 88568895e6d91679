"""Token ids written to disk as they are made, so that they need no memory and a killed run can go on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scone.model_store.token_corpus import TokenCorpus

_IDENTITY_NAME, _TOKENS_NAME, _LENGTHS_NAME = "identity", "tokens.i32", "lengths.i64"


class TokenSpool:
    """A folder of growing files: token ids back to back, and each document's length.

    Lengths are written after their tokens, so that whatever a kill leaves, `num_documents` are whole.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Goes on with what a run of the same `identity` left in `folder`; empties it otherwise."""
        self._folder = folder
        self._tokens, self._lengths = folder / _TOKENS_NAME, folder / _LENGTHS_NAME
        description = folder / _IDENTITY_NAME
        if not description.exists() or description.read_text() != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            description.write_text(identity)
        self._tokens.touch()
        self._lengths.touch()
        self.num_documents = self._drop_torn_end()

    def append(self, documents: Sequence[Sequence[int]]) -> None:
        """Adds the token ids of the next documents."""
        tokens = [np.array(document, "<i4") for document in documents]
        with open(self._tokens, "ab") as file:
            np.concatenate([np.zeros(0, "<i4"), *tokens]).tofile(file)
        with open(self._lengths, "ab") as file:
            np.array([len(document) for document in documents], "<i8").tofile(file)
        self.num_documents += len(documents)

    def corpus(self) -> TokenCorpus:
        """The documents so far; the token ids are a map of the file."""
        offsets = self._offsets()
        if offsets[-1] == 0:
            return TokenCorpus(np.zeros(0, np.int32), offsets)
        return TokenCorpus(np.memmap(self._tokens, "<i4", "r"), offsets)

    def _drop_torn_end(self) -> int:
        whole = self._lengths.stat().st_size // 8
        _truncate(self._lengths, whole * 8)
        offsets = self._offsets()
        whole = int(np.searchsorted(offsets, self._tokens.stat().st_size // 4, "right")) - 1
        _truncate(self._lengths, whole * 8)
        _truncate(self._tokens, int(offsets[whole]) * 4)
        return whole

    def _offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.fromfile(self._lengths, "<i8"))]).astype(np.int64)


def _truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)
