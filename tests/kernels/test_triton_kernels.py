"""The Triton kernels of the look-up: equal to their oracles bit for bit in Triton's interpreter and on a GPU;
they compile for real GPUs.

`make test-triton` installs Triton (1 GB) into a folder of its own and runs this; `make test-cuda` too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.kernels import fgram_hash
from scone.kernels.match import Matcher
from scone.kernels.row_codec import CODECS, DTYPES, GROUP, RowCodec
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # else Triton warns that the default will change
triton = pytest.importorskip("triton", reason="run by `make test-triton`")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from scone.kernels import triton_gather, triton_match  # noqa: E402

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter is NumPy
]
DIM = 96
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(params=["interpreted", "compiled"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run: here, interpreted, and on the GPU if there is one."""
    if request.param == "interpreted":
        interpret(triton_gather, monkeypatch)
        interpret(triton_match, monkeypatch)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


def interpret(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the module's kernels by interpreted ones."""
    for name, value in list(vars(module).items()):
        if isinstance(value, JITFunction):
            monkeypatch.setattr(module, name, InterpretedFunction(value.fn))


@pytest.mark.parametrize("out_dtype", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec_name", CODECS)
def test_gathered_rows_are_the_oracles(
    codec_name: str, dtype: str, out_dtype: torch.dtype, device: torch.device
) -> None:
    codec = RowCodec(codec_name, dtype, DIM)
    generator = torch.Generator().manual_seed(0)
    # from values that underflow float16 to some that overflow it
    rows = torch.randn(20, DIM, generator=generator) * 10 ** torch.linspace(-8, 5, 20)[:, None]
    stored = codec.encode(rows)
    if codec_name == "fp8":
        values = stored[:, DIM // GROUP :]
        values[values == 0] = 1  # the smallest subnormal
    row_ids, places = torch.tensor([3, 19, 0, 7, 7, 12]), torch.tensor([4, 0, 6, 1, 2, 7])
    out, expected = torch.full((2, 8, DIM), 5.0, dtype=out_dtype)
    laid = out.to(device)
    triton_gather.launch_gather(
        triton_gather.gather_kernel, stored.to(device), codec, row_ids.to(device), places.to(device), laid
    )
    out = laid.cpu()
    expected[places] = codec.decode_reference(stored[row_ids]).to(out_dtype)
    assert torch.equal(out.view(BITS[out_dtype]), expected.view(BITS[out_dtype]))


@pytest.mark.parametrize("fp_bits", [64, 8])
def test_matches_and_rows_are_the_oracles(
    fp_bits: int,
    zipf_tokens: NDArray[np.int64],
    zipf_fgrams: FGramSet,
    write_table: Callable[..., Path],
    tmp_path: Path,
    device: torch.device,
) -> None:
    fgrams = zipf_fgrams if fp_bits == 64 else _first(zipf_fgrams, 40)
    files = open_table_files(write_table(tmp_path / "t", fgrams, dim=DIM, fp_bits=fp_bits))
    rows = torch.from_numpy(files.read_pages(0, len(files.page_sums))).view(torch.int16).view(-1, DIM)
    num = 300
    tokens = torch.from_numpy(zipf_tokens[:num].copy())
    tokens[100] = -1
    starts = np.array([0, 150, num])
    expected_rows, expected_lengths = Matcher(files.index).match_last(_windows(tokens.numpy(), starts, 5))
    row_ids, lengths, out = _match(files.index, rows, tokens, starts, device)
    np.testing.assert_array_equal(row_ids, expected_rows)
    np.testing.assert_array_equal(lengths, expected_lengths)
    hits = row_ids >= 0
    assert 0.2 < hits.mean() < 1
    assert torch.equal(out[hits], rows[row_ids[hits]])
    assert (out[~hits] == 7).all()


def test_a_damaged_bucket_is_noticed(
    zipf_tokens: NDArray[np.int64],
    zipf_fgrams: FGramSet,
    write_table: Callable[..., Path],
    tmp_path: Path,
    device: torch.device,
) -> None:
    index = open_table_files(write_table(tmp_path / "t", zipf_fgrams, dim=DIM)).index
    damaged = type(index)(
        index.buckets.copy(), index.num_home_buckets, index.seed, index.fp_bits, index.max_n, index.closed
    )
    damaged.buckets["fingerprint"] ^= np.uint64(1 << 40)
    tokens = torch.from_numpy(zipf_tokens[:20].copy())
    rows = torch.zeros(1, DIM, dtype=torch.int16)
    row_ids, _, _ = _match(damaged, rows, tokens, np.array([0, 20]), device)
    assert row_ids.tolist() == [-1] + [triton_match.DAMAGED_ROW] * 19


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_compile_for(architecture: int) -> None:
    gather: dict[str, Any] = {
        "DIM": 576,
        "DTYPE": 1,
        "OUT_DTYPE": 1,
        "GROUP": 32,
        "BLOCK": triton_gather.BLOCK,
    }
    for codec in range(len(CODECS)):
        types = ["*u8", "*i64", "*i64", "*u16", "i32", "i32"]
        _compile(triton_gather.gather_kernel, types, {**gather, "CODEC": codec}, architecture)
    match = {"FP_SHIFT": 0, "MAX_N": 5, "CLOSED": True, "DIM": 576, "COLUMNS": 64, "BLOCK": 32}
    types = ["*i64", "*i64", "*i64", "*u64", "*u64", "i64", "i64", "*i64", "*i8", "*u16", "i32"]
    _compile(triton_match.match_gather_kernel, types, match, architecture)


def _compile(kernel: Any, types: list[str], constants: dict[str, Any], architecture: int) -> None:
    arguments = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(arguments, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={name: constants[name] for name in kernel.arg_names if name in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert len(compiled.asm["cubin"]) > 1000
    assert f".target sm_{architecture}" in compiled.asm["ptx"]


def _match(
    index: Any, rows: torch.Tensor, tokens: torch.Tensor, starts: NDArray[np.int64], device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int8], torch.Tensor]:
    """Row ids, lengths and rows (7 where there is none) of every position."""
    num, block = len(tokens), 32
    rows, tokens = rows.to(device), tokens.to(device)
    firsts = torch.from_numpy(np.repeat(starts[:-1], np.diff(starts))).to(device)
    row_ids = torch.zeros(num, dtype=torch.int64, device=device)
    lengths = torch.zeros(num, dtype=torch.int8, device=device)
    out = torch.full((num, DIM), 7, dtype=torch.int16, device=device)
    triton_match.match_gather_kernel[(triton.cdiv(num, block),)](
        tokens,
        firsts,
        torch.arange(num, device=device),
        torch.from_numpy(index.buckets.view(np.uint64).reshape(-1).copy()).to(device),
        torch.from_numpy(np.array(fgram_hash.lane_seeds(index.seed), np.uint64)).to(device),
        index.num_home_buckets,
        rows.data_ptr(),
        row_ids,
        lengths,
        out.view(torch.uint16),
        num,
        FP_SHIFT=64 - index.fp_bits,
        MAX_N=index.max_n,
        CLOSED=index.closed,
        DIM=DIM,
        COLUMNS=64,
        BLOCK=block,
    )
    return row_ids.cpu().numpy(), lengths.cpu().numpy(), out.cpu()


def _windows(tokens: NDArray[np.int64], starts: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    windows = np.full((len(tokens), width), -1, np.int64)
    for begin, end in pairwise(starts.tolist()):
        for i in range(begin, end):
            history = tokens[max(begin, i - width + 1) : i + 1]
            windows[i, width - len(history) :] = history
    return windows


def _first(fgrams: FGramSet, num: int) -> FGramSet:
    parts = fgrams.tokens[:num], fgrams.lengths[:num], fgrams.counts[:num]
    return FGramSet(*parts, fgrams.tokenizer_hash, fgrams.min_count, fgrams.num_corpus_tokens)
