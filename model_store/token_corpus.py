"""A tokenised corpus: all documents' token ids back to back, and where each document begins.

The arrays may lie in memory or be read-only maps of files, so a corpus need not fit in RAM.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from scone.model_store.errors import CorpusError


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Token ids of documents.

    Attributes:
        tokens: (num_tokens,) int32, all documents back to back.
        offsets: (num_documents + 1,) int64; document i is tokens[offsets[i] : offsets[i + 1]].
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of token ids and document borders."""
        digest = hashlib.sha256(np.ascontiguousarray(self.offsets.astype("<i8")).tobytes())
        for start in range(0, self.num_tokens, 1 << 24):
            digest.update(
                np.ascontiguousarray(self.tokens[start : start + (1 << 24)].astype("<i4")).tobytes()
            )
        return digest.hexdigest()

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int] | NDArray[Any]]) -> TokenCorpus:
        """A corpus in memory."""
        arrays = [np.asarray(document, np.int32) for document in documents]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *arrays]), offsets)

    def documents(self) -> Iterator[NDArray[np.int32]]:
        """Each document's token ids, views of `tokens`."""
        for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield self.tokens[start:end]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an uncompressed .npz of both arrays."""
        out = Path(path)
        partial = out.with_name(out.name + ".partial")
        with open(partial, "wb") as file:
            np.savez(file, tokens=self.tokens, offsets=self.offsets)
        os.replace(partial, out)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenCorpus:
        """Reads what `save` wrote; raises CorpusError."""
        try:
            with open(path, "rb") as file, np.load(file) as arrays:  # np.load leaks what it opens itself
                tokens, offsets = arrays["tokens"], arrays["offsets"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise CorpusError(f"{path} is no tokenised corpus: {error}") from None
        return cls(tokens, offsets)
