"""`scone build`: f-gram model x f-gram set -> table."""

from __future__ import annotations

from pathlib import Path

from scone.kernels.row_codec import RowCodec
from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.codec_cost import measure_codec_cost
from scone.model_store.corpus import read_documents
from scone.model_store.errors import CodecCostError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import TableManifest
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize
from scone.server.errors import SettingError
from scone.server.model_device import DEVICE, model_device
from scone.server.settings import Command, Resolved, Setting


def run(settings: Resolved) -> int:
    if settings.max_dppl is not None and not settings.heldout:
        raise SettingError("max_dppl is given without heldout: give --heldout TEXT to measure it on")
    if settings.heldout:
        _check_codec(settings)
    report = build_table(
        open_checkpoint(settings.model),
        FGramSet.load(settings.fgrams),
        settings.out,
        backend=settings.backend,
        codec=settings.codec,
        dtype=settings.dtype,
        engine=settings.engine,
        device=model_device(settings.device),
    )
    resumed = report.num_fgrams - report.num_embedded
    print(
        f"embedded {report.num_embedded:,} f-grams in {report.seconds:.1f} s"
        + (f" ({resumed:,} were there already)" if resumed else "")
        + f"\nwrote {settings.out} ({report.table_bytes / 1e6:,.1f} MB)"
    )
    error = TableManifest.read(settings.out).row_error
    print(f"relative error of the stored rows: {error.rms:.3%} (root mean square), {error.max:.3%} at most")
    return 0


def _check_codec(settings: Resolved) -> None:
    """Prints what the codec costs on held-out text; raises CodecCostError if that is too much."""
    checkpoint = open_checkpoint(settings.model)
    tokenizer = checkpoint.tokenizer()
    try:
        codec = RowCodec(settings.codec, settings.dtype, checkpoint.config.dim)
    except ValueError as error:
        raise SettingError(str(error)) from None
    stream = TokenStream.from_corpus(tokenize(read_documents(settings.heldout), tokenizer), tokenizer)
    fgrams = FGramSet.load(settings.fgrams)
    cost = measure_codec_cost(checkpoint, fgrams, codec, stream, settings.max_tokens)
    raw, coded, delta = cost.raw.value, cost.coded.perplexity.value, cost.coded.delta
    print(
        f"perplexity {raw:.3f} with raw rows, {coded:.3f} with {settings.codec} ({delta:+.4f}),"
        f" KL {cost.coded.kl:.6f} nats, over {cost.raw.num_tokens:,} held-out tokens"
    )
    if settings.max_dppl is not None and delta > settings.max_dppl:
        raise CodecCostError(
            f"codec {settings.codec} raises perplexity by {delta:.4f}, max_dppl is {settings.max_dppl}:"
            " nothing was built; choose another --codec, or raise --max-dppl"
        )


COMMAND = Command(
    name="build",
    help="embed an f-gram set into a table; goes on where an interrupted build stopped",
    settings=(
        Setting(name="model", kind=Path, help="checkpoint folder with an f-gram model", required=True),
        Setting(name="fgrams", kind=Path, help="f-gram set written by `scone count`", required=True),
        Setting(name="out", kind=Path, help="the table folder to write", required=True),
        Setting(name="backend", default="mmap", choices=("mmap", "lmdb"), help="how rows are stored"),
        Setting(
            name="codec", default="raw", choices=("raw", "int8", "int4", "fp8"), help="how rows are encoded"
        ),
        Setting(
            name="dtype",
            default="bfloat16",
            choices=("float32", "bfloat16", "float16"),
            help="number format of row values",
        ),
        Setting(
            name="engine",
            default="local",
            choices=("local", "ray"),
            help="where rows are computed: here, or on Ray",
        ),
        DEVICE,
        Setting(
            name="heldout", many=True, help="text to measure first what the codec costs against raw rows"
        ),
        Setting(name="max_tokens", kind=int, default=20_000, help="tokens of it at most"),
        Setting(
            name="max_dppl", kind=float, help="build nothing if perplexity on it rises by more than this"
        ),
    ),
    run=run,
)
