"""`scone train`: the f-gram model, on a frozen main model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from scone.model_store.checkpoint import open_checkpoint, save_scone_folder
from scone.model_store.corpus import read_documents
from scone.model_store.errors import FGramSetError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize
from scone.model_store.train import TrainConfig, train
from scone.server.errors import SettingError
from scone.server.settings import Command, Resolved, Setting, parse_bool

DEFAULTS = TrainConfig()
KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": parse_bool}


def run(settings: Resolved) -> int:
    if not settings.freeze_main:
        raise SettingError("freeze_main is false, wanted true: the main model's weights are never changed")
    config = TrainConfig(**{f.name: settings.values[f.name] for f in fields(TrainConfig)})
    checkpoint = open_checkpoint(settings.model)
    tokenizer = checkpoint.tokenizer()
    fgrams = FGramSet.load(Path(settings.fgrams))
    if fgrams.tokenizer_hash != tokenizer.hash:
        raise FGramSetError(
            f"{settings.fgrams} was counted with tokenizer {fgrams.tokenizer_hash[:16]}, "
            f"wanted {tokenizer.hash[:16]}, that of {settings.model}: count it again with --tokenizer"
        )
    corpus = TokenStream.from_corpus(tokenize(read_documents(settings.corpus), tokenizer), tokenizer)
    heldout = TokenStream.from_corpus(tokenize(read_documents(settings.heldout), tokenizer), tokenizer)
    out = Path(settings.out)
    model = train(config, checkpoint.decoder(), fgrams, corpus, heldout, out)
    save_scone_folder(out, model, main_path=Path(settings.model), main_hash=checkpoint.model_hash)
    print(f"f-gram model written to {out}; next: scone build --model {out} --fgrams {settings.fgrams}")
    return 0


def _hyperparameters() -> tuple[Setting, ...]:
    """Every field of TrainConfig as a setting."""
    helps = {
        "steps": "optimiser steps",
        "batch_size": "sequences per step",
        "seq_len": "tokens per sequence",
        "learning_rate": "peak rate of the f-gram model's blocks",
        "output_learning_rate": "peak rate of its output projection, which starts at zero",
        "warmup_steps": "steps of linear warm-up; linear decay to zero follows",
        "weight_decay": "AdamW's weight decay",
        "max_gradient_norm": "gradients are clipped to this norm",
        "num_layers": "layers of the f-gram model, started from the main model's first ones",
        "seed": "decides which windows are drawn",
        "save_every": "steps between held-out evaluations and saved states",
        "heldout_tokens": "held-out tokens per evaluation",
        "last_token_only": "train the control whose f-gram model sees only the last token",
    }
    return tuple(
        Setting(name=f.name, help=helps[f.name], kind=KINDS[str(f.type)], default=getattr(DEFAULTS, f.name))
        for f in fields(TrainConfig)
    )


COMMAND = Command(
    name="train",
    help="train an f-gram model; resumes if interrupted",
    settings=(
        Setting(name="model", help="main model: GGUF file or folder", required=True),
        Setting(name="fgrams", help="f-gram set from `scone count`", required=True),
        Setting(name="corpus", help="training text: files, folders, globs", many=True, required=True),
        Setting(name="heldout", help="held-out text for the curve", many=True, required=True),
        Setting(name="out", help="checkpoint folder to write", required=True),
        Setting(name="freeze_main", help="keep the main model as it is", kind=parse_bool, default=False),
        *_hyperparameters(),
    ),
    run=run,
)
