"""A tokenised corpus keeps documents apart and survives its file."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from scone.model_store import token_corpus
from scone.model_store.errors import CorpusError
from scone.model_store.token_corpus import TokenCorpus, tokenize
from scone.model_store.tokenizer import Tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return Tokenizer(backend, bos_id=None, eos_ids=(), chat_template=None)


@pytest.mark.parametrize("batch_characters", [1, 4, 1000])
def test_texts_become_documents_whatever_the_batches(
    tokenizer: Tokenizer, batch_characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_corpus, "BATCH_CHARACTERS", batch_characters)
    corpus = tokenize(iter(["a b", "c", "", "b x c"]), tokenizer, progress=False)
    assert corpus.tokens.tolist() == [1, 2, 3, 2, 0, 3]
    assert corpus.offsets.tolist() == [0, 2, 3, 3, 6]
    assert (corpus.num_tokens, corpus.num_documents) == (6, 4)
    assert [d.tolist() for d in corpus.documents()] == [[1, 2], [3], [], [2, 0, 3]]
    assert corpus.hash == TokenCorpus.from_documents([[1, 2], [3], [], [2, 0, 3]]).hash


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
