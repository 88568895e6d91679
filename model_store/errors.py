"""Errors of the offline floor.

ModelStoreError(SconeError)
├── CheckpointError     a model folder or file that cannot be read as one
├── TokenizerError      a tokenizer that is missing or not understood
├── CorpusError         a corpus path or document that cannot be read
├── FGramSetError       an f-gram set file that is damaged or belongs to another tokenizer
├── TableError          a table that is missing, damaged, incomplete or belongs to another model
└── CodecCostError      a codec that costs more quality than was allowed
"""

from scone.kernels.errors import SconeError


class ModelStoreError(SconeError):
    """Root of this floor's errors."""


class CheckpointError(ModelStoreError):
    """A model folder or file that cannot be read as a checkpoint."""


class TokenizerError(ModelStoreError):
    """A tokenizer that is missing, damaged or of an unknown kind."""


class CorpusError(ModelStoreError):
    """A corpus path or document that cannot be read."""


class FGramSetError(ModelStoreError):
    """An f-gram set that is damaged or was counted with another tokenizer."""


class TableError(ModelStoreError):
    """A table that is missing, damaged, incomplete or belongs to another model."""


class CodecCostError(ModelStoreError):
    """A codec that costs more quality than was allowed."""
