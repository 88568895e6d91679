"""The native extension, or None where it was not built; the one place that imports it.

Without it every kernel runs on its oracle: the same results, much slower. That is said once, in the log.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

_logger = logging.getLogger(__name__)


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("scone.kernels._native")
    except ImportError as error:
        _logger.warning("native kernels are not available (%s): running on the slow NumPy/torch ones", error)
        return None


native: ModuleType | None = _load()
