"""The root of the error tree.

    SconeError                  every error meant for a person: one sentence, no traceback needed
    ├── DamagedDataError        bytes that a kernel was given do not fit their checksum or cannot be read
    ├── model_store.errors      checkpoints, tokenizers, corpora, f-gram sets, tables
    ├── cache.errors            look-up and row reads while serving
    └── server.errors           requests and the engine

A message says what was wrong, the value got, the value wanted, and which setting to change.
"""


class SconeError(Exception):
    """An error whose message is written for the person who caused or must mend it."""


class DamagedDataError(SconeError):
    """Bytes do not fit their checksum or cannot be read; the floors above say of which file."""
