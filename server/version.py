"""The version of the installed distribution."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """As in pyproject.toml; `0+source` where the sources run without being installed."""
    try:
        return importlib.metadata.version("scone-serve")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
