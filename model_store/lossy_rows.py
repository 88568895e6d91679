"""Ways to make rows smaller that no table uses: low rank and product quantisation, to be measured.

Both are fitted to the rows they are to hold, and need their basis or codebooks beside the rows to be read.
Sources: truncated SVD; Jegou et al., Product Quantization for Nearest Neighbor Search, 2011.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

NUM_CENTROIDS = 256
"""One byte names a centroid."""

_FIT_ROWS = 16_384
_KMEANS_STEPS = 12
_ROWS_PER_PART = 8192


class LossyRows(Protocol):
    """A fitted way to store rows.

    Attributes:
        row_bytes: bytes of one row; shared_bytes: what is stored once beside all rows.
    """

    name: str
    row_bytes: int
    shared_bytes: int

    def encode(self, rows: Tensor) -> Tensor:
        """(n, dim) float32 -> codes (n, any)."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> (n, dim) float32."""
        ...


class LowRankRows:
    """The mean row, and each row's float16 coordinates along the `rank` directions of most variance."""

    def __init__(self, rows: Tensor, rank: int) -> None:
        self.name = f"rank {rank}"
        fit = _sample(rows).double()
        self._mean = fit.mean(0).float()
        _, directions = torch.linalg.eigh((fit - self._mean).T @ (fit - self._mean))  # in rising order
        self._basis = directions[:, -rank:].float().contiguous()  # (dim, rank)
        self.row_bytes = 2 * rank
        self.shared_bytes = 4 * (self._basis.numel() + self._mean.numel())

    def encode(self, rows: Tensor) -> Tensor:
        coordinates: Tensor = (rows - self._mean) @ self._basis
        return coordinates.half()

    def decode(self, codes: Tensor) -> Tensor:
        return torch.addmm(self._mean, codes.float(), self._basis.T)


class ProductQuantizedRows:
    """One byte for each `width` neighbouring values: which of 256 centroids is nearest."""

    def __init__(self, rows: Tensor, width: int) -> None:
        self.name = f"pq {width} values/byte"
        parts = _parts(_sample(rows), width)
        self._centroids = _k_means(parts)  # (parts, 256, width)
        self.row_bytes = len(parts)
        self.shared_bytes = 4 * self._centroids.numel()
        self._width = width

    def encode(self, rows: Tensor) -> Tensor:
        parts = _parts(rows, self._width)
        return _nearest(parts, self._centroids).T.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        flat = self._centroids.flatten(0, 1)
        first = torch.arange(codes.shape[1]) * NUM_CENTROIDS
        restored: Tensor = flat[codes.long() + first].flatten(1)
        return restored


def in_parts(rows: LossyRows, wanted: Tensor) -> Tensor:
    """`wanted` (n, dim) encoded and decoded, a part at a time."""
    return torch.cat([rows.decode(rows.encode(part.float())) for part in torch.split(wanted, _ROWS_PER_PART)])


def _sample(rows: Tensor) -> Tensor:
    """Up to _FIT_ROWS rows, evenly spread over the ranks."""
    chosen = torch.linspace(0, len(rows) - 1, min(_FIT_ROWS, len(rows))).long()
    return rows[chosen].float()


def _parts(rows: Tensor, width: int) -> Tensor:
    """(n, dim) -> (dim // width, n, width)."""
    return rows.reshape(len(rows), -1, width).transpose(0, 1).contiguous()


def _k_means(points: Tensor) -> Tensor:
    """(problems, n, width) -> (problems, 256, width): Lloyd's steps from points drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randperm(points.shape[1], generator=generator)[:NUM_CENTROIDS]
    if len(start) < NUM_CENTROIDS:
        raise ValueError(f"there are {points.shape[1]} rows, wanted at least {NUM_CENTROIDS} to fit to")
    centroids = points[:, start].clone()
    for _ in range(_KMEANS_STEPS):
        for problem, found in zip(range(len(points)), _nearest(points, centroids), strict=True):
            sums = torch.zeros_like(centroids[problem]).index_add_(0, found, points[problem])
            counts = torch.bincount(found, minlength=NUM_CENTROIDS).unsqueeze(1)
            # a centroid that nothing is nearest to stays where it is
            centroids[problem] = torch.where(counts > 0, sums / counts.clamp(min=1), centroids[problem])
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid (problems, 256, width) of each point (problems, n, width)."""
    lengths = centroids.square().sum(-1)  # (problems, 256)
    return torch.stack(
        [
            torch.addmm(length, of_problem, their.T, alpha=-2).argmin(1)
            for of_problem, their, length in zip(points, centroids, lengths, strict=True)
        ]
    )
