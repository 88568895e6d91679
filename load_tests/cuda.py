"""What a model with a table does on a GPU: `python -m load_tests.cuda [--model GGUF]`, or `make bench-cuda`

The engine itself, in process, without HTTP: decode steps of 1 to 128 sequences by CUDA graphs and by
single launches, and the time to the first token of prompts of 2,000 tokens; without a table, and with one
whose rows lie in device memory, in RAM, on disk in the page cache, and on disk with the page cache dropped
before each run. Rows are random, 1M of SmolLM2's 576 values unless told otherwise; keys are counted from
made-up text with the skew of real text. Without `--model`, weights of SmolLM2-135M's shape are random, which
costs the same time. So that f-grams are met as in text, sequences are made to follow it: one more small
launch a step, table or not.

`step_ms` is what a step takes, from scheduling to the last delta; `graph_ms` a replay alone, on the device,
with empty contexts; `period_ms` what passes from one token of a sequence to its next. Medians. transformers'
`generate` is measured beside, with weights of the same shape, where it is installed. A part that fails says
why and the rest goes on. Figures are printed when they are known; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache import FGramTable, TableConfig
from scone.cache.device import Device
from scone.cache.lookup_workload import drop_from_page_cache, resident_share, row_file, write_table
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.decoder import Decoder
from scone.model_store.model_config import ModelConfig
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_vocabulary
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.model_runner import ALL_LAYERS, ModelRunner
from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.engine.row_overlay import staging_device
from scone.server.engine.scheduler import Chunk
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49_152,
    dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_dim=1536,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    max_position=8192,
    tied_head=True,
    eos_ids=(2,),
)
TABLES: dict[str, TableConfig | None] = {
    "none": None,
    "device": TableConfig(device_bytes=1 << 50),
    "ram": TableConfig(ram_bytes=1 << 50),
    "disk_warm": TableConfig(ram_bytes=0, disk_reader="mmap"),
    "disk_cold": TableConfig(ram_bytes=0, disk_reader="mmap"),
    "disk_cold_direct": TableConfig(ram_bytes=0, disk_reader="direct"),
}
SHORT_PROMPT, LONG_PROMPT = 64, 2000
MAX_MODEL_LEN = 2304
_numbers = itertools.count()


class Texts:
    """The text that each request follows, by the order of arrival."""

    def __init__(self, tokens: NDArray[np.int64]) -> None:
        self._tokens = tokens
        self.num_requests = 0

    def prompt(self, length: int) -> tuple[int, ...]:
        """Of the next request; requests must be submitted in the order in which this is called."""
        start = self._start(self.num_requests)
        self.num_requests += 1
        return tuple(self._tokens[start : start + length].tolist())

    def token(self, request: int, place: int) -> int:
        return int(self._tokens[self._start(request) + place])

    def _start(self, request: int) -> int:
        return request * 7919 % (len(self._tokens) - MAX_MODEL_LEN)


class TextFollower(ModelRunner):
    """Makes the next token of its text each sequence's likeliest; mixed in before what computes."""

    texts: Texts

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange = ALL_LAYERS) -> Tensor:
        self._next = [
            self.texts.token(c.seq.arrival, c.start + c.num_tokens) for c in chunks if c.reaches_end
        ]
        return super().forward(chunks, embeddings, layers)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        tokens = torch.tensor(self._next).to(logits.device, non_blocking=True)
        return logits.scatter_(1, tokens[:, None], 1e4)


class StepTimes(SilentObserver):
    """Seconds of the steps that only decoded so many sequences."""

    def __init__(self) -> None:
        self.num_seqs = 0
        self.seconds: list[float] = []

    def on_step(self, stats: StepStats) -> None:
        if stats.num_decode_tokens == self.num_seqs and not stats.num_prefill_tokens:
            self.seconds.append(stats.seconds)


class Bench:
    """One model, one engine with graphs and one without, a table, and text."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.device = torch.device(args.device)
        self._work, self._args = work, args
        self.decoder, self.tokenizer, self.weights = load_model(args.model, self.device, args.layers)
        corpus = made_up_corpus(args.corpus_tokens)
        self.texts = Texts(corpus.tokens.astype(np.int64))
        self.engines: dict[str, Engine] = {}
        self.runners: dict[str, ModelRunner] = {}
        self.times = StepTimes()
        self._corpus = corpus
        self._table_path: Path | None = None
        self._held: FGramTable | None = None

    @property
    def table_path(self) -> Path:
        """The table, written when it is first asked for."""
        if self._table_path is None:
            path, _ = write_table(
                self._work, self._corpus, num_rows=self._args.rows, min_count=5, dim=self.decoder.config.dim
            )
            self._table_path = path
        return self._table_path

    def engine(self, name: str) -> Engine:
        """`graphs`, `eager` or `torch`; started when first asked for."""
        if name not in self.engines:
            config = EngineConfig(
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=max(self._args.seqs),
                max_num_batched_tokens=max(2048, *self._args.seqs),
                kv_cache_bytes=self._args.kv_cache_bytes,
                enable_prefix_caching=False,
                enforce_eager=name == "eager",
                backend="torch" if name == "torch" else "auto",
            )
            device = staging_device(self.device)
            runner = self._runner(config, device)
            self.runners[name] = runner
            self.engines[name] = engine = Engine(
                config, runner, self.tokenizer, None, "6d" * 32, observer=self.times, device=device
            )
            engine.start()
        return self.engines[name]

    def start(self, name: str) -> str:
        """Starts an engine; says what computes there."""
        self.engine(name)
        return self.runners[name].backend

    def _runner(self, config: EngineConfig, device: Device) -> ModelRunner:
        if self.device.type == "cuda" and config.backend == "auto":
            from scone.server.engine.cuda_runner import CudaRunner

            class Runner(TextFollower, CudaRunner):
                texts = self.texts

            return Runner(self.decoder, config, device)

        class PlainRunner(TextFollower):
            texts = self.texts

        return PlainRunner(self.decoder, config)

    def use(self, engine: Engine, table: str) -> FGramTable | None:
        """Gives the engine this kind of table, newly opened: the page cache keeps what is mapped."""
        self._swap(engine, None)
        config = TABLES[table]
        if config is None:
            return None
        if table.startswith("disk_cold"):
            drop_from_page_cache(row_file(self.table_path))
        elif table == "disk_warm":
            row_file(self.table_path).read_bytes()
        opened = FGramTable.open(self.table_path, config)
        opened.wait_loaded()
        self._swap(engine, opened)
        return opened

    def _swap(self, engine: Engine, table: FGramTable | None) -> None:
        retired = threading.Event()
        engine.swap_table(table, retired.set)
        if not retired.wait(60):
            raise TimeoutError("the former table is still in use after 60 s")
        if self._held is not None:
            self._held.close()
        self._held = table

    def resident(self) -> float:
        """The share of the rows that is in the page cache."""
        return round(resident_share(row_file(self.table_path)), 3)

    def generate(
        self, engine: Engine, num_seqs: int, prompt_tokens: int, num_tokens: int
    ) -> dict[str, float]:
        """Equal requests, submitted at once: seconds until all have their first token, and from then on."""
        self.times.num_seqs, self.times.seconds = num_seqs, []
        firsts: dict[str, float] = {}
        ends: list[tuple[float, str | None]] = []
        is_over = threading.Event()

        def on_delta(name: str, delta: Delta) -> None:
            firsts.setdefault(name, time.perf_counter())
            if delta.finish_reason is not None:
                ends.append((time.perf_counter(), delta.error))
                if len(ends) == num_seqs:
                    is_over.set()

        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
        requests = []
        for _ in range(num_seqs):
            name = str(next(_numbers))
            request = GenerationRequest(
                request_id=name, input_ids=self.texts.prompt(prompt_tokens), sampling=sampling
            )
            requests.append((request, partial(on_delta, name)))
        began = time.perf_counter()
        engine.submit_batch(requests)
        if not is_over.wait(60):
            raise TimeoutError("the requests did not end within 60 s")
        errors = [error for _, error in ends if error]
        if errors:
            raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
        first = max(firsts.values())
        return {"first_token": first - began, "decode": max(t for t, _ in ends) - first}

    def decode(self, kind: str, table: str, num_seqs: int) -> dict[str, Any]:
        """Steps of `num_seqs` sequences that decode, for a number of tokens each."""
        engine, num_tokens = self.engine(kind), self._args.tokens
        opened = self.use(engine, table)
        if not table.startswith("disk_cold"):
            self.generate(engine, num_seqs, SHORT_PROMPT, 4)
        resident = None if opened is None else self.resident()
        looked_up = None if opened is None else opened.stats.lookups.copy()
        run = self.generate(engine, num_seqs, SHORT_PROMPT, num_tokens)
        result: dict[str, Any] = {
            "step_ms": round(1e3 * median(self.times.seconds), 4),
            "p99_step_ms": round(1e3 * float(np.percentile(self.times.seconds, 99)), 4),
            "period_ms": round(1e3 * run["decode"] / (num_tokens - 1), 4),
            "tokens_per_second": round(num_seqs * (num_tokens - 1) / run["decode"]),
        }
        if resident is not None:
            result["resident"] = resident
        if opened is not None and looked_up is not None:
            met = {n: int(v - looked_up.get(n, 0)) for n, v in opened.stats.lookups.items()}
            result["matched"] = round(1 - met.get(1, 0) / max(1, sum(met.values())), 3)
        return result

    def first_token(self, kind: str, table: str, repeats: int) -> dict[str, Any]:
        """Milliseconds to the first token of a long prompt that is alone."""
        engine, is_cold = self.engine(kind), table.startswith("disk_cold")
        opened = self.use(engine, table)
        if not is_cold:
            self.generate(engine, 1, LONG_PROMPT, 1)
        resident, seconds = 0.0, []
        for _ in range(repeats):
            if is_cold:
                self.use(engine, table)
            resident = 0.0 if opened is None else self.resident()
            seconds.append(self.generate(engine, 1, LONG_PROMPT, 1)["first_token"])
        ms = {"ms": round(1e3 * median(seconds), 3), "least_ms": round(1e3 * min(seconds), 3)}
        return ms if opened is None else ms | {"resident": resident}

    def graph_times(self) -> dict[str, float]:
        """Milliseconds of a replay alone, on the device; contexts are empty."""
        self.engine("graphs")
        runner: Any = self.runners["graphs"]
        graphs = runner._graphs
        result = {}
        with torch.inference_mode():
            for size in graphs.sizes:
                runner._prepare_padding(size)
                events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]  # type: ignore[no-untyped-call]
                for event in events:
                    event.record()
                    graphs.replay(size)
                torch.cuda.synchronize()
                times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
                result[str(size)] = round(median(times), 4)
        return result

    def close(self) -> None:
        for engine in self.engines.values():
            engine.shutdown(timeout_seconds=5)
        if self._held is not None:
            self._held.close()


def load_model(path: str | None, device: torch.device, num_layers: int) -> tuple[Decoder, Tokenizer, str]:
    """The decoder in bfloat16 (float32 on a CPU), its tokenizer, and what the weights are."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if path is not None:
        from scone.model_store.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        return checkpoint.decoder(dtype).to(device), checkpoint.tokenizer(), Path(path).name
    config = ModelConfig(**{**vars_of(SMOLLM2_135M), "num_layers": num_layers})
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    tokenizer = tokenizer_from_vocabulary(
        pieces=["<unk>", "<s>", "</s>", "a"],
        piece_types=[3, 3, 3, 1],
        merges=[],
        pre_tokenizer="gpt-2",
        bos_id=1,
        add_bos=False,
        eos_ids=(2,),
        chat_template=None,
    )
    return (
        decoder.requires_grad_(False).eval(),
        tokenizer,
        f"random, {num_layers} layers of SmolLM2-135M's shape",
    )


def vars_of(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def transformers_decode(num_seqs: int, num_tokens: int) -> dict[str, float]:
    """`generate`, greedy, bfloat16, in process; weights of the same shape, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = SMOLLM2_135M
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).cuda().eval()
    ids = torch.randint(3, c.vocab_size, (num_seqs, SHORT_PROMPT), device="cuda")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    seconds = []
    with torch.inference_mode():
        for tokens in (4, 1, num_tokens):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    decode = seconds[2] - seconds[1]
    return {
        "period_ms": round(1e3 * decode / (num_tokens - 1), 3),
        "tokens_per_second": round(num_seqs * (num_tokens - 1) / decode),
    }


def machine() -> dict[str, Any]:
    """What this runs on."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "host": platform.machine()}
    with suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        with suppress(OSError, subprocess.SubprocessError):
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,power.limit",
                "--format=csv,noheader",
            ]
            about["nvidia_smi"] = subprocess.run(
                query, capture_output=True, text=True, timeout=10
            ).stdout.strip()
    return about


class Report:
    """Figures by name; a part that fails leaves its reason."""

    def __init__(self, limit_seconds: float) -> None:
        self.figures: dict[str, Any] = {}
        self._ends_at = time.monotonic() + limit_seconds

    def take(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        began = time.monotonic()
        if began > self._ends_at:
            figures: Any = "not measured: out of time"
        else:
            try:
                figures = measure()
            except Exception as error:
                traceback.print_exc(limit=-6)
                figures = f"failed: {type(error).__name__}: {error}"[:300]
        self.figures.setdefault(part, {})[name] = figures
        print(f"{part} {name}: {json.dumps(figures)} ({time.monotonic() - began:.1f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="GGUF file or folder (default: random weights of SmolLM2-135M's shape)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this out")
    parser.add_argument("--parts", nargs="+", default=["decode", "first_token", "transformers"])
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--tokens", type=int, default=65, help="tokens that each sequence generates")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=SMOLLM2_135M.num_layers)
    parser.add_argument("--corpus-tokens", type=int, default=4_000_000)
    parser.add_argument("--kv-cache-bytes", type=int, default=4 << 30)
    parser.add_argument(
        "--limit", type=float, default=150.0, help="seconds after which nothing more is begun"
    )
    parser.add_argument("--work", help="folder for the table, which is kept (default: a new one, removed)")
    parser.add_argument("--out", help="file for the JSON object")
    args = parser.parse_args()
    if args.device == "cpu":
        args.tables = [t for t in args.tables if t != "device"]
    report = Report(args.limit)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode(False):
        work = Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        bench = Bench(args, work)
        print(f"model: {bench.weights}, {time.monotonic() - began:.1f} s", flush=True)
        kinds = ["graphs", "eager"] if args.device == "cuda" else ["torch"]
        for kind in kinds:
            report.take("start", kind, partial(bench.start, kind))
        if args.device == "cuda":
            report.take("graph_ms", "by_size", bench.graph_times)
        if set(args.tables) != {"none"}:
            report.take("start", "table", lambda: {"rows": args.rows, "path": bench.table_path.name})
        if "decode" in args.parts:
            pairs = [(kind, "none") for kind in kinds] + [(kinds[0], t) for t in args.tables if t != "none"]
            for kind, table in pairs:
                for num in args.seqs:
                    report.take(f"decode {kind} {table}", str(num), partial(bench.decode, kind, table, num))
        if "first_token" in args.parts:
            for table in args.tables:
                report.take("first_token", table, partial(bench.first_token, kinds[0], table, 5))
        if "transformers" in args.parts and args.device == "cuda":
            for num in (1, 8, 32):
                report.take("transformers", str(num), partial(transformers_decode, num, args.tokens))
        bench.close()
    result = {
        "benchmark": "cuda",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "weights": bench.weights,
        "dim": bench.decoder.config.dim,
        "rows": args.rows,
        "prompt_tokens": {"decode": SHORT_PROMPT, "first_token": LONG_PROMPT},
        **report.figures,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
