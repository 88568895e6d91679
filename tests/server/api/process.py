"""`scone serve` as a child process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


class Process:
    """A `scone serve` child, its log and its address."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "scone.server.cli", "serve", "--port", "0", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT / ".types")} | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        self.lines += iter(self.child.stderr.readline, "")

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        self.wait_for("listening on ")
        return self.log.partition("listening on ")[2].partition(";")[0]

    def wait_for(self, text: str, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert self.child.poll() is None or text in self.log, f"it ended:\n{self.log}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.log}"
            time.sleep(0.02)

    def exit_code(self, seconds: float = 150) -> int:
        code = self.child.wait(seconds)
        self._reader.join()
        return code

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.exit_code()
        assert self.child.stderr is not None
        self.child.stderr.close()
