"""`scone eval`: perplexity with and without the table, and which f-grams were hit."""

from __future__ import annotations

from pathlib import Path

from scone.cache import FGramTable
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.corpus import read_documents
from scone.model_store.decoder import Decoder
from scone.model_store.perplexity import SEQ_LEN, measure_perplexity, token_embeddings
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize
from scone.server.model_device import DEVICE, model_device, placed
from scone.server.settings import Command, Resolved, Setting
from scone.server.table_perplexity import TableInputs, open_table_of


def run(settings: Resolved) -> int:
    checkpoint = open_checkpoint(settings.model)
    tokenizer = checkpoint.tokenizer()
    decoder = placed(checkpoint.decoder(), model_device(settings.device))
    table = None if settings.table is None else open_table_of(checkpoint, settings.table)
    for path in settings.corpus:
        stream = TokenStream.from_corpus(tokenize(read_documents([path]), tokenizer), tokenizer)
        _evaluate(Path(path).name, decoder, table, stream, settings)
    return 0


def _evaluate(
    name: str, decoder: Decoder, table: FGramTable | None, stream: TokenStream, settings: Resolved
) -> None:
    plain = token_embeddings(decoder)
    if table is None:
        (base,) = measure_perplexity(decoder, stream, [plain], settings.seq_len, settings.max_tokens)
        print(f"{name}: perplexity {base.value:.3f} over {base.num_tokens:,} tokens")
        return
    inputs = TableInputs(decoder, table)
    base, with_table = measure_perplexity(
        decoder, stream, [plain, inputs], settings.seq_len, settings.max_tokens
    )
    share = inputs.positions_by_n / inputs.positions_by_n.sum()
    hits = ", ".join(f"{n}: {share[n]:.1%}" for n in range(2, len(share)))
    print(
        f"{name}: perplexity {base.value:.3f} without the table, {with_table.value:.3f} with it "
        f"({with_table.value / base.value:.4f}x) over {base.num_tokens:,} tokens; "
        f"longest match by length: none {share[1]:.1%}, {hits}"
    )


COMMAND = Command(
    name="eval",
    help="perplexity with and without a table",
    settings=(
        Setting(name="corpus", help="text to evaluate on", positional=True, many=True, required=True),
        Setting(name="model", help="GGUF file or model folder", required=True),
        Setting(name="table", help="table of `scone build`"),
        DEVICE,
        Setting(
            name="seq_len", help="tokens per window; each starts without context", kind=int, default=SEQ_LEN
        ),
        Setting(name="max_tokens", help="tokens per corpus at most", kind=int, default=50_000),
    ),
    run=run,
)
