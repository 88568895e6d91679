"""What the native kernels take of a step: `python -m load_tests.kernel_speed --model MODEL`

Runs the layers and the head alone, without scheduler, sampler or HTTP: decode steps of some sequences, the
prefill of one prompt, and the same where all its hidden states are asked for, for each quantisation, each
instruction set that the processor has, and keys and values in float32 and in bfloat16. The head is asked for
greedy tokens, as most steps do. Times are the least and the median over rounds in which all of them take
turns; layers and head follow each other, so that neither finds its weights in the caches unless both fit.
`gflops` counts two operations a weight of the maps used; `gbs` the bytes of their packed weights, which a
step of few sequences reads once. The last line is one JSON object.

`--stored-as bfloat16` rounds the weights first, so that they are held as those of a checkpoint in that type.

What the machine itself can do is measured beside: a large float32 product and the sum of a large array, by
torch with as many threads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from load_tests.run_record import record_run
from scone.kernels.packed_linear import INSTRUCTION_SETS
from scone.kernels.paged_attention import PagedBatch
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.decoder import Decoder
from scone.server.engine.native_forward import NativeForward

BLOCK_SIZE = 16
ROUND_SECONDS = 0.1
"""How long one piece is called again and again in a round."""


class Step(NamedTuple):
    """One step: `num_seqs` sequences, each with `num_tokens` new tokens at the end of its context, of which
    the hidden states of the last `num_wanted` are asked for.
    """

    name: str
    num_seqs: int
    num_tokens: int
    context_len: int
    num_wanted: int = 1


STEPS = (
    Step("decode 1", 1, 1, 64),
    Step("decode 8", 8, 1, 64),
    Step("decode 32", 32, 1, 64),
    Step("decode 1 after 1500", 1, 1, 1501),
    Step("decode 8 after 1500", 8, 1, 1501),
    Step("decode 32 after 1500", 32, 1, 1501),
    Step("prefill 512", 1, 512, 512),
    Step("prefill 512 after 1500", 1, 512, 2012),
    Step("score 512", 1, 512, 512, num_wanted=512),
)


def caches_for(decoder: Decoder, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values, as many as the largest step has; their values do not matter."""
    shape = decoder.config
    blocks = max(step.num_seqs * -(-step.context_len // BLOCK_SIZE) for step in STEPS)
    size = (shape.num_layers, blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    return torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)


class Setting(NamedTuple):
    """What is compared."""

    quantization: Any
    instruction_set: str
    kv_cache_dtype: str


class Bench:
    """One packed model; those of one `kv_cache_dtype` use the same caches."""

    def __init__(
        self,
        decoder: Decoder,
        caches: tuple[Tensor, Tensor],
        setting: Setting,
        num_threads: int,
    ) -> None:
        longest = max(step.context_len for step in STEPS)
        self.forward = NativeForward(
            decoder, setting.quantization, num_threads, longest, instruction_set=setting.instruction_set
        )
        maps = [p.numel() for name, p in decoder.named_parameters() if "_proj.weight" in name]
        self.num_weights = {"layers": sum(maps), "head": decoder.lm_head.weight.numel()}
        self.num_bytes = {"layers": self.forward.layer_bytes, "head": self.forward.head_bytes}
        self._dim = decoder.config.dim
        self._k_cache, self._v_cache = caches

    def pieces(self, step: Step) -> dict[str, Callable[[], Any]]:
        """The layers and the head of a step, ready to be called again and again."""
        num_rows = step.num_seqs * step.num_tokens
        blocks = -(-step.context_len // BLOCK_SIZE)
        first = step.context_len - step.num_tokens
        batch = PagedBatch(
            query_starts=torch.arange(0, num_rows + 1, step.num_tokens, dtype=torch.int32),
            context_lens=torch.full((step.num_seqs,), step.context_len, dtype=torch.int32),
            block_tables=torch.arange(step.num_seqs * blocks, dtype=torch.int32).view(step.num_seqs, blocks),
            slots=torch.empty(0, dtype=torch.int64),  # the native kernels find them in the block tables
            num_wanted=torch.full((step.num_seqs,), step.num_wanted, dtype=torch.int32),
        )
        positions = torch.arange(first, step.context_len, dtype=torch.int32).repeat(step.num_seqs)
        embeddings = torch.randn(num_rows, self._dim, generator=torch.Generator().manual_seed(0))
        hidden = torch.randn(step.num_seqs, self._dim, generator=torch.Generator().manual_seed(1))
        return {
            "layers": lambda: self.forward.forward(
                embeddings.clone(), positions, batch, self._k_cache, self._v_cache
            ),
            "head": partial(self.forward.best_tokens, hidden),
        }


def seconds(calls: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Times of single calls, which take turns as in a step: at least two of each, and for ROUND_SECONDS."""
    times: list[list[float]] = [[] for _ in calls]
    while len(times[0]) < 2 or sum(map(sum, times)) < ROUND_SECONDS:
        for call, taken in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
    return times


def measure(
    benches: dict[Setting, Bench], steps: Sequence[Step], rounds: int
) -> dict[tuple[Setting, Step, str], list[float]]:
    """Seconds by setting, step and piece."""
    pieces = {(setting, step): bench.pieces(step) for step in steps for setting, bench in benches.items()}
    times: dict[tuple[Setting, Step, str], list[float]] = {}
    for _ in range(rounds):
        for place, calls in pieces.items():
            for piece, taken in zip(calls, seconds(list(calls.values())), strict=True):
                times.setdefault((*place, piece), []).extend(taken)
    return times


def machine_speed(rounds: int) -> dict[str, float]:
    """Best of some rounds: float32 GFLOP/s of a product, GB/s of reading 256 MB."""
    a, many = torch.randn(1024, 1024), torch.ones(64 << 20)
    best = [min(min(taken) for taken in seconds([call])) for call in (lambda: a @ a, many.sum) * rounds]
    product, reading = min(best[::2]), min(best[1::2])
    return {"product_gflops": 2 * 1024**3 / product / 1e9, "read_gbs": many.nbytes / reading / 1e9}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the native kernels take of a step.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--stored-as", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", nargs="+", default=["none", "auto"])
    parser.add_argument("--instruction-sets", nargs="+", default=INSTRUCTION_SETS[:-1], metavar="SET")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--steps", nargs="+", default=[step.name for step in STEPS], metavar="STEP")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    decoder = open_checkpoint(arguments.model).decoder(getattr(torch, arguments.stored_as)).float()
    with torch.inference_mode():
        caches = {name: caches_for(decoder, getattr(torch, name)) for name in arguments.kv_cache_dtype}
        chosen = (arguments.quantization, arguments.instruction_sets, arguments.kv_cache_dtype)
        benches = {
            setting: Bench(decoder, caches[setting.kv_cache_dtype], setting, arguments.threads)
            for setting in map(Setting._make, product(*chosen))
        }
        steps = [step for step in STEPS if step.name in arguments.steps]
        times = measure(benches, steps, arguments.rounds)
    results = []
    for (setting, step, piece), taken in times.items():
        bench = benches[setting]
        rows = step.num_seqs * (step.num_tokens if piece == "layers" else 1)
        results.append(
            {
                "stored_as": arguments.stored_as,
                **setting._asdict(),
                "step": step.name,
                "piece": piece,
                "best_ms": 1e3 * min(taken),
                "median_ms": 1e3 * median(taken),
                "gflops": 2e-9 * bench.num_weights[piece] * rows / min(taken),
                "gbs": 1e-9 * bench.num_bytes[piece] / min(taken),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    record_run(arguments.model, arguments.threads, results, arguments.out, **machine_speed(arguments.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
