"""The page of the study of a pretrained model, made of nothing but the runs' logs."""

from __future__ import annotations

import math
from pathlib import Path

from scone.model_store.study_report import (
    CURVES,
    ArmResult,
    LoggedRun,
    draw_first_seed,
    finished_arms,
    read_logs,
    results_table,
    unfinished_lines,
)

_QUESTIONS = (
    ("fgrams", "base", "F-grams on the frozen model against the model alone"),
    ("fgrams", "control", "The same against the control, which sees no n-gram"),
    ("fgrams-residuals", "base", "With residuals, against the model alone"),
    ("fgrams-residuals", "control", "The same against the control"),
    ("fgrams-residuals", "control-residuals", "The same against a control with residuals of its tokens"),
    ("fgrams-residuals", "fgrams", "With residuals against without"),
    ("fgrams", "fgrams-small-set", "The whole set against the small one"),
    ("fgrams-deep", "fgrams", "A deeper f-gram model against the other"),
    ("fgrams", "fgrams-thin", "The f-gram model against a thinner one"),
    ("fgrams", "fgrams-random-start", "Started from the main model's first layers, against new weights"),
    ("fgrams", "lora", "F-grams against low-rank adaptations"),
    ("main-fgrams", "main-control", "With the main model trained too: f-grams against the control"),
    ("main-fgrams", "main", "With the main model trained too: f-grams against none"),
    (
        "main-fgrams-residuals",
        "main-control",
        "With residuals, and the main model trained too, against the control",
    ),
    (
        "first-layers-fgrams",
        "first-layers-control",
        "With its first layers trained too: f-grams against the control",
    ),
)


def write_tuning_report(logs: Path, document: Path, command: str) -> None:
    """Writes the document, and its picture beside the logs; raises CheckpointError if there are none."""
    runs = read_logs(logs)
    results = finished_arms(runs)
    (logs / CURVES).write_text(draw_first_seed(runs))
    place = logs.relative_to(document.parent).as_posix()
    table = results_table(results, place, "base", "of the base", more=[("residuals' rate", _residual_rate)])
    lines = [*_opening(runs, command), *table, "", f"![held-out loss]({place}/{CURVES})", ""]
    lines += [
        f"- {what}: perplexity {math.exp(results[ours].loss - results[theirs].loss):.3f} times."
        for ours, theirs, what in _QUESTIONS
        if ours in results and theirs in results
    ]
    lines += unfinished_lines(runs)
    document.write_text("\n".join(lines).rstrip() + "\n")


def _residual_rate(result: ArmResult) -> str:
    rate = result.facts["train"].get("residual_learning_rate")
    return f"{rate:g}" if rate else ""


def _first_layers(runs: list[LoggedRun]) -> str:
    num_layers = max(int(run.facts["train"].get("main_layers", 0)) for run in runs)
    return f", `first-layers` rows its first {num_layers} layers" if num_layers else ""


def _opening(runs: list[LoggedRun], command: str) -> list[str]:
    facts = max((run.facts for run in runs), key=lambda facts: int(facts["train"]["steps"]))
    train = facts["train"]
    tokens = train["steps"] * train["batch_size"] * train["seq_len"]
    machines = ", ".join(sorted({run.facts["machine"] for run in runs}))
    return [
        "# Quality: a pretrained model with f-grams",
        "",
        "Made by the command below from the logs that the table links to; do not edit.",
        "",
        f"    {command}",
        "",
        f"Every row but the base is trained on the same {tokens:,} tokens of a corpus of"
        f" {facts['corpus_tokens']:,} (windows of {train['seq_len']}, matrix products in"
        f" {train['precision']}, {machines}, {facts['date']}). The loss is over all that is held out,"
        " in float32 and windows of the same size. `fgrams` and `control` leave the main model as it is;"
        f" `lora` adapts all its linear maps; `main` rows train all of it{_first_layers(runs)}. ± is the"
        " standard deviation over seeds.",
        "",
    ]
