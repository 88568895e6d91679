"""The online look-up: match, read, stage. Knows neither HTTP nor sequences."""

from scone.cache.fgram_table import FGramTable
from scone.cache.prefetcher import PendingRows, Prefetcher
from scone.cache.row_tiers import Tier
from scone.cache.table_config import TableConfig

__all__ = ["FGramTable", "PendingRows", "Prefetcher", "TableConfig", "Tier"]
