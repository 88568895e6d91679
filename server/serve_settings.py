"""The settings of `scone serve`; `scone check-config` reads the same."""

from __future__ import annotations

from pathlib import Path

from scone.cache import TableConfig
from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.table_config import DISK_READERS, auto_bytes
from scone.server.api.config import ApiConfig
from scone.server.engine.engine_config import EngineConfig
from scone.server.errors import SettingError
from scone.server.settings import Resolved, Setting, parse_bool, parse_bytes

_TABLE = TableConfig()
_ENGINE = EngineConfig()
_API = ApiConfig()
_RECYCLED = RecycledConfig()

CUDA_NUM_SEQS, CUDA_NUM_BATCHED_TOKENS = 256, 2048
"""Steps there take hardly longer for more of them."""

MODEL_SETTINGS = (
    Setting(name="model", required=True, help="GGUF file, Hugging Face folder or SCONE checkpoint folder"),
    Setting(name="table", help="f-gram table made by `scone build`; none serves the plain model"),
    Setting(
        name="served_model_name", help="name in /v1/models and in requests (default: the model's file name)"
    ),
    Setting(
        name="device",
        default="auto",
        help="where the model runs: cpu, cuda, cuda:1; auto is CUDA if torch sees a device",
    ),
    Setting(
        name="dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of weights and activations; auto is float32 on a CPU, bfloat16 on CUDA",
    ),
    Setting(
        name="kronecker",
        default="table",
        choices=("table", "bytes"),
        help="Kronecker token embeddings: made into a table at start, or of their bytes each time",
    ),
    Setting(name="threads", kind=int, help="CPU threads for the model (default: all cores)"),
)


def parse_budget(text: str) -> int | None:
    """A number of bytes, or `auto` (None)."""
    return None if text.strip().lower() == "auto" else parse_bytes(text)


TABLE_SETTINGS = (
    Setting(
        name="ram_bytes",
        kind=parse_budget,
        help="memory for the table's index and most frequent rows and for recycled states, as in 4GiB;"
        " 0 leaves all of the table to the page cache (default: auto, 40 % of what is free)",
    ),
    Setting(
        name="device_bytes",
        kind=parse_bytes,
        default=_TABLE.device_bytes,
        help="accelerator memory for the table's most frequent rows; refused where the model runs on the CPU",
    ),
    Setting(
        name="disk_reader",
        default=_TABLE.disk_reader,
        choices=DISK_READERS,
        help="how other rows are read: mmap (page cache) or direct (past it, each page checked each time)",
    ),
    Setting(
        name="io_depth",
        kind=int,
        default=_TABLE.io_depth,
        help="reads under way at a time when reading directly",
    ),
)

RECYCLED_SETTINGS = (
    Setting(
        name="recycled",
        help="folder in which computed states are kept for reuse, also by other servers on this host"
        " (default: none are kept)",
    ),
    Setting(
        name="disk_bytes",
        kind=parse_bytes,
        default=_RECYCLED.disk_bytes,
        help="what that folder may take on disk, as in 8GiB",
    ),
    Setting(
        name="recycled_blocks",
        default=_ENGINE.recycled_blocks,
        choices=("auto", "kv", "hidden"),
        help="what is kept of a prompt's tokens: kv, keys and values; hidden, the inputs of all layers (with"
        " multi-head attention half the bytes); auto, what is restored sooner by measured speeds",
    ),
)

KV_CACHE_DTYPE = Setting(
    name="kv_cache_dtype",
    default=_ENGINE.kv_cache_dtype,
    choices=("auto", "float32", "bfloat16"),
    help="how keys and values are held; auto is dtype, but on a CPU bfloat16, half the memory, where"
    " quantization rounds the inputs of the layers' maps",
)

ENGINE_SETTINGS = (
    Setting(
        name="max_model_len",
        kind=int,
        help="longest prompt plus answer in tokens (default: the model's own limit, at most 8192)",
    ),
    Setting(
        name="max_num_seqs",
        kind=int,
        help=f"sequences that share a step (default: {_ENGINE.max_num_seqs}, on CUDA {CUDA_NUM_SEQS})",
    ),
    Setting(
        name="max_num_batched_tokens",
        kind=int,
        help="tokens that a step computes; longer prompts are cut into chunks"
        f" (default: {_ENGINE.max_num_batched_tokens}, on CUDA {CUDA_NUM_BATCHED_TOKENS})",
    ),
    Setting(name="block_size", kind=int, default=_ENGINE.block_size, help="tokens per KV block"),
    Setting(
        name="kv_cache_bytes",
        kind=parse_bytes,
        help="memory for keys and values, as in 2GiB (default: 1 GiB; on CUDA four fifths of what the weights"
        " and device_bytes leave free, at most what max_num_seqs sequences of max_model_len need)",
    ),
    KV_CACHE_DTYPE,
    Setting(
        name="max_num_queued_reqs",
        kind=int,
        default=_ENGINE.max_num_queued_reqs,
        help="requests that may wait; more are answered 503 queue_full",
    ),
    Setting(
        name="max_num_queued_tokens",
        kind=int,
        default=_ENGINE.max_num_queued_tokens,
        help="prompt tokens that may wait; more are answered 503 queue_full",
    ),
    Setting(
        name="max_num_staged_tokens",
        kind=int,
        default=_ENGINE.max_num_staged_tokens,
        help="prompt tokens of waiting requests whose rows may be read ahead",
    ),
    Setting(
        name="enable_prefix_caching",
        kind=parse_bool,
        default=_ENGINE.enable_prefix_caching,
        help="reuse keys and values of equal beginnings",
    ),
    Setting(
        name="quantization",
        default=_ENGINE.quantization,
        choices=("auto", "none", "bfloat16", "int8", "int4"),
        help="bits of the layers' weights; auto takes the fewest that keep the checkpoint's values",
    ),
    Setting(
        name="backend",
        default=_ENGINE.backend,
        choices=("auto", "native", "triton", "torch"),
        help="what computes: native kernels (CPU), Triton's (CUDA), torch; auto is the first that there is",
    ),
    Setting(
        name="enforce_eager",
        kind=parse_bool,
        default=_ENGINE.enforce_eager,
        help="on CUDA, launch the kernels of each step one by one instead of running CUDA graphs",
    ),
    Setting(
        name="deterministic",
        kind=parse_bool,
        default=_ENGINE.deterministic,
        help="start only if answers are the same bits alone, in any batch, and with any cache",
    ),
)

HTTP_SETTINGS = (
    Setting(name="host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all"),
    Setting(name="port", kind=int, default=8000, help="port to listen on; 0 takes a free one"),
    Setting(name="api_key", many=True, secret=True, help="keys that open the server; none leaves it open"),
    Setting(name="api_key_file", help="file with one key a line, added to api_key"),
    Setting(
        name="metrics_need_key",
        kind=parse_bool,
        default=_API.metrics_need_key,
        help="/metrics asks for a key too",
    ),
    Setting(
        name="cors_allow_origins", many=True, help="origins whose pages may call the server (default: none)"
    ),
    Setting(
        name="max_body_bytes",
        kind=parse_bytes,
        default=_API.max_body_bytes,
        help="larger request bodies are refused",
    ),
    Setting(name="max_prompts", kind=int, default=_API.max_prompts, help="prompts in one request"),
    Setting(
        name="queue_timeout",
        kind=float,
        default=_API.queue_timeout,
        help="seconds until a request still waiting is answered 503; 0 is no limit",
    ),
    Setting(
        name="request_timeout",
        kind=float,
        default=_API.request_timeout,
        help="seconds until an unfinished request is answered 504; 0 is no limit",
    ),
    Setting(
        name="stall_timeout",
        kind=float,
        default=_API.stall_timeout,
        help="seconds without a step, though there is work, until /health fails",
    ),
    Setting(
        name="keep_alive_interval",
        kind=float,
        default=_API.keep_alive_interval,
        help="seconds of silence until a stream gets a comment",
    ),
    Setting(
        name="drain_delay",
        kind=float,
        default=_API.drain_delay,
        help="seconds from SIGTERM, and /ready off, until new requests are refused",
    ),
    Setting(
        name="drain_timeout",
        kind=float,
        default=_API.drain_timeout,
        help="seconds that requests in flight may then go on",
    ),
    Setting(
        name="log_level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="least level logged",
    ),
    Setting(name="log_format", default="text", choices=("text", "json"), help="how log lines look"),
)

SERVE_SETTINGS = (*MODEL_SETTINGS, *TABLE_SETTINGS, *RECYCLED_SETTINGS, *ENGINE_SETTINGS, *HTTP_SETTINGS)


def api_config(settings: Resolved) -> ApiConfig:
    """The HTTP side's part; reads the key file; raises SettingError."""
    keys = [*(settings.api_key or ()), *_keys_in(settings.api_key_file)]
    if settings.api_key_file and not keys:
        raise SettingError(f"api_key_file {settings.api_key_file} holds no key, wanted one a line")
    for name in ("queue_timeout", "request_timeout", "drain_delay", "drain_timeout"):
        if settings.values[name] < 0:
            raise SettingError(f"{name} is {settings.values[name]}, wanted 0 or more seconds")
    for name in ("stall_timeout", "keep_alive_interval", "max_body_bytes", "max_prompts"):
        if settings.values[name] <= 0:
            raise SettingError(f"{name} is {settings.values[name]}, wanted more than 0")
    return ApiConfig(
        api_keys=tuple(keys),
        metrics_need_key=settings.metrics_need_key,
        cors_allow_origins=tuple(settings.cors_allow_origins or ()),
        max_body_bytes=settings.max_body_bytes,
        max_prompts=settings.max_prompts,
        queue_timeout=settings.queue_timeout,
        request_timeout=settings.request_timeout,
        stall_timeout=settings.stall_timeout,
        keep_alive_interval=settings.keep_alive_interval,
        drain_delay=settings.drain_delay,
        drain_timeout=settings.drain_timeout,
    )


def engine_config(settings: Resolved, max_position: int, *, on_cuda: bool) -> EngineConfig:
    """The engine's part, for a model with `max_position` positions; raises SettingError.

    On CUDA the default of kv_cache_bytes is known only once the weights are there (`cuda_cache_bytes`).
    """
    max_model_len = settings.max_model_len or min(max_position, 8192)
    if max_model_len > max_position:
        raise SettingError(
            f"max_model_len is {max_model_len}, but the model has only {max_position} positions"
        )
    num_seqs, num_tokens = _ENGINE.max_num_seqs, _ENGINE.max_num_batched_tokens
    if on_cuda:
        num_seqs, num_tokens = CUDA_NUM_SEQS, CUDA_NUM_BATCHED_TOKENS
    num_seqs = _value_or(settings.max_num_seqs, num_seqs)
    try:
        return EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(_value_or(settings.max_num_batched_tokens, num_tokens), num_seqs),
            block_size=settings.block_size,
            kv_cache_bytes=_value_or(settings.kv_cache_bytes, _ENGINE.kv_cache_bytes),
            kv_cache_dtype=settings.kv_cache_dtype,
            max_num_queued_reqs=settings.max_num_queued_reqs,
            max_num_queued_tokens=settings.max_num_queued_tokens,
            max_num_staged_tokens=settings.max_num_staged_tokens,
            enable_prefix_caching=settings.enable_prefix_caching,
            quantization=settings.quantization,
            backend=settings.backend,
            enforce_eager=settings.enforce_eager,
            deterministic=settings.deterministic,
            recycled_blocks=settings.recycled_blocks,
        )
    except ValueError as error:
        raise SettingError(str(error)) from None


def _value_or(setting: int | None, default: int) -> int:
    return default if setting is None else setting


def model_name(settings: Resolved) -> str:
    """The name that requests give: as set, or the file's or folder's."""
    path = Path(settings.model)
    return settings.served_model_name or (path.stem if path.suffix == ".gguf" else path.resolve().name)


def _keys_in(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read api_key_file {path}: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def memory_budget(settings: Resolved) -> MemoryBudget | None:
    """What the table's rows and recycled states share; None where no states are kept."""
    if settings.recycled is None:
        return None
    return MemoryBudget(auto_bytes() if settings.ram_bytes is None else settings.ram_bytes)


def table_config(settings: Resolved, num_threads: int, memory: MemoryBudget | None = None) -> TableConfig:
    """How the table is read; raises CacheError."""
    return TableConfig(
        memory=memory,
        ram_bytes=settings.ram_bytes,
        device_bytes=settings.device_bytes,
        disk_reader=settings.disk_reader,
        io_depth=settings.io_depth,
        num_threads=num_threads,
    )


def recycled_config(settings: Resolved) -> RecycledConfig:
    """How recycled states are kept; raises CacheError."""
    return RecycledConfig(disk_bytes=settings.disk_bytes)
