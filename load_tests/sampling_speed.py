"""What choosing tokens takes of a step: `python -m load_tests.sampling_speed --model MODEL`

The engine itself, in process, without HTTP: steps in which 1, 8 and 32 sequences decode, once for each way of
choosing their tokens, from greedy to penalties and log-probabilities. Prompts are stretches of Python's
standard library. Times are the least and the median over the steps of all rounds, in which the ways take
turns; what a way takes beyond greedy is its choosing, the logits that greedy steps do not write included. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from load_tests.run_record import record_run
from load_tests.workload import prompts, read_library
from scone.model_store.checkpoint import open_checkpoint
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

DRAWN = SamplingParams(temperature=0.8, seed=1, ignore_eos=True)
GREEDY = replace(DRAWN, temperature=0.0)
WAYS = {
    "greedy": GREEDY,
    "greedy, 5 logprobs": replace(GREEDY, logprobs=5),
    "greedy, penalties": replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
    "temperature 0.8": DRAWN,
    "top_p 0.95": replace(DRAWN, top_p=0.95),
    "top_k 50": replace(DRAWN, top_k=50),
    "min_p 0.05": replace(DRAWN, min_p=0.05),
    "top_k 50, top_p 0.95": replace(DRAWN, top_k=50, top_p=0.95),
    "temperature 0.8, 5 logprobs": replace(DRAWN, logprobs=5),
    "temperature 3, top_p 0.95": replace(DRAWN, temperature=3.0, top_p=0.95),
}
PROMPT_CHARS, NUM_PROMPT_TOKENS = 200, 25


class StepTimes(SilentObserver):
    """Seconds of the steps in which so many sequences decoded, and nothing else was done."""

    def __init__(self) -> None:
        self.num_seqs = 0
        self.seconds: list[float] = []

    def on_step(self, stats: StepStats) -> None:
        if stats.num_decode_tokens == self.num_seqs and not stats.num_prefill_tokens:
            self.seconds.append(stats.seconds)


class Bench:
    """One engine and prompts for it."""

    def __init__(self, model: str, num_threads: int, max_num_seqs: int) -> None:
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
        config = EngineConfig(max_model_len=512, max_num_seqs=max_num_seqs, num_threads=num_threads)
        self._times = StepTimes()
        self._engine = Engine(
            config, checkpoint.decoder(), tokenizer, None, checkpoint.model_hash, observer=self._times
        )
        self._engine.start()
        texts = prompts(read_library(), PROMPT_CHARS, PROMPT_CHARS, seed=0)
        self._prompts = (tuple(tokenizer.encode(text)[:NUM_PROMPT_TOKENS]) for text in texts)
        self._numbers = itertools.count()

    def steps(self, way: SamplingParams, num_seqs: int, num_tokens: int) -> list[float]:
        """Seconds of each step in which so many new sequences decode; the first ones are left out."""
        self._times.num_seqs, self._times.seconds = num_seqs, []
        num_open, is_over = num_seqs, threading.Event()

        def on_delta(delta: Delta) -> None:
            nonlocal num_open
            if delta.error is not None:
                raise RuntimeError(delta.error)
            if delta.finish_reason is not None:
                num_open -= 1
                if num_open == 0:
                    is_over.set()

        sampling = replace(way, max_tokens=num_tokens)
        requests = [
            GenerationRequest(
                request_id=str(next(self._numbers)), input_ids=next(self._prompts), sampling=sampling
            )
            for _ in range(num_seqs)
        ]
        self._engine.submit_batch([(request, on_delta) for request in requests])
        if not is_over.wait(60):
            raise TimeoutError("the requests did not end within 60 s")
        return self._times.seconds[2:]

    def close(self) -> None:
        self._engine.shutdown(timeout_seconds=5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What choosing tokens takes of a step.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--tokens", type=int, default=32, help="that each sequence generates")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    bench = Bench(arguments.model, arguments.threads, max(arguments.num_seqs))
    times: dict[tuple[int, str], list[float]] = {}
    try:
        for _, num_seqs, way in itertools.product(
            range(arguments.rounds), arguments.num_seqs, arguments.ways
        ):
            taken = bench.steps(WAYS[way], num_seqs, arguments.tokens)
            times.setdefault((num_seqs, way), []).extend(taken)
    finally:
        bench.close()
    results = [
        {
            "num_seqs": n,
            "way": way,
            "best_ms": round(1e3 * min(taken), 3),
            "median_ms": round(1e3 * median(taken), 3),
            "num_steps": len(taken),
        }
        for (n, way), taken in times.items()
    ]
    for result in results:
        print(json.dumps(result), flush=True)
    record_run(arguments.model, arguments.threads, results, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
