"""The curve of a run: a line a step, also where a run made a line and was ended before its state was kept."""

from __future__ import annotations

import math
from pathlib import Path

from scone.model_store.training_curve import CurvePoint, append_point, read_curve


def point(step: int, loss: float) -> CurvePoint:
    return CurvePoint(
        step=step,
        tokens=64 * step,
        train_loss=math.inf,
        heldout_loss=loss,
        match_rate=0.5,
        learning_rate=1e-3,
        seconds=step,
    )


def test_a_line_made_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for step, loss in ((0, 5.0), (10, 4.0), (20, 3.5), (10, 4.1), (20, 3.25), (30, 3.0)):
        append_point(tmp_path, point(step, loss))
    assert read_curve(tmp_path) == [point(0, 5.0), point(10, 4.1), point(20, 3.25), point(30, 3.0)]
