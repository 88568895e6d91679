"""Has native models run on one of the instruction sets that the processor has."""

from __future__ import annotations

import pytest

from scone.kernels.packed_linear import INSTRUCTION_SETS, Workspace
from scone.server.engine import native_forward


def use_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are packed from now on run on it."""
    if name not in INSTRUCTION_SETS:
        pytest.skip(f"this processor has no {name}")

    def workspace(num_threads: int, *, instruction_set: str | None) -> Workspace:
        assert instruction_set is None
        return Workspace(num_threads, instruction_set=name)

    monkeypatch.setattr(native_forward, "Workspace", workspace)
