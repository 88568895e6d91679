"""Tokenising gives the same documents whatever the batches, and goes on after a kill at any byte."""

import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from scone.model_store import tokenize_corpus
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tokenize_corpus import tokenize, tokenize_files
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
    monkeypatch.setattr(tokenize_corpus, "BATCH_CHARACTERS", batch_characters)
    corpus = tokenize(iter(["a b", "c", "", "b x c"]), tokenizer, progress=False)
    assert corpus.tokens.tolist() == [1, 2, 3, 2, 0, 3]
    assert corpus.offsets.tolist() == [0, 2, 3, 3, 6]
    assert (corpus.num_tokens, corpus.num_documents) == (6, 4)
    assert [d.tolist() for d in corpus.documents()] == [[1, 2], [3], [], [2, 0, 3]]
    assert corpus.hash == TokenCorpus.from_documents([[1, 2], [3], [], [2, 0, 3]]).hash


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for i, text in enumerate(["a b", "c", "b x c", "a a a"]):
        (tmp_path / f"{i}.txt").write_text(text)
    return [str(tmp_path / "*.txt")]


def test_files_are_tokenised_onto_disk(tokenizer: Tokenizer, files: list[str], tmp_path: Path) -> None:
    corpus = tokenize_files(files, tokenizer, tmp_path / "work", progress=False)
    assert [d.tolist() for d in corpus.documents()] == [[1, 2], [3], [2, 0, 3], [1, 1, 1]]
    assert corpus.hash == TokenCorpus.from_documents([[1, 2], [3], [2, 0, 3], [1, 1, 1]]).hash


def test_what_a_kill_left_is_used_as_far_as_it_is_whole(
    tokenizer: Tokenizer, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_corpus, "BATCH_CHARACTERS", 1)
    work = tmp_path / "work"
    expected = tokenize_files(files, tokenizer, work, progress=False).hash
    left = tmp_path / "left"
    for name, item_bytes in (("tokens.i32", 4), ("lengths.i64", 8)):
        size = (work / name).stat().st_size
        for kept in range(0, size, item_bytes - 1):
            shutil.copytree(work, left)
            with open(left / name, "r+b") as file:
                file.truncate(kept)
            assert tokenize_files(files, tokenizer, left, progress=False).hash == expected
            assert (left / name).stat().st_size == size
            shutil.rmtree(left)


def test_finished_documents_are_not_tokenised_again(
    tokenizer: Tokenizer, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_corpus, "BATCH_CHARACTERS", 1)
    seen: list[str] = []
    encode_batch = tokenizer.encode_batch

    def ended(texts: list[str]) -> list[list[int]]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(texts)
        return encode_batch(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", ended)
    with pytest.raises(KeyboardInterrupt):
        tokenize_files(files, tokenizer, tmp_path / "work", progress=False)
    assert seen == ["a b", "c"]
    seen.clear()
    corpus = tokenize_files(files, tokenizer, tmp_path / "work", progress=False)
    assert seen == ["b x c", "a a a"]
    assert corpus.num_documents == 4

    (tmp_path / "1.txt").write_text("a c")
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        tokenize_files(files, tokenizer, tmp_path / "work", progress=False)
    assert seen == ["a b", "a c"]
