"""Tokenises a corpus: documents in, token ids out, in batches on all cores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from scone.model_store.corpus import corpus_identity, read_documents
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.token_spool import TokenSpool
from scone.model_store.tokenizer import Tokenizer

# Enough for all cores to have work, little enough to keep the token ids of one batch small (about 1M).
BATCH_CHARACTERS = 4_000_000


def tokenize(texts: Iterable[str], tokenizer: Tokenizer, *, progress: bool = True) -> TokenCorpus:
    """The token ids of each text, without special tokens, in memory."""
    documents: list[list[int]] = []
    for batch in _encoded(texts, tokenizer, progress):
        documents += batch
    return TokenCorpus.from_documents(documents)


def tokenize_files(
    paths: list[str], tokenizer: Tokenizer, work: Path, *, progress: bool = True
) -> TokenCorpus:
    """The token ids of a corpus (`read_documents`), kept in the folder `work` and mapped from there.

    A run that was ended goes on if neither files nor tokenizer have changed since. Raises CorpusError.
    """
    spool = TokenSpool(work, f"{tokenizer.hash} {corpus_identity(paths)}")
    texts = itertools.islice(read_documents(paths), spool.num_documents, None)
    for batch in _encoded(texts, tokenizer, progress):
        spool.append(batch)
    return spool.corpus()


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, progress: bool) -> Iterator[list[list[int]]]:
    num_documents = 0
    with tqdm(desc="tokenize", unit="token", unit_scale=True, disable=not progress) as bar:
        for batch in _batches(texts):
            encoded = tokenizer.encode_batch(batch)
            yield encoded
            num_documents += len(batch)
            bar.set_postfix(documents=num_documents, refresh=False)
            bar.update(sum(map(len, encoded)))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
