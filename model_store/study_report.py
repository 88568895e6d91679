"""The study's tables and pictures, made of nothing but the runs' logs."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scone.model_store.curve_picture import draw_curves
from scone.model_store.errors import CheckpointError
from scone.model_store.study_runs import RUN
from scone.model_store.training_curve import CurvePoint, read_curve

CURVES, TREND = "curves.svg", "trend.svg"


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """One run as it was logged."""

    name: str
    facts: dict[str, Any]
    curve: list[CurvePoint]

    @property
    def arm(self) -> str:
        return str(self.facts["arm"]["name"])

    @property
    def is_finished(self) -> bool:
        return "final" in self.facts and self.curve[-1].step == int(self.facts["train"]["steps"])

    @property
    def loss(self) -> float:
        """Over all that is held out, at the end."""
        return float(self.facts["final"]["loss"])


@dataclass(frozen=True, slots=True)
class ArmResult:
    """The finished runs of one row."""

    runs: list[LoggedRun]

    @property
    def facts(self) -> dict[str, Any]:
        return self.runs[0].facts

    @property
    def loss(self) -> float:
        return statistics.fmean(run.loss for run in self.runs)

    @property
    def spread(self) -> str:
        """Standard deviation over seeds."""
        losses = [run.loss for run in self.runs]
        return f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""


def read_logs(logs: Path) -> list[LoggedRun]:
    """All runs below `logs`, by name; raises CheckpointError if there is none."""
    runs = []
    for path in sorted(logs.glob(f"*/{RUN}")):
        curve = read_curve(path.parent)
        if curve:
            runs.append(LoggedRun(path.parent.name, json.loads(path.read_text()), curve))
    if not runs:
        raise CheckpointError(f"{logs} holds no logs of a study: run it first")
    return runs


def unfinished_lines(runs: list[LoggedRun]) -> list[str]:
    """Names the runs that no table has."""
    unfinished = sorted(run.name for run in runs if not run.is_finished)
    return ["", f"Not finished, and in no figure above: {', '.join(unfinished)}."] if unfinished else []


def finished_arms(runs: list[LoggedRun]) -> dict[str, ArmResult]:
    """The finished runs by row."""
    finished: dict[str, list[LoggedRun]] = defaultdict(list)
    for run in runs:
        if run.is_finished:
            finished[run.arm].append(run)
    return {arm: ArmResult(their) for arm, their in finished.items()}


Column = tuple[str, Callable[[ArmResult], str]]
"""A title, and what stands below it for each row."""


def results_table(
    results: dict[str, ArmResult], place: str, base: str, base_title: str, more: Sequence[Column] = ()
) -> list[str]:
    """A line a row, with its perplexity over that of the row `base`; `more` columns follow its shape.

    Runs are linked to in `place`.
    """
    of_base = results.get(base)
    columns: list[Column] = [
        ("f-grams", lambda result: f"{result.facts['arm']['num_fgrams']:,}"),
        ("f-gram layers", lambda result: str(result.facts["arm"]["fgram_layers"])),
        *more,
        ("held-out loss", lambda result: f"{result.loss:.4f}{result.spread}"),
        ("perplexity", lambda result: f"{math.exp(result.loss):.2f}"),
        (base_title, lambda result: f"{math.exp(result.loss - of_base.loss):.3f}" if of_base else ""),
        (
            "runs",
            lambda result: ", ".join(f"[{run.facts['seed']}]({place}/{run.name})" for run in result.runs),
        ),
    ]
    rows = [["model", *(title for title, _ in columns)]]
    rows += [[arm, *(cell(result) for _, cell in columns)] for arm, result in results.items()]
    head, *lines = (f"| {' | '.join(cells)} |" for cells in rows)
    return [head, "|---" * len(rows[0]) + "|", *lines]


def draw_first_seed(runs: list[LoggedRun]) -> str:
    """An SVG of how the held-out loss fell in the runs of seed 0, by tokens trained."""
    first = [run for run in runs if run.facts["seed"] == 0]
    return draw_curves(
        {run.arm: [(p.tokens, p.heldout_loss) for p in run.curve if p.step] for run in first},
        title="held-out loss, seed 0",
        x_label="training tokens",
        y_label="loss, nats a token",
    )


def write_report(logs: Path, document: Path, command: str) -> None:
    """Writes the document and, beside the logs, its two pictures."""
    runs = read_logs(logs)
    results = finished_arms(runs)
    (logs / CURVES).write_text(draw_first_seed(runs))
    place = logs.relative_to(document.parent).as_posix()
    table = results_table(results, place, "S", "of S", more=[("MFLOPs a token", _megaflops)])
    lines = [*_opening(runs, command), *table, "", f"![held-out loss]({place}/{CURVES})", ""]
    lines += _findings(results)
    if trend := _trend(results):
        (logs / TREND).write_text(trend)
        lines += ["", f"![perplexity by set size]({place}/{TREND})"]
    lines += unfinished_lines(runs)
    document.write_text("\n".join(lines).rstrip() + "\n")


def _opening(runs: list[LoggedRun], command: str) -> list[str]:
    facts = next((run for run in runs if run.is_finished), runs[0]).facts
    train = facts["train"]
    tokens = train["steps"] * train["batch_size"] * train["seq_len"]
    return [
        "# Quality: the study in miniature",
        "",
        "Made by the command below from the logs that the table links to; do not edit.",
        "",
        f"    {command}",
        "",
        f"Every model is trained from scratch on the same {tokens:,} tokens of a corpus of"
        f" {facts['corpus_tokens']:,} (vocabulary {facts['vocab_size']:,}, windows of {train['seq_len']},"
        f" matrix products in {train['precision']}, {facts['machine']}, {facts['date']});"
        " the loss is over all that is held out, in float32. FLOPs are those of one token's forward pass,"
        " attention to the context left out; f-grams change none of them. ± is the standard deviation over"
        " seeds.",
        "",
    ]


def _megaflops(result: ArmResult) -> str:
    return f"{2 * result.facts['inference_parameters'] / 1e6:.1f}"


def _findings(results: dict[str, ArmResult]) -> list[str]:
    """What the table says of the questions that were asked, whichever way it came out."""
    lines = []

    def compare(ours: str, theirs: str, what: str) -> None:
        if ours in results and theirs in results:
            ratio = math.exp(results[ours].loss - results[theirs].loss)
            verdict = "lower" if ratio < 1 else "not lower"
            lines.append(f"- {what}: perplexity {ratio:.3f} times, {verdict}.")

    compare("S-large-set-deep", "S", "The large set and the deep f-gram model against the base S")
    compare("S-large-set-deep", "M", "The same against M")
    compare("S-large-set-deep", "S-control", "The same against the control that sees no n-gram")
    compare("S-large-set-deep", "S-small-set-deep", "A larger set against a smaller one, deep f-gram model")
    compare("S-large-set-thin", "S-small-set-thin", "A larger set against a smaller one, thin f-gram model")
    compare("S-large-set-deep", "S-large-set-thin", "A deeper f-gram model against a thinner one, large set")
    compare("S-large-set-residuals", "S-large-set-thin", "Residuals beside the thin f-gram model, large set")
    compare("S-large-set-residuals", "S-large-set-residuals-alone", "The f-gram model beside residuals")
    compare("S-large-set-residuals", "M", "With them against M")
    compare("S-large-set-residuals", "S-control-residuals", "With them against a control that has them too")
    # where S shares its embedding with its head, a row of its own has a dense one beside it
    dense = "S-untied" if "S-untied" in results else "S"
    compare("S-kronecker", dense, "Kronecker embeddings against a dense table")
    if "M" in results and "S" in results:
        factor = results["M"].facts["inference_parameters"] / results["S"].facts["inference_parameters"]
        lines.append(f"- M takes {factor:.2f} times the FLOPs of S.")
    return lines


def _trend(results: dict[str, ArmResult]) -> str | None:
    """Perplexity over set size, a line for each depth of the f-gram model; None without both sizes."""
    curves = {}
    for depth in ("thin", "deep", "residuals"):
        points = [
            (float(results[arm].facts["arm"]["num_fgrams"]), math.exp(results[arm].loss))
            for arm in ("S", f"S-small-set-{depth}", f"S-large-set-{depth}")
            if arm in results
        ]
        if len(points) > 1:
            what = "thin f-gram model and residuals" if depth == "residuals" else f"{depth} f-gram model"
            curves[f"S, {what}"] = points
    if not curves:
        return None
    most = max(x for points in curves.values() for x, _ in points)
    if "M" in results:
        curves["M, no f-grams"] = [(0.0, math.exp(results["M"].loss)), (most, math.exp(results["M"].loss))]
    return draw_curves(
        curves, title="perplexity by set size", x_label="f-grams", y_label="held-out perplexity"
    )
