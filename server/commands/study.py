"""`scone study`: the paper's comparison in miniature, from a corpus to a page of tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from scone.model_store.study import Study, StudyConfig
from scone.model_store.study_report import write_report
from scone.model_store.train_config import PRECISIONS
from scone.server.errors import SettingError
from scone.server.model_device import DEVICE, model_device
from scone.server.settings import Command, Resolved, Setting

DEFAULTS = StudyConfig()
KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}


def run(settings: Resolved) -> int:
    if not settings.logs.resolve().is_relative_to(settings.document.resolve().parent):
        raise SettingError(f"logs is {settings.logs}, wanted a folder below {settings.document.parent}")
    config = StudyConfig(**{f.name: settings.values[f.name] for f in fields(StudyConfig)})
    study = Study(config, settings.corpus, settings.heldout, settings.out, model_device(settings.device))
    is_complete = study.run(settings.logs)
    command = " ".join(("scone", *sys.argv[1:]))
    write_report(settings.logs.resolve(), settings.document.resolve(), command)
    print(f"wrote {settings.document}" + ("" if is_complete else "; the same command goes on"))
    return 0


COMMAND = Command(
    name="study",
    help="train small models with and without f-grams from scratch and compare them; resumes if interrupted",
    settings=(
        Setting(name="corpus", help="training text: files, folders, globs", many=True, required=True),
        Setting(name="heldout", help="held-out text", many=True, required=True),
        Setting(name="out", kind=Path, default=Path("data/study"), help="folder of models and states"),
        Setting(
            name="logs", kind=Path, default=Path("docs/quality"), help="folder of the runs' logs; to be kept"
        ),
        Setting(
            name="document", kind=Path, default=Path("docs/quality.md"), help="the page, above that folder"
        ),
        DEVICE,
        *(
            Setting(
                name=f.name,
                kind=KINDS[str(f.type)],
                default=getattr(DEFAULTS, f.name),
                help=help_text,
                choices=PRECISIONS if f.name == "precision" else (),
            )
            for f, help_text in zip(
                fields(StudyConfig),
                (
                    "tokens of the vocabulary, trained on the corpus",
                    "longest f-gram in tokens",
                    "f-grams of the small set",
                    "f-grams of the large set",
                    "layers of the thin f-gram model",
                    "layers of the deep f-gram model",
                    "width of the small model",
                    "layers of the small model",
                    "width of the large model",
                    "layers of the large model",
                    "training tokens of each run",
                    "sequences per step",
                    "tokens per sequence",
                    "peak learning rate",
                    "of matrix products while training",
                    "held-out tokens per evaluation",
                    "seeds of the main rows",
                ),
                strict=True,
            )
        ),
    ),
    run=run,
)
