"""High-pass filters for task vectors: each weight is an image, and fine-tuning's knowledge of one task its fine detail.

- A weight with ≥ 2 dimensions is a matrix (dim 0 × the rest), filtered in the 2-D Fourier domain; 1-D tensors pass.
- Real input, real arithmetic: the real part of the inverse transform with an asymmetric mask M is the inverse with
  (M(k) + M(−k))/2, so half of the spectrum is enough.
- The second transform is only taken of the lines whose gains vary. A line that is wholly kept or wholly removed needs
  none, which is nearly all of a square matrix under `NyquistDisc(0.7)`.
- Filters are linear: G(Σ_k λ_k·v_k) = Σ_k λ_k·G(v_k).

Notation: H × W the matrix; (k_y, k_x) a bin of its unshifted spectrum, 0 ≤ k_y < H, 0 ≤ k_x < W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.merging.method import require, require_number


class Filter(ABC):
    """A linear filter given by its gain at every bin of the spectrum; subclasses are frozen dataclasses."""

    @abstractmethod
    def gain(self, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        """The factor of each bin.

        Args:
            rows: k_y, float64, broadcastable against `columns`.
            columns: k_x, float64.
            height: H.
            width: W.

        Returns:
            Gains, float64, in the broadcast shape; they need not be symmetric.
        """

    def __call__(self, tensor: Tensor) -> Tensor:
        """Filter a tensor as a matrix (dim 0 × the rest).

        Args:
            tensor: any shape, float32. With fewer than two dimensions it passes unfiltered.

        Returns:
            The real part of the filtered tensor, same shape and dtype, in new memory.
        """
        if tensor.dim() < 2 or tensor.numel() == 0:
            return tensor.clone()
        return _apply(tensor.flatten(1), _plan(self, *tensor.flatten(1).shape)).reshape(tensor.shape)


@dataclass(frozen=True)
class NyquistDisc(Filter):
    """Keep the disc around the highest frequencies: √((k_y − ⌊H/2⌋)² + (k_x − ⌊W/2⌋)²) ≤ radius · min(H, W).

    The filter of FREE-Merging's released code, without its fault of counting the bins of an inner circle twice. It acts
    on the unshifted spectrum, so how much it removes depends on the aspect ratio: 0.02 % of the bins of 768 × 768,
    58 % of 2304 × 768.

    Args:
        radius: in units of the shorter side.
    """

    radius: float = 0.7

    def __post_init__(self) -> None:
        require_number(self, "radius", self.radius)
        require(self.radius > 0, self, f"`radius` must be positive, got {self.radius}")

    def gain(self, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        distance = ((rows - height // 2).square() + (columns - width // 2).square()).sqrt()
        return (distance <= self.radius * min(height, width)).double()


@dataclass(frozen=True)
class HighPass(Filter):
    """The paper's ideal high-pass H: keep the frequencies f ≥ cutoff (FREE-Merging, arXiv 2411.16815).

    f = √((k_y/H)² + (k_x/W)²) with both terms in [0, 1/2]: 0 is the mean, √½ the finest checkerboard.

    Args:
        cutoff: lowest frequency that is kept, in [0, √½].
    """

    cutoff: float

    def __post_init__(self) -> None:
        _require_cutoff(self, self.cutoff)

    def gain(self, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        return (_frequency(rows, columns, height, width) >= self.cutoff).double()


@dataclass(frozen=True)
class Butterworth(Filter):
    """Smooth high-pass 1/(1 + (cutoff/f)^(2·order)): no ringing; the higher the order, the nearer to `HighPass`.

    Args:
        cutoff: the frequency of gain ½, in (0, √½]; see `HighPass` for the unit.
        order: steepness, a positive integer.
    """

    cutoff: float
    order: int = 2

    def __post_init__(self) -> None:
        _require_cutoff(self, self.cutoff)
        require(isinstance(self.order, int) and self.order > 0, self, f"`order` must be ≥ 1, got {self.order!r}")

    def gain(self, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        # f^2n/(f^2n + c^2n) is the same and finite at f = 0.
        power = _frequency(rows, columns, height, width) ** (2 * self.order)
        return power / (power + self.cutoff ** (2 * self.order))


@dataclass(frozen=True)
class Gaussian(Filter):
    """Smooth high-pass 1 − exp(−f²/(2·cutoff²)): no ringing at all.

    Args:
        cutoff: the standard deviation of the complementary low-pass, in (0, √½]; see `HighPass` for the unit.
    """

    cutoff: float

    def __post_init__(self) -> None:
        _require_cutoff(self, self.cutoff)

    def gain(self, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        return -torch.expm1(-_frequency(rows, columns, height, width).square() / (2 * self.cutoff**2))


def _require_cutoff(filter_: Filter, cutoff: float) -> None:
    require_number(filter_, "cutoff", cutoff)
    lowest_allowed = isinstance(filter_, HighPass)
    inside = 0 <= cutoff <= 0.5**0.5 and (cutoff > 0 or lowest_allowed)
    require(inside, filter_, f"`cutoff` must lie in {'[' if lowest_allowed else '('}0, 0.7071], got {cutoff}")


def _frequency(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Normalized radial frequency; bin k of n stands for min(k, n − k)/n."""
    vertical = torch.minimum(rows, height - rows) / height
    horizontal = torch.minimum(columns, width - columns) / width
    return (vertical.square() + horizontal.square()).sqrt()


class _Plan(NamedTuple):
    """What to do with the lines of a half spectrum (real transform along `axis`, lines across it)."""

    axis: int
    removed: Tensor  # indices of lines of gain 0
    varying: Tensor  # indices of lines that need the second transform
    gains: Tensor  # (len(varying), length of a line) float32


@lru_cache(maxsize=4)  # a model has few shapes, and they come in turns
def _plan(filter_: Filter, height: int, width: int) -> _Plan:
    axis = 0 if height > width else 1  # lines across the longer side are short, and fewer of them vary
    along, across = (height, width) if axis == 0 else (width, height)
    lines = torch.arange(along // 2 + 1, dtype=torch.float64)[:, None]
    bins = torch.arange(across, dtype=torch.float64)[None, :]

    def gain(lines: Tensor, bins: Tensor) -> Tensor:
        rows, columns = (lines, bins) if axis == 0 else (bins, lines)
        return filter_.gain(rows, columns, height, width)

    removed, varying, gains = [], [], []
    step = max(1, (1 << 20) // across)  # bounds the float64 temporaries
    for start in range(0, len(lines), step):
        some = lines[start : start + step]
        # M(−k): the bin −k is (n − k) mod n.
        symmetric = (gain(some, bins) + gain((along - some) % along, (across - bins) % across)) / 2
        zero, one = (symmetric == 0).all(1), (symmetric == 1).all(1)
        varies = ~(zero | one)
        removed.append(start + zero.nonzero()[:, 0])
        varying.append(start + varies.nonzero()[:, 0])
        gains.append(symmetric[varies].float())
    return _Plan(axis, torch.cat(removed), torch.cat(varying), torch.cat(gains))


def _apply(matrix: Tensor, plan: _Plan) -> Tensor:
    """Filter an (H, W) float32 matrix."""
    if len(plan.removed) == 0 and len(plan.varying) == 0:
        return matrix.clone()
    removed, varying, gains = (part.to(matrix.device) for part in plan[1:])
    spectrum = torch.fft.rfft(matrix.T if plan.axis == 0 else matrix).T  # (lines, length of a line)
    spectrum[removed] = 0
    if len(varying):
        spectrum[varying] = torch.fft.ifft(torch.fft.fft(spectrum[varying]).mul_(gains))
    filtered = torch.fft.irfft(spectrum.T, n=matrix.shape[plan.axis])
    return (filtered.T if plan.axis == 0 else filtered).contiguous()
