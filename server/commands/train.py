"""`scone train`: the f-gram model on a frozen main model, or both together, or a main model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from scone.model_store.checkpoint import open_checkpoint, save_scone_folder
from scone.model_store.corpus import read_documents
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_set import FGramSet
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.initialize import new_decoder, read_config
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize
from scone.model_store.tokenizer import Tokenizer
from scone.model_store.train import train
from scone.model_store.train_config import PRECISIONS, SCHEDULES, TrainConfig
from scone.server.commands.count import open_tokenizer
from scone.server.errors import SettingError
from scone.server.model_device import DEVICE, model_device, placed
from scone.server.settings import Command, Resolved, Setting, parse_bool

DEFAULTS = TrainConfig()
CHOICES = {"schedule": SCHEDULES, "precision": PRECISIONS}
KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": parse_bool, "str": str}


def run(settings: Resolved) -> int:
    try:
        config = TrainConfig(**{f.name: settings.values[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        raise SettingError(str(error)) from None
    decoder, tokenizer, model_hash = _main_model(settings)
    decoder = placed(decoder, model_device(settings.device))
    fgrams = None if settings.fgrams is None else FGramSet.load(Path(settings.fgrams))
    if fgrams is not None:
        fgrams.check_tokenizer(tokenizer.hash, settings.fgrams)
    corpus = TokenStream.from_corpus(tokenize(read_documents(settings.corpus), tokenizer), tokenizer)
    heldout = TokenStream.from_corpus(tokenize(read_documents(settings.heldout), tokenizer), tokenizer)
    out = Path(settings.out)
    model = train(config, decoder, fgrams, corpus, heldout, out)
    if model is None:
        save_hf_folder(out, decoder, tokenizer)
        print(f"model written to {out}")
        return 0
    if not config.changes_main:
        save_scone_folder(out, model, main_path=Path(settings.model), main_hash=model_hash)
    else:
        save_hf_folder(out / "main", decoder, tokenizer)
        trained_hash = open_checkpoint(out / "main").model_hash
        # in the precision that it was trained in, as the main model beside it
        save_scone_folder(out, model, main_path=out / "main", main_hash=trained_hash, dtype=torch.float32)
    print(f"f-gram model written to {out}; next: scone build --model {out} --fgrams {settings.fgrams}")
    return 0


def _main_model(settings: Resolved) -> tuple[Decoder, Tokenizer, str]:
    """The main model to start from, its tokenizer, and its hash ("" for a new one)."""
    if (settings.model is None) == (settings.config_json is None):
        raise SettingError("give either --model, to start from, or --config-json, of a new model")
    if settings.freeze_main and settings.model is None:
        raise SettingError("freeze_main needs a --model to freeze")
    if settings.freeze_main and not (settings.fgrams or settings.lora_rank or settings.main_layers):
        raise SettingError("freeze_main leaves nothing to train: give --fgrams, --lora-rank or --main-layers")
    if settings.model is not None:
        checkpoint = open_checkpoint(settings.model)
        return checkpoint.decoder(), checkpoint.tokenizer(), checkpoint.model_hash
    if settings.tokenizer is None:
        raise SettingError("tokenizer is missing: a new model needs one")
    tokenizer = open_tokenizer(settings.tokenizer)
    return new_decoder(read_config(settings.config_json), tokenizer, settings.seed), tokenizer, ""


def _hyperparameters() -> tuple[Setting, ...]:
    """Every field of TrainConfig as a setting."""
    helps = {
        "freeze_main": "keep the main model as it is; else it is trained together with the f-gram model",
        "main_layers": "so many first layers of a frozen main model are trained all the same",
        "steps": "optimiser steps",
        "batch_size": "sequences per step",
        "seq_len": "tokens per sequence",
        "main_learning_rate": "peak rate of the main model where it is trained",
        "learning_rate": "peak rate of the f-gram model's blocks",
        "output_learning_rate": "peak rate of its output projection, which starts at zero",
        "residual_learning_rate": "of residuals of f-grams beside the f-gram model; 0 for none",
        "schedule": "how rates fall to zero after the warm-up",
        "warmup_steps": "steps of linear warm-up",
        "weight_decay": "AdamW's weight decay, of matrices",
        "max_gradient_norm": "gradients are clipped to this norm",
        "num_layers": "layers of the f-gram model",
        "seed": "decides a new model's weights, and which windows are drawn",
        "save_every": "steps between held-out evaluations and saved states",
        "heldout_tokens": "held-out tokens per evaluation",
        "random_start": "start the f-gram model's layers with new weights, not the main model's first ones",
        "last_token_only": "train the control whose f-gram model sees only the last token",
        "lora_rank": "tune a frozen main model by low-rank adaptations of this rank, merged at the end",
        "precision": "of matrix products while training; everything else is float32",
    }
    defaults = {f.name: getattr(DEFAULTS, f.name) for f in fields(TrainConfig)} | {"freeze_main": False}
    return tuple(
        Setting(
            name=f.name,
            help=helps[f.name],
            kind=KINDS[str(f.type)],
            default=defaults[f.name],
            choices=CHOICES.get(f.name, ()),
        )
        for f in fields(TrainConfig)
    )


COMMAND = Command(
    name="train",
    help="train an f-gram model, a main model, or both together; resumes if interrupted",
    settings=(
        Setting(name="model", help="main model to start from: GGUF file or folder"),
        Setting(name="config_json", kind=Path, help="shape of a new main model: a Hugging Face config.json"),
        Setting(
            name="tokenizer", kind=Path, help="of a new main model: model folder, GGUF file, tokenizer.json"
        ),
        Setting(name="fgrams", help="f-gram set from `scone count`; without it: no f-gram model"),
        Setting(name="corpus", help="training text: files, folders, globs", many=True, required=True),
        Setting(name="heldout", help="held-out text for the curve", many=True, required=True),
        Setting(name="out", help="checkpoint folder to write", required=True),
        DEVICE,
        *_hyperparameters(),
    ),
    run=run,
)
