"""`scone study`: the paper's comparison in miniature, from a corpus to a page of tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from scone.model_store.study import ROWS, Study, StudyConfig
from scone.model_store.study_report import write_report
from scone.model_store.study_runs import RunSource, train_all
from scone.model_store.train_config import PRECISIONS
from scone.server.errors import SettingError
from scone.server.model_device import DEVICE, model_device
from scone.server.settings import Command, Resolved, Setting

KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
HELPS = {
    "vocab_size": "tokens of the vocabulary, trained on the corpus",
    "max_n": "longest f-gram in tokens",
    "small_set": "f-grams of the small set",
    "large_set": "f-grams of the large set",
    "thin_layers": "layers of the thin f-gram model",
    "deep_layers": "layers of the deep f-gram model",
    "small_dim": "width of the small model",
    "small_layers": "layers of the small model",
    "large_dim": "width of the large model",
    "large_layers": "layers of the large model",
    "num_tokens": "training tokens of each run",
    "batch_size": "sequences per step",
    "seq_len": "tokens per sequence",
    "learning_rate": "peak learning rate of main models",
    "fgram_learning_rate": "that of f-gram models, whose rows the main model has to follow",
    "residual_learning_rate": "that of residuals beside them",
    "precision": "of matrix products while training",
    "heldout_tokens": "held-out tokens per evaluation on the way; the last is over all",
    "num_seeds": "seeds of the main rows",
}


def run(settings: Resolved) -> int:
    config = StudyConfig(**{f.name: settings.values[f.name] for f in fields(StudyConfig)})
    device = model_device(settings.device)
    rows = settings.rows or ROWS
    study = partial(Study, config, settings.corpus, settings.heldout, settings.out, device, rows)
    return train_and_report(settings, study, write_report)


def train_and_report(
    settings: Resolved, study: Callable[[], RunSource], write: Callable[[Path, Path, str], None]
) -> int:
    """Trains what is missing of a study and writes its page."""
    if not settings.logs.resolve().is_relative_to(settings.document.resolve().parent):
        raise SettingError(f"logs is {settings.logs}, wanted a folder below {settings.document.parent}")
    is_complete = train_all(study, settings.logs, settings.num_workers)
    command = " ".join(("scone", *sys.argv[1:]))
    write(settings.logs.resolve(), settings.document.resolve(), command)
    print(f"wrote {settings.document}" + ("" if is_complete else "; the same command goes on"))
    return 0


def study_settings(out: str, document: str, rows: tuple[str, ...]) -> tuple[Setting, ...]:
    """What every study takes, by its default folder and page, and the rows that it has."""
    page = Path(document)
    return (
        Setting(name="corpus", help="training text: files, folders, globs", many=True, required=True),
        Setting(name="heldout", help="held-out text", many=True, required=True),
        Setting(name="out", kind=Path, default=Path(out), help="folder of models and states"),
        Setting(
            name="logs", kind=Path, default=page.with_suffix(""), help="folder of the runs' logs; to be kept"
        ),
        Setting(name="document", kind=Path, default=page, help="the page, above that folder"),
        DEVICE,
        Setting(name="num_workers", kind=int, default=1, help="runs at a time, each in a process of its own"),
        Setting(name="rows", help="rows of the page to train (default: all)", many=True, choices=rows),
    )


def config_settings(config: Any, helps: Mapping[str, str]) -> tuple[Setting, ...]:
    """Every field of a study's configuration as a setting."""
    return tuple(
        Setting(
            name=f.name,
            kind=KINDS[str(f.type)],
            default=getattr(config, f.name),
            help=helps[f.name],
            choices=PRECISIONS if f.name == "precision" else (),
        )
        for f in fields(config)
    )


COMMAND = Command(
    name="study",
    help="train small models with and without f-grams from scratch and compare them; resumes if interrupted",
    settings=(
        *study_settings("data/study", "docs/quality/from-scratch.md", ROWS),
        *config_settings(StudyConfig(), HELPS),
    ),
    run=run,
)
