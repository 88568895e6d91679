"""A decode step's look-up in one call against its parts, and what it refuses without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.kernels.errors import DamagedDataError
from scone.kernels.fgram_hash import BUCKET_DTYPE
from scone.kernels.gather import RowMemory
from scone.kernels.look_up import look_up_newest, look_up_reference
from scone.kernels.match import MAX_N, BucketIndex, Matcher
from scone.kernels.row_codec import RowCodec
from scone.kernels.row_target import RowTarget
from scone.model_store.fgram_index import build_index
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_header import HEADER_BYTES

DIM = 96
LookUp = Callable[..., int | None]


@pytest.fixture(scope="module")
def index(zipf_fgrams: FGramSet, tmp_path_factory: pytest.TempPathFactory) -> BucketIndex:
    path = tmp_path_factory.mktemp("index") / "index.bin"
    shape = build_index(zipf_fgrams, path, "ab" * 32, 64)
    buckets = np.fromfile(path, BUCKET_DTYPE, offset=HEADER_BYTES)
    return BucketIndex(
        buckets, shape.num_home_buckets, shape.hash_seed, 64, zipf_fgrams.max_n, zipf_fgrams.is_closed()
    )


def memory_of(num_rows: int, codec: str) -> RowMemory:
    row_codec = RowCodec(codec, "bfloat16", DIM)
    rows = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1))
    stored = row_codec.encode(rows).reshape(-1).numpy()
    return RowMemory(stored, np.zeros(1, np.uint64), num_rows, num_rows, row_codec, None)


class Step:
    """Sequences that decode together, and where their look-up goes."""

    def __init__(
        self, tokens: NDArray[np.int64], batch: int, dtype: torch.dtype, *, by_place: bool = False
    ) -> None:
        starts = np.random.default_rng(batch).integers(0, len(tokens) - 40, batch)
        lengths = (np.arange(batch) + 4) % 9 + 1
        self.sequences = [tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
        self.row_ids = [[-9] * (len(sequence) - 1) for sequence in self.sequences]
        self.positions = [len(sequence) - 1 for sequence in self.sequences]
        self.out = torch.full((batch, DIM), 7.0, dtype=dtype)
        self.wanted, self.places = np.full((2, batch + 3), -7)
        self.by_place = by_place

    def run(self, look_up: LookUp, matcher: Matcher, memory: RowMemory) -> int | None:
        return look_up(
            matcher,
            memory,
            self.sequences,
            self.row_ids,
            self.positions,
            RowTarget(self.out, self.wanted, self.places, by_place=self.by_place),
        )

    def ids(self) -> list[Any]:
        return [self.row_ids, self.wanted.tolist(), self.places.tolist()]


@pytest.mark.parametrize("codec", ["raw", "int8", "int4", "fp8"])
@pytest.mark.parametrize("batch", [0, 1, 32, 700])
@pytest.mark.parametrize(("dtype", "by_place"), [(torch.bfloat16, False), (torch.float32, True)])
def test_it_equals_its_parts(
    index: BucketIndex,
    zipf_fgrams: FGramSet,
    zipf_tokens: NDArray[np.int64],
    codec: str,
    batch: int,
    dtype: torch.dtype,
    by_place: bool,
) -> None:
    memory = memory_of(len(zipf_fgrams), codec)
    ours, theirs = [Step(zipf_tokens, batch, dtype, by_place=by_place) for _ in range(2)]
    counts = np.zeros((2, MAX_N + 1), np.int64)
    num_rows = ours.run(look_up_newest, Matcher(index, counts[0]), memory)
    assert num_rows == theirs.run(look_up_reference, Matcher(index, counts[1]), memory)
    assert num_rows is not None
    assert num_rows > batch // 3 or batch < 2
    assert (counts[0] == counts[1]).all()
    assert ours.ids() == theirs.ids()
    assert torch.equal(ours.out, theirs.out)
    has_row = torch.zeros(batch, dtype=torch.bool)
    has_row[torch.from_numpy(ours.places[:num_rows]) if by_place else slice(num_rows)] = True
    assert (ours.out[~has_row] == 7.0).all()
    assert (ours.out[has_row] != 7.0).any(dim=1).all()


@pytest.mark.parametrize("look_up", [look_up_newest, look_up_reference])
def test_what_it_cannot_do_at_once_it_leaves_alone(
    index: BucketIndex, zipf_fgrams: FGramSet, zipf_tokens: NDArray[np.int64], look_up: LookUp
) -> None:
    matcher = Matcher(index)

    def refused(step: Step, num_rows: int = len(zipf_fgrams)) -> None:
        before = [list(ids) for ids in step.row_ids], step.out.clone()
        assert step.run(look_up, matcher, memory_of(num_rows, "raw")) is None
        assert step.row_ids == before[0]
        assert torch.equal(step.out, before[1])

    earlier = Step(zipf_tokens, 8, torch.bfloat16)
    earlier.positions[3] -= 1  # a token before the newest
    refused(earlier)
    matched = Step(zipf_tokens, 8, torch.bfloat16)
    matched.row_ids[7].append(5)  # the newest was matched before
    refused(matched)
    refused(Step(zipf_tokens, 32, torch.bfloat16), num_rows=1)  # most rows lie elsewhere


@pytest.mark.parametrize("look_up", [look_up_newest, look_up_reference])
def test_a_damaged_bucket_is_an_error_and_nothing_is_appended(
    index: BucketIndex, zipf_fgrams: FGramSet, zipf_tokens: NDArray[np.int64], look_up: LookUp
) -> None:
    damaged = index.buckets.copy()
    damaged["row"][:, 0] ^= 1
    broken = BucketIndex(
        damaged, index.num_home_buckets, index.seed, index.fp_bits, index.max_n, index.closed
    )
    step = Step(zipf_tokens, 32, torch.bfloat16)
    before = [list(ids) for ids in step.row_ids]
    with pytest.raises(DamagedDataError, match="check bits"):
        step.run(look_up, Matcher(broken), memory_of(len(zipf_fgrams), "raw"))
    assert step.row_ids == before


def test_wrong_arguments_are_refused(
    index: BucketIndex, zipf_fgrams: FGramSet, zipf_tokens: NDArray[np.int64]
) -> None:
    matcher, memory = Matcher(index), memory_of(len(zipf_fgrams), "raw")
    step = Step(zipf_tokens, 4, torch.bfloat16)
    step.out = step.out[:3]
    with pytest.raises(ValueError, match="out has shape"):
        step.run(look_up_newest, matcher, memory)
    step = Step(zipf_tokens, 4, torch.bfloat16)
    step.row_ids.pop()
    with pytest.raises(ValueError, match="row ids"):
        step.run(look_up_newest, matcher, memory)
    step = Step(zipf_tokens, 4, torch.bfloat16)
    step.wanted = step.wanted[:3]
    with pytest.raises(ValueError, match="shorter than the rows"):
        step.run(look_up_newest, matcher, memory)
    step = Step(zipf_tokens, 4, torch.bfloat16)
    step.sequences[0][-1] = "x"
    with pytest.raises(TypeError):
        step.run(look_up_newest, matcher, memory)
