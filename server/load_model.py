"""From settings to a model that answers; imports torch, so it is imported only once the server listens."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_store import RecycledStore
from scone.model_store.checkpoint import open_checkpoint
from scone.server.api.state import ServedModel
from scone.server.device_metrics import DeviceCollector
from scone.server.engine.engine import Engine
from scone.server.metrics import ServerMetrics
from scone.server.model_device import model_device, model_dtype, placed, spare_cache_bytes
from scone.server.recycled_metrics import RecycledCollector
from scone.server.serve_settings import (
    engine_config,
    memory_budget,
    model_name,
    recycled_config,
    table_config,
)
from scone.server.served_recycled import ServedRecycled
from scone.server.served_table import ServedTable
from scone.server.settings import Resolved
from scone.server.step_metrics import StepCollector
from scone.server.table_metrics import TableCollector

logger = logging.getLogger(__name__)


def return_freed_memory() -> None:
    """Gives memory that nobody uses any more back to the system, where the C library is glibc.

    It keeps what each of the threads that read weights has freed: for SmolLM2-135M 480 MB beside 370 in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def served_recycled(path: str, store: RecycledStore, engine: Engine) -> ServedRecycled:
    """What operators see of a store that `engine` uses."""
    recycler, cost = engine.recycler, engine.recycle_cost
    assert recycler is not None
    assert cost is not None
    return ServedRecycled(
        path=path,
        store=store,
        cost=cost,
        forms=recycler.forms,
        block_tokens=engine.config.block_size,
    )


def _reserve_staging(memory: MemoryBudget, num_bytes: int) -> None:
    """The rings take their part of the budget; nothing is served without them, so they are there anyway."""
    if not memory.join("staging").reserve(num_bytes):
        logger.warning(
            "ram_bytes is %d, and the staging rings take %d beyond what is free of it: give it more",
            memory.total_bytes,
            num_bytes,
        )


class ModelLoader:
    """Loads step by step; says each step in the log and in `startup_seconds{phase}`."""

    def __init__(self, settings: Resolved, metrics: ServerMetrics) -> None:
        self._settings = settings
        self._metrics = metrics

    def load(self) -> ServedModel:
        """A started engine and what belongs to it; raises SconeError."""
        settings = self._settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        device = model_device(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: Triton compiles and launches for it
        dtype = model_dtype(settings.dtype, device)
        with self._phase("checkpoint", f"opening {settings.model}"):
            checkpoint = open_checkpoint(settings.model)
            on_cuda = device.type == "cuda"
            config = engine_config(settings, checkpoint.config.max_position, on_cuda=on_cuda)
        with self._phase("tokenizer", "reading the tokenizer"):
            tokenizer = checkpoint.tokenizer()
        memory = memory_budget(settings)
        table = self._open_table(memory, checkpoint.model_hash, tokenizer.hash)
        with self._phase("weights", f"reading the weights as {dtype}, for {device}"):
            decoder = checkpoint.decoder(dtype)
            if settings.kronecker == "table":
                decoder.precompute_embeddings()
            decoder = placed(decoder, device)
            if on_cuda and settings.kv_cache_bytes is None:
                config = replace(config, kv_cache_bytes=spare_cache_bytes(device, settings.device_bytes))
        store = None
        if memory is not None:
            with self._phase("recycled", f"opening the store of recycled states {settings.recycled}"):
                store = RecycledStore.open(Path(settings.recycled), recycled_config(settings), memory)
        with self._phase("engine", "starting the engine"):
            engine = Engine(
                config,
                decoder,
                tokenizer,
                None if table is None else table.table,
                checkpoint.model_hash,
                observer=self._metrics,
                recycled=store,
            )
            recycled = None
            if store is not None and memory is not None:
                recycled = served_recycled(settings.recycled, store, engine)
                _reserve_staging(memory, engine.overlay.ring.num_bytes + recycled.forms.staging_bytes)
            engine.start()
            if engine.cache_pages is not None:
                engine.cache_pages.start()
            self._watch(engine, table, store)
        del decoder
        return_freed_memory()
        return ServedModel(
            name=model_name(settings),
            engine=engine,
            tokenizer=tokenizer,
            table=table,
            max_model_len=config.max_model_len,
            dim=checkpoint.config.dim,
            num_layers=checkpoint.config.num_layers,
            recycled=recycled,
        )

    def _open_table(
        self, memory: MemoryBudget | None, model_hash: str, tokenizer_hash: str
    ) -> ServedTable | None:
        settings = self._settings
        if settings.table is None:
            return None
        with self._phase("table", f"opening the table {settings.table}"):
            table = ServedTable(settings.table, table_config(settings, torch.get_num_threads(), memory))
            table.table.check_model(model_hash, tokenizer_hash)
            logger.info("  %d f-grams of up to %d tokens", table.table.num_fgrams, table.table.max_n)
        return table

    def _watch(self, engine: Engine, table: ServedTable | None, store: RecycledStore | None) -> None:
        if store is not None:
            self._metrics.watch(RecycledCollector(store))
        self._metrics.watch_engine(engine.stats)
        if engine.kv_cache_size is not None:
            size = engine.kv_cache_size
            self._metrics.kv_cache_bytes.labels(size.dtype_name).set(size.num_bytes)
        self._metrics.watch(DeviceCollector(engine.overlay))
        self._metrics.watch(StepCollector(engine.clock))
        if table is not None:
            self._metrics.watch(TableCollector(table))

    @contextmanager
    def _phase(self, name: str, text: str) -> Iterator[None]:
        logger.info("%s", text)
        started = time.monotonic()
        yield
        self._metrics.startup_seconds.labels(name).set(time.monotonic() - started)
