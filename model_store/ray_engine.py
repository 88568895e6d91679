"""The same counting and embedding on a Ray cluster (extra `ray`), by the functions of the local path.

Results are those of the local path, bit for bit: a key is counted whole in one partition, and a row depends
on its f-gram alone. Checkpoints must lie where every node sees them. Ray is started on this machine unless
RAY_ADDRESS names a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scone.kernels.ngram_count import KeyIndex, NGramSource, count_keys, ngram_keys
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.count import CHUNK_TOKENS, cutoff, rank_levels
from scone.model_store.count_workspace import Level
from scone.model_store.errors import ModelStoreError
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import MIN_N, FGramSet
from scone.model_store.token_corpus import TokenCorpus

_MAIN_MODEL = "SCONE_MAIN_MODEL"
_PARTITIONS_PER_CPU = 4

Batch = dict[str, Any]


def start_ray() -> Any:
    """The `ray` module, connected; raises ModelStoreError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise ModelStoreError("engine ray needs Ray: pip install 'scone-serve[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def count_on_ray(
    corpus: TokenCorpus, *, max_n: int, min_count: int, top: int, tokenizer_hash: str
) -> FGramSet:
    """`count_fgrams` on Ray Data: the corpus lies in shards of whole documents, and so do the ids of its
    n-grams; keys are exchanged by partition.
    """
    ray = start_ray()
    num_partitions = _PARTITIONS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    shards = ray.data.from_items(list(_shards(corpus)))
    levels: list[Level] = []
    threshold = min_count
    for n in range(MIN_N, max_n + 1):
        counted = (
            shards.flat_map(_deal, fn_kwargs={"n": n, "num_partitions": num_partitions})
            .groupby("partition")
            .map_groups(_count, fn_kwargs={"threshold": threshold})
            .take_all()
        )
        keys, counts = (
            np.concatenate([np.zeros(0, np.int64), *(_array(row[name], np.int64) for row in counted)])
            for name in ("keys", "counts")
        )
        order = np.argsort(keys)
        levels.append(Level(keys[order], counts[order]))
        threshold = max(threshold, cutoff(levels, top))
        if n < max_n:
            known = ray.put(levels[-1].keys)
            shards = shards.map(_with_ids, fn_kwargs={"n": n, "known": known}).materialize()
    return rank_levels(levels, max_n, top, corpus, tokenizer_hash, min_count)


def embed_on_ray(path: Path, fgrams: FGramSet, first: int, rows_per_batch: int) -> Iterator[torch.Tensor]:
    """Rows (n, dim) float32 of the f-grams from rank `first` on, in order; `path` is the checkpoint's."""
    ray = start_ray()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    starts = [{"start": start} for start in range(first, len(fgrams), rows_per_batch)]
    if not starts:
        return
    num_actors = max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)
    rows = ray.data.from_items(starts, override_num_blocks=len(starts)).map_batches(
        _Embedder,
        fn_constructor_args=(
            str(path.resolve()),
            os.environ.get(_MAIN_MODEL),
            fgrams,
            rows_per_batch,
        ),
        batch_size=1,
        num_cpus=1,
        concurrency=(1, min(num_actors, len(starts))),
    )
    for batch in rows.iter_batches(batch_size=rows_per_batch):
        yield torch.from_numpy(np.array(batch["row"]))


class _Embedder:
    """One worker's copy of the model."""

    def __init__(self, path: str, main_model: str | None, fgrams: FGramSet, rows_per_batch: int) -> None:
        if main_model is not None:
            os.environ[_MAIN_MODEL] = main_model
        checkpoint = open_checkpoint(path)
        model = checkpoint.fgram_model(checkpoint.decoder())
        assert model is not None, "checked before the work was given out"
        self._model: FGramModel = model
        self._fgrams = fgrams
        self._rows_per_batch = rows_per_batch

    def __call__(self, batch: Batch) -> Batch:
        start = int(batch["start"][0])
        ranks = slice(start, start + self._rows_per_batch)
        token_ids = torch.from_numpy(self._fgrams.tokens[ranks].astype(np.int64))
        lengths = torch.from_numpy(self._fgrams.lengths[ranks].astype(np.int64))
        return {"row": self._model.embed(token_ids, lengths).numpy()}


def _shards(corpus: TokenCorpus) -> Iterator[dict[str, bytes]]:
    """Whole documents, about CHUNK_TOKENS tokens together; a token is its own first id."""
    offsets = corpus.offsets
    begin = 0
    while begin < corpus.num_documents:
        end = int(np.searchsorted(offsets, offsets[begin] + CHUNK_TOKENS, side="right")) - 1
        end = max(end, begin + 1)
        tokens = np.ascontiguousarray(corpus.tokens[offsets[begin] : offsets[end]], np.int32)
        borders = np.ascontiguousarray(offsets[begin : end + 1] - offsets[begin])
        yield {"tokens": tokens.tobytes(), "ids": tokens.tobytes(), "borders": borders.tobytes()}
        begin = end


def _source(shard: dict[str, bytes], n: int) -> NGramSource:
    return NGramSource(
        _array(shard["tokens"], np.int32),
        _array(shard["ids"], np.int32),
        _array(shard["borders"], np.int64),
        n,
    )


def _deal(shard: dict[str, bytes], n: int, num_partitions: int) -> list[Batch]:
    """The shard's keys, a row for each partition that has some."""
    source = _source(shard, n)
    keys, bounds = ngram_keys(source, 0, source.num_starts, num_partitions)
    return [
        {"partition": p, "keys": keys[bounds[p] : bounds[p + 1]].tobytes()}
        for p in range(num_partitions)
        if bounds[p] < bounds[p + 1]
    ]


def _count(group: Batch, threshold: int) -> Batch:
    """All keys of one partition -> those that passed, and their counts."""
    keys, counts = count_keys(np.concatenate([_array(part, np.int64) for part in group["keys"]]), threshold)
    return {"keys": [keys.tobytes()], "counts": [counts.tobytes()]}


def _with_ids(shard: dict[str, bytes], n: int, known: Any) -> dict[str, bytes]:
    """The shard with the id of the passed n-gram that begins at each position."""
    import ray

    source = _source(shard, n)
    ids = np.full(len(source.tokens), -1, np.int32)
    ids[: source.num_starts] = KeyIndex(ray.get(known)).next_ids(source, 0, source.num_starts)
    return shard | {"ids": ids.tobytes()}


def _array(data: bytes, dtype: type[np.generic]) -> NDArray[Any]:
    return np.frombuffer(data, dtype)
