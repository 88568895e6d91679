"""`scone serve` around a model that only takes time: what a host does for a GPU, on a machine without one.

Everything is the server's own but the model (`server/paced_model.py`), whose steps take a device so long.
Prompts are token ids; whatever they are, they are continued as a made-up text goes on, so that f-grams match.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

from scone.cache import FGramTable, TableConfig
from scone.server.api.app import create_app
from scone.server.api.config import ApiConfig
from scone.server.api.http_server import HttpServer, listen, new_event_loop
from scone.server.api.state import ServedModel, ServerState
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.metrics import ServerMetrics
from scone.server.paced_benchmark import VOCAB_SIZE, Workload, make_workload
from scone.server.paced_model import PacedDevice, PacedModel
from scone.server.step_metrics import StepCollector

DIM = 576
NUM_TEXTS = 64
MAX_MODEL_LEN = 2560
PREFILL_TOKENS_PER_SECOND = 1e6
"""An H200's, of the model of docs/engine.md: 2.1 ms for 2,048 tokens."""

ROWS: dict[str, TableConfig | None] = {
    "none": None,
    "ram": TableConfig(ram_bytes=1 << 50),
    "device": TableConfig(ram_bytes=1 << 50, device_bytes=1 << 50),
}
"""Where the table's rows lie; none: there is no table."""


def make_engine(
    workload: Workload, table: FGramTable | None, metrics: ServerMetrics, options: argparse.Namespace
) -> Engine:
    max_num_seqs = options.max_num_seqs
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        max_num_queued_reqs=4 * max_num_seqs,
        enable_prefix_caching=False,  # what was computed before would not be computed again
    )
    device = PacedDevice()
    model = PacedModel(
        device,
        workload.texts(NUM_TEXTS, MAX_MODEL_LEN + 1),
        config,
        dim=workload.dim,
        vocab_size=VOCAB_SIZE,
        num_blocks=max_num_seqs * -(-MAX_MODEL_LEN // config.block_size),
        decode_seconds=options.step_ms / 1e3,
        prefill_tokens_per_second=PREFILL_TOKENS_PER_SECOND,
    )
    model.is_asynchronous = not options.in_order
    return Engine(config, model, workload.tokenizer, table, "paced", observer=metrics, device=device)


async def serve(state: ServerState, port: int) -> None:
    """Until a signal."""
    server = HttpServer(create_app(state), state, listen("127.0.0.1", port))
    with server.stopped_by_signals():
        await server.run_until_stopped()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.paced_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=0.85, help="of the device (default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument(
        "--in-order", action="store_true", help="deliver each step before the next one, as on a CPU"
    )
    parser.add_argument("--rows", choices=ROWS, default="none", help="where the table's rows lie")
    parser.add_argument("--num-rows", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="folder for the table, kept for other runs")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    metrics = ServerMetrics()
    state = ServerState(ApiConfig(), metrics)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paced-server-")))
        work.mkdir(parents=True, exist_ok=True)
        workload = make_workload(work, num_rows=options.num_rows, dim=DIM, num_corpus_tokens=2_000_000)
        table = None
        if (config := ROWS[options.rows]) is not None:
            table = stack.enter_context(FGramTable.open(workload.table, config))
            table.wait_loaded()
        engine = make_engine(workload, table, metrics, options)
        engine.start()
        stack.callback(engine.shutdown, timeout_seconds=0)
        metrics.watch_engine(engine.stats)
        metrics.watch(StepCollector(engine.clock))
        state.serve(
            ServedModel(
                name="paced",
                engine=engine,
                tokenizer=workload.tokenizer,
                table=None,
                max_model_len=MAX_MODEL_LEN,
                dim=DIM,
                num_layers=1,
            )
        )
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve(state, options.port))


if __name__ == "__main__":
    main()
