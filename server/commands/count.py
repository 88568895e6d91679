"""`scone count`: corpus -> f-gram set. A count that was ended goes on when the command is given again."""

from __future__ import annotations

import shutil
from pathlib import Path

from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.count import count_fgrams
from scone.model_store.fgram_set import FGramSet
from scone.model_store.ray_engine import count_on_ray
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tokenize_corpus import tokenize_files
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_file
from scone.server.errors import SettingError
from scone.server.settings import Command, Resolved, Setting


def run(settings: Resolved) -> int:
    for name, least in (("max_n", 2), ("min_count", 1), ("top", 1)):
        if settings.values[name] < least:
            raise SettingError(f"{name} is {settings.values[name]}, wanted >= {least}")
    if not settings.memory > 0:
        raise SettingError(f"memory is {settings.memory}, wanted > 0 GiB")
    tokenizer = open_tokenizer(settings.tokenizer)
    work = settings.out.with_name(settings.out.name + ".work")
    corpus = tokenize_files(settings.corpus, tokenizer, work / "tokens")
    fgrams = _count(settings, corpus, tokenizer.hash, work / "count")
    fgrams.save(settings.out)
    shutil.rmtree(work)
    print(describe(fgrams, corpus.num_documents, settings.out))
    return 0


def _count(settings: Resolved, corpus: TokenCorpus, tokenizer_hash: str, work: Path) -> FGramSet:
    numbers = {name: settings.values[name] for name in ("max_n", "min_count", "top")}
    if settings.engine == "ray":
        return count_on_ray(corpus, tokenizer_hash=tokenizer_hash, **numbers)
    memory_bytes = int(settings.memory * 2**30)
    return count_fgrams(
        corpus, tokenizer_hash=tokenizer_hash, memory_bytes=memory_bytes, work=work, **numbers
    )


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder, a GGUF file or a tokenizer.json; raises TokenizerError."""
    if path.suffix == ".json":
        return tokenizer_from_file(path)
    if (path / "tokenizer.json").exists():
        return tokenizer_from_file(path / "tokenizer.json")
    return open_checkpoint(path).tokenizer()


def describe(fgrams: FGramSet, num_documents: int, out: Path) -> str:
    """What was counted, in a few lines."""
    by_n = ", ".join(f"{n}: {(fgrams.lengths == n).sum():,}" for n in range(2, fgrams.max_n + 1))
    cutoff = int(fgrams.counts[-1]) if len(fgrams) else 0
    return (
        f"counted {fgrams.num_corpus_tokens:,} tokens of {num_documents:,} documents\n"
        f"kept {len(fgrams):,} f-grams ({by_n} by length), the rarest occurs {cutoff} times\n"
        f"wrote {out} ({Path(out).stat().st_size / 1e6:.1f} MB)"
    )


COMMAND = Command(
    name="count",
    help="count the f-gram set of a corpus; goes on where an interrupted count stopped",
    settings=(
        Setting(
            name="corpus",
            help="files, folders and globs: text, .jsonl, .parquet, also .gz and .zst",
            positional=True,
            many=True,
            required=True,
        ),
        Setting(name="tokenizer", kind=Path, help="model folder, GGUF file or tokenizer.json", required=True),
        Setting(name="max_n", kind=int, default=5, help="longest f-gram in tokens (K)"),
        Setting(name="min_count", kind=int, default=5, help="rarer n-grams are not considered"),
        Setting(name="top", kind=int, default=1_000_000, help="how many f-grams to keep (S)"),
        Setting(
            name="memory",
            kind=float,
            default=4.0,
            help="GiB for counting; a corpus that needs more (24 bytes a token) is counted on disk",
        ),
        Setting(
            name="engine",
            default="local",
            choices=("local", "ray"),
            help="where n-grams are counted: here, or on Ray",
        ),
        Setting(name="out", kind=Path, help="the f-gram set file to write", required=True),
    ),
    run=run,
)
