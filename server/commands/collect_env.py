"""`scone collect-env`: what a bug report should hold; nothing secret, no host names, no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

from scone.server.settings import Command, Resolved
from scone.server.version import version

PACKAGES = (
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "gguf",
    "lmdb",
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "prometheus-client",
    "triton",
    "ray",
)


def run(settings: Resolved) -> int:
    """Prints `name: value` lines."""
    for name, value in _facts():
        print(f"{name}: {value}")
    return 0


def _facts() -> Iterator[tuple[str, object]]:
    yield "scone-serve", version()
    yield "python", platform.python_version()
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}, {platform.libc_ver()[1]}"
    yield "cpu", _first_line("/proc/cpuinfo", "model name")
    yield "cores", f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} usable"
    yield "memory", _first_line("/proc/meminfo", "MemTotal")
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
    import torch

    yield "torch threads", torch.get_num_threads()
    yield "torch CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "CUDA", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not available"
    from scone.kernels.extension import native

    yield "native kernels", "built" if native is not None else "not built; slow oracles are used"
    # Names only: values may be secrets.
    yield "variables set", ", ".join(sorted(n for n in os.environ if n.startswith("SCONE_"))) or "none"


def _first_line(path: str, key: str) -> str:
    try:
        with open(path) as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")
    except OSError:
        return "unknown"


COMMAND = Command(
    name="collect-env", help="Print versions and hardware, for bug reports.", settings=(), run=run
)
