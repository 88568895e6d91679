"""The floors are kept: each folder imports only from itself and from those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["kernels", "model_store", "cache", "server"]


def scone_imports(path: Path) -> set[tuple[str, ...]]:
    """The `scone.a.b` modules that a file imports, as ("a", "b")."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "scone":
            for alias in node.names:
                found.add(tuple((node.module + "." + alias.name).split(".")[1:]))
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "scone"}
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_imports_only_what_is_below(floor: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files, f"{floor}/ holds no Python file"
    wrong = [
        f"{f.relative_to(ROOT)}: scone.{'.'.join(m)}"
        for f in files
        for m in scone_imports(f)
        if m[0] not in allowed
    ]
    assert not wrong


def test_engine_knows_no_http_and_api_no_tensors() -> None:
    for folder, banned in (("server/engine", {"fastapi", "starlette", "uvicorn"}), ("server/api", {"torch"})):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            names = {
                a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
            }
            names |= {
                n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
            }
            assert not names & banned, f"{path.relative_to(ROOT)} imports {sorted(names & banned)}"


def test_kernels_is_no_regular_package() -> None:
    """An __init__.py there would hide Hugging Face's `kernels` from transformers run in this folder."""
    assert not (ROOT / "kernels/__init__.py").exists()
