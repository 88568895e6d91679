"""A tokenised corpus keeps documents apart and survives its file."""

from pathlib import Path

import numpy as np
import pytest

from scone.model_store.errors import CorpusError
from scone.model_store.token_corpus import TokenCorpus


def test_save_and_load(tmp_path: Path) -> None:
    corpus = TokenCorpus.from_documents([[5, 6], [], [7]])
    corpus.save(tmp_path / "x.tokens.npz")
    loaded = TokenCorpus.load(tmp_path / "x.tokens.npz")
    assert loaded.hash == corpus.hash
    assert loaded.tokens.dtype == np.int32
    assert loaded.offsets.dtype == np.int64
    assert [p.name for p in tmp_path.iterdir()] == ["x.tokens.npz"]


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens.npz"
    TokenCorpus.from_documents([[5, 6]]).save(path)
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match="no tokenised corpus"):
            TokenCorpus.load(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(CorpusError, match="no tokenised corpus"):
        TokenCorpus.load(path.with_suffix(".npy"))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(CorpusError, match="no tokenised corpus"):
        TokenCorpus.load(path)
    with pytest.raises(CorpusError, match="no tokenised corpus"):
        TokenCorpus.load(tmp_path / "missing.npz")
