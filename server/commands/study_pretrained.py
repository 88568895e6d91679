"""`scone study-pretrained`: a pretrained model with f-grams, beside controls, from a corpus to a page."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

from scone.model_store.tuning_report import write_tuning_report
from scone.model_store.tuning_study import ROWS, TuningConfig, TuningStudy
from scone.server.commands.study import config_settings, study_settings, train_and_report
from scone.server.model_device import model_device
from scone.server.settings import Command, Resolved, Setting

HELPS = {
    "small_set": "f-grams of the small set; the large one is the whole set",
    "thin_layers": "layers of the thin f-gram model",
    "num_layers": "layers of the f-gram model that the other rows have",
    "deep_layers": "layers of the deep one",
    "main_layers": "first layers of the main model, where only those are trained",
    "lora_rank": "rank of the adaptations",
    "num_tokens": "training tokens of each run",
    "batch_size": "sequences per step",
    "seq_len": "tokens per sequence",
    "learning_rate": "peak rate of the f-gram model; its output takes twice as much",
    "main_learning_rate": "peak rate of the main model where it, or some of it, is trained",
    "residual_learning_rate": "of residuals beside the f-gram model",
    "lora_learning_rate": "peak rate of the adaptations",
    "precision": "of matrix products while training",
    "heldout_tokens": "held-out tokens per evaluation on the way; the last is over all",
    "num_seeds": "seeds of the main rows",
}


def run(settings: Resolved) -> int:
    config = TuningConfig(**{f.name: settings.values[f.name] for f in fields(TuningConfig)})
    study = partial(
        TuningStudy,
        config,
        settings.model,
        settings.fgrams,
        settings.corpus,
        settings.heldout,
        settings.out,
        model_device(settings.device),
        settings.rows or ROWS,
    )
    return train_and_report(settings, study, write_tuning_report)


COMMAND = Command(
    name="study-pretrained",
    help="train f-grams, a control and adaptations on a pretrained model and compare; resumes if interrupted",
    settings=(
        Setting(name="model", help="the pretrained model: GGUF file or folder", required=True),
        Setting(name="fgrams", help="f-gram set from `scone count`", required=True),
        *study_settings("data/study-pretrained", "docs/quality/pretrained.md", ROWS),
        *config_settings(TuningConfig(), HELPS),
    ),
    run=run,
)
