"""The curve of a training run: a CSV with one line an evaluation, and a picture of it beside."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scone.model_store.curve_picture import draw_curves

CURVE, PICTURE = "curve.csv", "curve.svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One evaluation; losses in nats a token, `train_loss` the mean since the last one."""

    step: int
    tokens: int
    train_loss: float
    heldout_loss: float
    match_rate: float
    learning_rate: float
    seconds: int


def append_point(run: Path, point: CurvePoint) -> None:
    """Adds a line to the run's curve, after those of earlier steps.

    A run that was ended between a line and its state makes that line again.
    """
    before = [point_before for point_before in read_curve(run) if point_before.step < point.step]
    partial = run / (CURVE + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(CurvePoint)])
        writer.writeheader()
        writer.writerows(map(asdict, (*before, point)))
    partial.replace(run / CURVE)


def read_curve(run: Path) -> list[CurvePoint]:
    """The run's points; none if it has made none."""
    path = run / CURVE
    if not path.exists():
        return []
    kinds = {field.name: int if field.type == "int" else float for field in fields(CurvePoint)}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [CurvePoint(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]  # type: ignore[arg-type]


def draw_run(run: Path) -> None:
    """Draws the run's losses over its training tokens."""
    points = read_curve(run)
    curves = {
        "training": [(point.tokens, point.train_loss) for point in points],
        "held out": [(point.tokens, point.heldout_loss) for point in points],
    }
    picture = draw_curves(
        curves, title=run.resolve().name, x_label="training tokens", y_label="loss, nats a token"
    )
    (run / PICTURE).write_text(picture, encoding="utf-8")
