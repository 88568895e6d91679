"""The Triton kernels of the decoder against plain torch, compiled for the GPU or with TRITON_INTERPRET=1
interpreted; and they compile for real GPUs. `make test-triton` and `make test-cuda` run this.
"""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from scone.kernels.paged_attention import PagedBatch, paged_attention_reference, write_kv
from scone.model_store.decoder import RMSNorm
from scone.model_store.rope import rotate

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # else Triton warns that the default will change
triton = pytest.importorskip("triton", reason="run by `make test-triton`")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from scone.kernels import triton_attention, triton_layer  # noqa: E402
from tests.kernels.interpreted import OneValue  # noqa: E402

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter is NumPy
]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [
    torch.float32,
    torch.float16 if INTERPRETS else torch.bfloat16,
]  # no interpreted products of bfloat16
BLOCK_SIZE = 16
# queries and context of each sequence: prompts, chunks of prompts, single tokens, all in one step
MIXED = [(70, 70), (20, 150), (1, 1), (1, 300), (33, 33)]
DECODE = [(1, 1), (1, 17), (1, 300), (1, 64), (1, 65)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if INTERPRETS:
        monkeypatch.setattr(interpreter, "int", OneValue, raising=False)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    return torch.device("cuda")


def close(ours: Tensor, expected: Tensor) -> None:
    """To the precision of the type."""
    tolerance = 2e-5 if ours.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (8, 1, 48)], ids=str)
@pytest.mark.parametrize("seqs", [MIXED, DECODE], ids=["mixed", "decode"])
def test_attention_is_the_references(
    seqs: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    per_tile = triton_attention.queries_per_tile(num_heads, num_kv_heads)
    batch, positions = paged_batch(seqs, per_tile, device)
    num_blocks = int(batch.block_tables.max()) + 1
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(
        2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device
    )
    # tokens lie further apart than their heads take, as in the product of queries, keys and values
    q = torch.randn(len(positions), num_heads + 2, head_dim, dtype=dtype, device=device)[:, :num_heads]
    out = torch.empty(q.shape, dtype=dtype, device=device)
    if batch.one_query_a_tile:
        assert triton_attention.splits_for(len(seqs), num_kv_heads) > 1
    triton_attention.paged_attention(q, positions, batch, k_cache, v_cache, out)
    close(out, paged_attention_reference(q, k_cache, v_cache, batch, head_dim**-0.5))


@pytest.mark.parametrize(
    "seqs", [DECODE, [(1, 1), (1, 17), (2, 300), (1, 64), (2, 65)]], ids=["decode", "mixed"]
)
def test_a_tile_without_queries_is_passed_over(seqs: list[tuple[int, int]], device: torch.device) -> None:
    batch, positions = paged_batch(seqs, 2, device)
    assert batch.tiles is not None
    batch.tiles[2, 3] = 0
    num_blocks = int(batch.block_tables.max()) + 1
    k_cache, v_cache = torch.randn(2, num_blocks, 2, BLOCK_SIZE, 16, device=device)
    q = torch.randn(len(positions), 4, 16, device=device)
    out = torch.empty_like(q)
    triton_attention.paged_attention(q, positions, batch, k_cache, v_cache, out)
    expected = paged_attention_reference(q, k_cache, v_cache, batch, 0.25)
    others = torch.arange(len(positions), device=device) != batch.tiles[1, 3]
    close(out[others], expected[others])


def paged_batch(
    seqs: list[tuple[int, int]], per_tile: int, device: torch.device
) -> tuple[PagedBatch, Tensor]:
    """Sequences (queries, context), their blocks shuffled; and positions."""
    num_blocks = [-(-context // BLOCK_SIZE) for _, context in seqs]
    blocks = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(seqs), max(num_blocks) + 3, dtype=torch.int32)
    for row, part in zip(tables, torch.split(blocks, num_blocks), strict=True):
        row[: len(part)] = part
    starts = list(accumulate((num for num, _ in seqs), initial=0))
    tiles = [
        (seq, starts[seq] + begin, min(per_tile, num - begin))
        for seq, (num, _) in enumerate(seqs)
        for begin in range(0, num, per_tile)
    ]
    positions = torch.cat([torch.arange(context - num, context) for num, context in seqs]).int()
    batch = PagedBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in seqs], dtype=torch.int32),
        block_tables=tables.to(device),
        slots=torch.empty(0, dtype=torch.int32),
        tiles=torch.tensor(tiles, dtype=torch.int32).T.contiguous().to(device),
        one_query_a_tile=all(num == 1 for num, _ in seqs),
    )
    return batch, positions.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [576, 100])
def test_norm_is_the_decoders(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(dim, 1e-5).to(dtype).to(device).requires_grad_(False)
    norm.weight.normal_()
    hidden, delta = torch.randn(2, 5, dim, dtype=dtype, device=device)
    close(triton_layer.add_norm(hidden, None, norm.weight, 1e-5), norm(hidden))
    expected = hidden + delta
    close(triton_layer.add_norm(hidden, delta, norm.weight, 1e-5), norm(expected))
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_rotation_and_store_are_the_decoders(
    has_norms: bool, dtype: torch.dtype, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = 4, 2, 24
    torch.manual_seed(0)
    qkv = torch.randn(6, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    positions = torch.tensor([0, 3, 2, 9, 7, 1], dtype=torch.int32, device=device)
    slots = torch.tensor([5, 40, 17, 31, 0, -1], dtype=torch.int32, device=device)
    angles = torch.rand(10, head_dim // 2, device=device) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = None
    q, k, v = torch.split(qkv.clone(), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if has_norms:
        q_norm, k_norm = (
            RMSNorm(head_dim, 1e-5).to(dtype).to(device).requires_grad_(False) for _ in range(2)
        )
        for norm in (q_norm, k_norm):
            norm.weight.normal_()
        norms = (q_norm.weight, k_norm.weight)
        q, k = q_norm(q), k_norm(k)
    wide = [torch.cat((x, x), -1)[positions.long(), None] for x in (cos, sin)]
    caches = torch.zeros(2, 3, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device)
    expected = caches.clone()
    write_kv(rotate(k, *wide)[:5], v[:5], expected[0], expected[1], slots[:5].long())
    triton_layer.rotate_and_store(qkv, positions, slots, cos, sin, norms, 1e-5, caches[0], caches[1])
    close(qkv[:, :num_heads], rotate(q, *wide))
    close(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_is_the_decoders(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(4, 2 * 1100, dtype=dtype, device=device) * 4
    gate, up = gate_up.chunk(2, dim=1)
    close(triton_layer.gated_activation(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.skipif(INTERPRETS, reason="nothing is compiled where TRITON_INTERPRET is 1")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_they_compile_for(dtype: str, architecture: int) -> None:
    f, i = f"*{dtype}", "*i32"
    types = [f, f, f, f, i, i, i, i, i, "i32", "i32", "i32", "i32", "fp32"]
    for head_dim in (64, 128):
        shape = {"NUM_KV_HEADS": 3, "GROUP": 3, "GROUP_PADDED": 4, "KEYS": 64, "BLOCK_SIZE": 16}
        shape |= {"HEAD_DIM": head_dim, "DIM_PADDED": head_dim}
        options = {"num_stages": triton_attention.num_stages(head_dim * (2 if dtype == "bf16" else 4))}
        whole = {**shape, "ROWS": 64, "IS_SPLIT": False}
        shared = _compile(triton_attention.attention_kernel, types, whole, architecture, options)
        assert shared <= 163 * 1024, "what a block of an A100 can have"
    types[3:6] = ["*fp32", "*fp32", "*fp32"]
    split = {**shape, "ROWS": 16, "IS_SPLIT": True}
    _compile(triton_attention.attention_kernel, types, split, architecture, options)
    combine = {"SPLITS": 16, "HEAD_DIM": 64, "DIM_PADDED": 64}
    types = ["*fp32", "*fp32", "*fp32", f, "i32", "i32"]
    _compile(triton_attention.combine_kernel, types, combine, architecture)
    norm = {"DIM": 576, "BLOCK": 1024, "HAS_DELTA": True}
    _compile(triton_layer.norm_kernel, [f, f, f, f, "fp32"], norm, architecture)
    rotation = {"NUM_HEADS": 9, "NUM_KV_HEADS": 3, "HALF": 32, "HALF_PADDED": 32, "BLOCK_SIZE": 16}
    types = [f, i, i, f, f, f, f, f, f, "fp32"]
    _compile(triton_layer.rotate_kernel, types, {**rotation, "HAS_NORM": True}, architecture)
    _compile(triton_layer.activation_kernel, [f, f], {"DIM": 1536, "BLOCK": 1024}, architecture)


def _compile(
    kernel: Any,
    types: list[str],
    constants: dict[str, Any],
    architecture: int,
    options: dict[str, Any] | None = None,
) -> int:
    """Returns the bytes of shared memory that the kernel takes."""
    arguments = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(arguments, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={name: constants[name] for name in kernel.arg_names if name in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    return int(compiled.metadata.shared)
