"""Residuals cut to those that a set of f-grams would miss most."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scone.model_store.fgram_residuals import FGramResiduals
from scone.model_store.fgram_set import MIN_N, FGramSet


def keep_most_missed(residuals: FGramResiduals, fgrams: FGramSet, num_residuals: int) -> FGramResiduals:
    """The `num_residuals` whose absence would change the set's rows most, in their old order.

    How much a residual is missed is its squared length times how often rows that contain it are used. Those
    of no f-gram of the set are never kept.
    """
    squares = residuals.values.float().square().sum(1).cpu().numpy()
    missed = _count_uses(residuals, fgrams) * squares
    order = np.argsort(-missed, kind="stable")[: min(num_residuals, np.count_nonzero(missed))]
    kept = torch.from_numpy(np.sort(order))
    return FGramResiduals(residuals.values[kept], residuals.tokens[kept], residuals.lengths[kept])


def _count_uses(residuals: FGramResiduals, fgrams: FGramSet) -> NDArray[np.int64]:
    """(num_residuals,) how often the counted corpus used each.

    That is how often its f-gram occurred there, however long the longest match was, since that contains it. A
    single token's is used wherever an f-gram of two tokens ends in it: a longer match ends in one, too.
    """
    ids = residuals.find(fgrams.tokens, fgrams.lengths)
    num_uses = np.zeros(len(residuals.lengths), np.int64)
    for n in range(MIN_N, ids.shape[1] + 1):
        own = np.flatnonzero((fgrams.lengths == n) & (ids[:, n - 1] >= 0))
        num_uses[ids[own, n - 1]] = fgrams.counts[own]
    pairs = np.flatnonzero((fgrams.lengths == MIN_N) & (ids[:, 0] >= 0))
    np.add.at(num_uses, ids[pairs, 0], fgrams.counts[pairs])
    return num_uses
