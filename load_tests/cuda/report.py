"""Figures by name, and the machine they are of."""

from __future__ import annotations

import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


class Report:
    """Figures by name; a part that fails leaves its reason."""

    def __init__(self, limit_seconds: float) -> None:
        self.figures: dict[str, Any] = {}
        self._ends_at = time.monotonic() + limit_seconds

    def take(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        began = time.monotonic()
        if began > self._ends_at:
            figures: Any = "not measured: out of time"
        else:
            try:
                figures = measure()
            except Exception as error:
                traceback.print_exc(limit=-6)
                figures = f"failed: {type(error).__name__}: {error}"[:300]
        self.figures.setdefault(part, {})[name] = figures
        print(f"{part} {name}: {json.dumps(figures)} ({time.monotonic() - began:.1f} s)", flush=True)


def machine() -> dict[str, Any]:
    """What this runs on."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "host": platform.machine()}
    with suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        with suppress(OSError, subprocess.SubprocessError):
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,power.limit",
                "--format=csv,noheader",
            ]
            about["nvidia_smi"] = subprocess.run(
                query, capture_output=True, text=True, timeout=10
            ).stdout.strip()
    return about
