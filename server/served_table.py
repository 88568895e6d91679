"""The f-gram table that the server answers with: a path, and the generation found there that is in use.

Tables are never changed in place. A new generation takes the old one's place on disk: either the path is a
symbolic link and is pointed at another folder, or the folder itself is exchanged by renaming. Both leave the
files of the old generation as they are for whoever has them open.
"""

from __future__ import annotations

import os
from pathlib import Path

from scone.cache import FGramTable, TableConfig
from scone.model_store.errors import TableError
from scone.server.table_generation import TableGeneration, file_identity


class ServedTable:
    """`open_newest` may be called on any thread, one at a time; the rest is for one thread."""

    def __init__(self, path: str | os.PathLike[str], config: TableConfig | None = None) -> None:
        """Opens the table; raises TableError."""
        self._path = Path(path)
        self._config = config
        self.current = TableGeneration(self._path.resolve(), 1, config)

    @property
    def name(self) -> str:
        """Of the folder that the path leads to."""
        return self.current.folder.name

    @property
    def table(self) -> FGramTable:
        return self.current.table

    def open_newest(self) -> TableGeneration | None:
        """What lies under the path now; None if that is in use already.

        Raises TableError if it cannot be opened, or belongs to another model or tokenizer.
        """
        folder, now = self._path.resolve(), self.current
        if file_identity(folder) == now.identity:
            return None
        # The same counters go on: what is counted is the server's, and must not fall.
        newest = TableGeneration(folder, now.number + 1, self._config, now.table.stats)
        try:
            newest.table.check_model(now.table.manifest.model_hash, now.table.manifest.tokenizer_hash)
        except TableError:
            newest.close()
            raise
        return newest

    def switch(self, newest: TableGeneration) -> TableGeneration:
        """Puts `newest` to use; returns the former generation, to be closed once no request uses it."""
        former, self.current = self.current, newest
        return former

    def close(self) -> None:
        self.current.close()
