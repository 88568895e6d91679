"""Pictures: bars in proportion to their values; those of the documents are drawn from committed results."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from load_tests.bar_picture import draw_bars
from load_tests.pictures import DRAWN, PICTURES, drawn
from scone.model_store.svg import COLOURS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_are_current(name: str) -> None:
    assert (PICTURES / name).read_text() == drawn(name), "run `python -m load_tests.pictures`"


def test_bars_are_in_proportion_and_say_their_values() -> None:
    groups = {"speed <1>": {"mine": 2000.4, "other": 500.0}, "2": {"other": 1.25}}
    root = ET.fromstring(draw_bars(groups, title="a & b", ours="mine"))
    ground, *bars = root.iter(f"{SVG}rect")
    widths = [float(bar.get("width", "")) for bar in bars]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1)
    assert widths[2] == widths[0], "each group has a scale of its own"
    assert [bar.get("fill") == COLOURS[0] for bar in bars] == [True, False, False]
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"a & b", "speed <1>", "2", "mine", "other", "2,000", "500", "1.25"} == set(texts)
    assert max(float(bar.get("y", "")) for bar in bars) < float(root.get("viewBox", "").split()[3])
    assert ground.get("fill") == "white"


def test_every_picture_is_well_formed() -> None:
    names = {file.name for file in PICTURES.glob("*.svg")}
    assert names >= set(DRAWN)
    for name in names:
        assert ET.parse(PICTURES / name).getroot().tag == f"{SVG}svg"
