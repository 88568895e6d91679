"""Trainings to be compared: each resumable, its log kept, several at a time where the machine has room."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from scone.model_store.decoder import Decoder
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.perplexity import measure_perplexity, token_embeddings
from scone.model_store.token_stream import TokenStream
from scone.model_store.train import train
from scone.model_store.train_config import TrainConfig
from scone.model_store.training_curve import CURVE, PICTURE, read_curve

RUN = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One training.

    Attributes:
        facts: of the row that it belongs to, for the log.
        new_decoder: the main model as it is before the training, on its device.
    """

    name: str
    config: TrainConfig
    facts: dict[str, Any]
    fgrams: FGramSet | None
    new_decoder: Callable[[], Decoder]


class RunSource(Protocol):
    """A study: its runs, and what all of them read."""

    @property
    def corpus(self) -> TokenStream: ...
    @property
    def heldout(self) -> TokenStream: ...
    @property
    def out(self) -> Path: ...
    def runs(self) -> list[StudyRun]: ...
    def keep(self, run: StudyRun, decoder: Decoder, model: FGramModel | None) -> None:
        """Is shown what a finished run has trained."""


def train_all(open_study: Callable[[], RunSource], logs: Path, num_workers: int) -> bool:
    """Trains what is missing; False if it was told to stop.

    Of each run, what it is and its curve lie in a folder of `logs`. With several workers `open_study` is
    called in processes of their own.
    """
    study = open_study()
    if num_workers == 1:
        return all(_train_logged(study, run, logs) for run in study.runs())
    names = [run.name for run in study.runs()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _Worker.open, (open_study, logs)) as pool:
        return all(list(pool.map(_Worker.train, names)))


class _Worker:
    """What a process of its own keeps between its runs."""

    study: RunSource
    logs: Path

    @classmethod
    def open(cls, open_study: Callable[[], RunSource], logs: Path) -> None:
        torch.set_num_threads(1)  # the others train too
        cls.study, cls.logs = open_study(), logs

    @classmethod
    def train(cls, name: str) -> bool:
        run = next(run for run in cls.study.runs() if run.name == name)
        return _train_logged(cls.study, run, cls.logs)


def _train_logged(study: RunSource, run: StudyRun, logs: Path) -> bool:
    log = logs / run.name
    if _is_finished(log, run.config.steps):
        return True
    print(f"{run.name}: {run.config.steps:,} steps", flush=True)
    decoder, work = run.new_decoder(), study.out / "runs" / run.name
    model = train(run.config, decoder, run.fgrams, study.corpus, study.heldout, work)
    log.mkdir(parents=True, exist_ok=True)
    facts = run.facts | _facts(study, run, decoder, model)
    if _is_finished(work, run.config.steps):
        study.keep(run, decoder, model)
        facts |= _final(study, run, decoder, model)
    (log / RUN).write_text(json.dumps(facts, indent=1) + "\n")
    for name in (CURVE, PICTURE):
        (log / name).write_bytes((work / name).read_bytes())
    return _is_finished(log, run.config.steps)


def _facts(study: RunSource, run: StudyRun, decoder: Decoder, model: FGramModel | None) -> dict[str, Any]:
    in_layers = sum(p.numel() for p in decoder.layers.parameters())
    device = decoder.device
    return {
        "vocab_size": decoder.config.vocab_size,
        "layer_parameters": in_layers,
        "inference_parameters": in_layers + decoder.lm_head.weight.numel(),  # what a token is multiplied with
        "input_parameters": sum(p.numel() for p in decoder.embed_tokens.parameters()),
        "fgram_model_parameters": 0 if model is None else sum(p.numel() for p in model.parameters()),
        "corpus_tokens": len(study.corpus.input_ids),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "train": asdict(run.config),
    }


def _final(study: RunSource, run: StudyRun, decoder: Decoder, model: FGramModel | None) -> dict[str, Any]:
    """The loss over all that is held out, in float32 whatever the training's precision was."""
    embed = token_embeddings(decoder)
    if model is not None and run.fgrams is not None:
        embed = FGramInputs(run.fgrams, model).embedding_of(decoder)
    # shapes that are met once are not worth compiling for
    eager = torch.compiler.set_stance("force_eager") if decoder.device.type == "cuda" else nullcontext()
    with eager:
        (found,) = measure_perplexity(
            decoder, study.heldout, [embed], run.config.seq_len, len(study.heldout.input_ids)
        )
    return {"final": {"loss": found.loss, "num_tokens": found.num_tokens}}


def _is_finished(log: Path, steps: int) -> bool:
    points = read_curve(log)
    return bool(points) and points[-1].step == steps
