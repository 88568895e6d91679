"""`scone shrink`: a smaller copy of a model with residuals."""

from __future__ import annotations

from pathlib import Path

from scone.kernels.row_codec import RowCodec
from scone.model_store.checkpoint import Checkpoint, open_checkpoint
from scone.model_store.corpus import read_documents
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_set import FGramSet
from scone.model_store.perplexity import SEQ_LEN, describe_change, measure_perplexity
from scone.model_store.residual_selection import keep_most_missed
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize
from scone.server.errors import SettingError
from scone.server.model_device import DEVICE, model_device, placed
from scone.server.settings import Command, Resolved, Setting, parse_bytes


def run(settings: Resolved) -> int:
    if settings.out.resolve() == settings.model.resolve():
        raise SettingError(
            f"out is {settings.out}, the model's own folder: give another, residuals are dropped"
        )
    checkpoint = open_checkpoint(settings.model)
    decoder = placed(checkpoint.decoder(), model_device(settings.device))
    model = checkpoint.fgram_model(decoder)
    if model is None or model.residuals is None:
        raise SettingError(f"model is {settings.model}, which has no residuals, wanted one that has")
    fgrams = FGramSet.load(settings.fgrams)
    fgrams.check_tokenizer(checkpoint.tokenizer().hash, settings.fgrams)
    try:
        codec = RowCodec(settings.codec, "float32", checkpoint.config.dim)
    except ValueError as error:
        raise SettingError(str(error)) from None
    num_before, limit = len(model.residuals.lengths), settings.max_residual_bytes // codec.row_bytes
    model.residuals = keep_most_missed(model.residuals, fgrams, limit)
    num_kept = len(model.residuals.lengths)
    if not num_kept:
        raise SettingError(
            f"no residual would be left: max_residual_bytes is {settings.max_residual_bytes}, wanted at least"
            f" {codec.row_bytes}, and a set that has f-grams of the model's"
        )
    checkpoint.save_with_residuals(settings.out, model.residuals, settings.codec)
    print(
        f"wrote {settings.out} with {num_kept:,} of {num_before:,} residuals"
        f" ({num_kept * codec.row_bytes / 1e6:,.1f} MB)"
    )
    if settings.heldout:
        print(_describe_change(checkpoint, decoder, fgrams, settings))
    return 0


def _describe_change(checkpoint: Checkpoint, decoder: Decoder, fgrams: FGramSet, settings: Resolved) -> str:
    """One line: held-out perplexity with the model as it was and as it was written."""
    tokenizer = checkpoint.tokenizer()
    stream = TokenStream.from_corpus(tokenize(read_documents(settings.heldout), tokenizer), tokenizer)
    models = [checkpoint.fgram_model(decoder), open_checkpoint(settings.out).fgram_model(decoder)]
    embeds = [FGramInputs(fgrams, model).embedding_of(decoder) for model in models if model is not None]
    was, is_now = measure_perplexity(decoder, stream, embeds, SEQ_LEN, settings.max_tokens)
    return describe_change(was, is_now)


COMMAND = Command(
    name="shrink",
    help="write a smaller copy of a model with residuals: those that a set would miss most, coded",
    settings=(
        Setting(
            name="model", kind=Path, positional=True, required=True, help="folder of a model with residuals"
        ),
        Setting(name="fgrams", kind=Path, required=True, help="the f-gram set that it is to be built with"),
        Setting(name="out", kind=Path, required=True, help="the model folder to write"),
        Setting(
            name="max_residual_bytes",
            kind=parse_bytes,
            required=True,
            help="bytes of residuals to keep at most, such as 40M",
        ),
        Setting(name="codec", default="int4", choices=("int8", "int4", "fp8"), help="how they are encoded"),
        DEVICE,
        Setting(name="heldout", many=True, help="text to print the change of perplexity on"),
        Setting(name="max_tokens", kind=int, default=20_000, help="tokens of it at most"),
    ),
    run=run,
)
