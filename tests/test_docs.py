"""What the documents point to is there: links, headings, source files, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "model_store", "cache", "server", "tests", "load_tests", "docker")
SOURCES = [
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".hpp", ".inl"}
]
TESTS = {name for path in SOURCES for name in re.findall(r"def (test_\w+)", path.read_text())}
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def anchors(document: Path) -> set[str]:
    """The headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(document: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", document.read_text()):
        target = document.parent / path if path else document
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading {anchor}"


def test_sources_and_tests_that_are_named_are_there(document: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", document.read_text())
    for name in code:
        if re.fullmatch(r"[\w/]+\.(?:py|cpp|hpp|inl)", name):
            assert any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in SOURCES), name
    assert {name for name in code if re.fullmatch(r"test_\w+", name)} <= TESTS
