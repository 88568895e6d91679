"""All codecs on the rows of one real table: bytes, error, decoding speed, and what they cost in quality.

Beside the codecs stand low rank and product quantisation, which no table uses. The table must be raw: its
rows are the reference.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scone.kernels.gather import RowMemory
from scone.kernels.row_codec import CODECS, RowCodec
from scone.model_store.change_table import SourceTable
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.codec_cost import SampleRows
from scone.model_store.divergence import measure_divergence
from scone.model_store.errors import TableError
from scone.model_store.lossy_rows import LossyRows, LowRankRows, ProductQuantizedRows, in_parts
from scone.model_store.perplexity import SEQ_LEN
from scone.model_store.row_errors import relative_errors
from scone.model_store.set_matcher import SetMatcher
from scone.model_store.token_stream import TokenStream

_DECODED_ROWS = 16_384
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class _Contestant:
    """One way to store rows.

    Attributes:
        restore: rows (n, dim) as a reader would get them back.
        decode: decodes _DECODED_ROWS rows at random places once; timed.
    """

    name: str
    row_bytes: int
    shared_bytes: int
    restore: Callable[[Tensor], Tensor]
    decode: Callable[[], object]


def benchmark_codecs(
    table_path: Path, checkpoint: Checkpoint, heldout: TokenStream, max_tokens: int
) -> dict[str, Any]:
    """Measures them all; raises TableError if the table is not raw or belongs to another model."""
    table = _open_raw(table_path, checkpoint.model_hash)
    manifest = table.manifest
    raw = RowCodec("raw", manifest.dtype, manifest.dim)
    stored, _ = table.stored_rows(np.arange(manifest.num_fgrams))
    rows = raw.decode_reference(torch.from_numpy(stored))
    decoder = checkpoint.decoder()
    sample = SampleRows(decoder, SetMatcher(table.fgrams), heldout, max_tokens)
    met = rows[torch.from_numpy(sample.row_ids)]
    contestants = _contestants(rows, manifest.dtype)
    base, costs = measure_divergence(
        decoder,
        heldout,
        sample.inputs(met),
        [sample.inputs(contestant.restore(met)) for contestant in contestants],
        SEQ_LEN,
        max_tokens,
    )
    seconds = _decode_seconds(contestants)
    results = {}
    for contestant, cost in zip(contestants, costs, strict=True):
        errors = relative_errors(rows, contestant.restore(rows))
        results[contestant.name] = {
            "row_bytes": contestant.row_bytes,
            "shared_bytes": contestant.shared_bytes,
            "error_rms": float(np.sqrt(np.mean(errors.astype(np.float64) ** 2))),
            "error_max": float(errors.max()),
            "decode_ns_per_row": 1e9 * seconds[contestant.name] / _DECODED_ROWS,
            "delta_perplexity": cost.delta,
            "kl_nats": cost.kl,
        }
    return {
        "benchmark": "codec",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(("scone", *sys.argv[1:])),
        "num_rows": manifest.num_fgrams,
        "dim": manifest.dim,
        "dtype": manifest.dtype,
        "num_tokens": base.num_tokens,
        "raw_perplexity": base.value,
        "threads_decoding": 1,
        "results": results,
    }


def _open_raw(path: Path, model_hash: str) -> SourceTable:
    table = SourceTable(path)
    if table.manifest.codec != "raw":
        raise TableError(
            f"{path} has codec {table.manifest.codec}, wanted raw: the others are held against it"
        )
    if table.manifest.model_hash != model_hash:
        raise TableError(f"{path} was built for model {table.manifest.model_hash[:12]}, not for this one")
    return table


def _contestants(rows: Tensor, dtype: str) -> list[_Contestant]:
    dim = rows.shape[1]
    lossy: list[LossyRows] = [
        LowRankRows(rows, 3 * dim // 4),
        LowRankRows(rows, dim // 2),
        LowRankRows(rows, dim // 4),
        ProductQuantizedRows(rows, 2),
        ProductQuantizedRows(rows, 4),
    ]
    return [_codec(RowCodec(codec, dtype, dim), rows) for codec in CODECS] + [
        _fitted(each, rows) for each in lossy
    ]


def _codec(codec: RowCodec, rows: Tensor) -> _Contestant:
    stored = codec.encode(rows[_random_ids(len(rows))]).numpy()
    memory = RowMemory(
        stored.reshape(-1), np.zeros(1, np.uint64), len(stored), len(stored), codec, page_sums=None
    )
    order = np.random.default_rng(1).permutation(len(stored))
    out = torch.empty(len(stored), codec.dim, dtype=codec.torch_dtype)
    return _Contestant(
        codec.codec,
        codec.row_bytes,
        0,
        lambda wanted: codec.decode_reference(codec.encode(wanted)),
        lambda: memory.gather(order, 0, len(order), out),
    )


def _fitted(lossy: LossyRows, rows: Tensor) -> _Contestant:
    codes = lossy.encode(rows[_random_ids(len(rows))].float())
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(codes)))
    return _Contestant(
        lossy.name,
        lossy.row_bytes,
        lossy.shared_bytes,
        lambda wanted: in_parts(lossy, wanted).to(rows.dtype),
        lambda: lossy.decode(codes[order]).to(rows.dtype),
    )


def _random_ids(num_rows: int) -> Tensor:
    return torch.randint(num_rows, (_DECODED_ROWS,), generator=torch.Generator().manual_seed(0))


def _decode_seconds(contestants: list[_Contestant]) -> dict[str, float]:
    """Median time for _DECODED_ROWS rows on one thread; the ways take turns."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    try:
        for repeat in range(1 + _REPEATS):
            for contestant in contestants:
                started = time.perf_counter()
                contestant.decode()
                if repeat:  # the first time is for the caches
                    times[contestant.name].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(num_threads)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
