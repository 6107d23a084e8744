"""High-pass filters for task vectors: each weight is treated as an image whose fine detail is task-specific.

- A weight with ≥ 2 dimensions is a matrix (dim 0 × the rest), filtered in the 2-D Fourier domain; 1-D tensors pass.
- Real arithmetic for real input: the real part of the inverse transform with an asymmetric mask M is the inverse with
  (M(k) + M(−k))/2, so half of the spectrum is enough.
- The second transform is only applied to lines whose gains vary. A line that is kept or removed completely needs none.
- Where all but a few lines are kept, as in a square matrix with `NyquistDisc(0.7)`, these few are subtracted one by one
  and nothing else is transformed.
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

from freemerge.merging.methods.base import require, require_number
from freemerge.runtime.threads import scratch
from freemerge.tensors.chunks import at_a_time

_FEW_LINES = 24  # number of lines up to which two thin matrix products are faster than two transforms
_BLOCK = 1 << 16  # values transformed at a time; they fit in the cache


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
            tensor: any shape, float32. A tensor with fewer than two dimensions is returned unfiltered.

        Returns:
            The real part of the filtered tensor, same shape and dtype, in new memory.
        """
        return self.apply_(tensor.clone(memory_format=torch.contiguous_format))

    def apply_(self, tensor: Tensor) -> Tensor:
        """Filter a contiguous tensor in place, and return it; see `__call__`."""
        if tensor.dim() > 1 and tensor.numel():
            matrix = tensor.view(len(tensor), -1)
            _filter_(matrix, _plan(self, *matrix.shape))
        return tensor


@dataclass(frozen=True)
class NyquistDisc(Filter):
    """Keep the disc around the highest frequencies: √((k_y − ⌊H/2⌋)² + (k_x − ⌊W/2⌋)²) ≤ radius · min(H, W).

    The filter of FREE-Merging's released code, without its error of counting the bins of an inner circle twice. It acts
    on the unshifted spectrum, so the removed fraction depends on the aspect ratio: 0.02 % of the bins of 768 × 768, 58
    % of 2304 × 768.

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
    """Smooth high-pass 1/(1 + (cutoff/f)^(2·order)), without ringing; it approaches `HighPass` for high orders.

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
    """Smooth high-pass 1 − exp(−f²/(2·cutoff²)), without any ringing.

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
    """The operations on the lines of a half spectrum (real transform along `axis`, lines across it)."""

    axis: int
    removed: Tensor  # indices of lines of gain 0
    varying: Tensor  # indices of lines that need the second transform
    gains: Tensor  # (len(varying), length of a line) float32
    taken: _Taken | None  # set if so few lines are not kept that they are subtracted one by one


class _Taken(NamedTuple):
    """L lines of a half spectrum to subtract, each as a wave."""

    waves: Tensor  # (length of the axis, 2·L): cosines and negative sines
    losses: Tensor  # (length of a line, L): factors of the subtracted lines, (1 − gain)·(weight of the line)


@lru_cache(maxsize=4)  # a model has few shapes, which alternate
def _plan(filter_: Filter, height: int, width: int) -> _Plan:
    axis = 0 if height > width else 1  # lines across the longer side are short, and fewer of them vary
    along, across = (height, width) if axis == 0 else (width, height)
    lines = torch.arange(along // 2 + 1, dtype=torch.float64)[:, None]
    bins = torch.arange(across, dtype=torch.float64)[None, :]

    def gain(lines: Tensor, bins: Tensor) -> Tensor:
        rows, columns = (lines, bins) if axis == 0 else (bins, lines)
        return filter_.gain(rows, columns, height, width)

    removed, varying, gains = [], [], []
    step = max(1, (1 << 15) // across)  # bounds the float64 temporaries
    for start in range(0, len(lines), step):
        some = lines[start : start + step]
        # M(−k): the bin −k is (n − k) mod n.
        symmetric = (gain(some, bins) + gain((along - some) % along, (across - bins) % across)) / 2
        zero = (symmetric == 0).all(1)
        varies = ~(zero | (symmetric == 1).all(1))
        removed.append(start + zero.nonzero()[:, 0])
        varying.append(start + varies.nonzero()[:, 0])
        gains.append(symmetric[varies].float())
    plan = _Plan(axis, torch.cat(removed), torch.cat(varying), torch.cat(gains), None)
    changed = torch.cat([plan.removed, plan.varying])
    if not 0 < len(changed) <= _FEW_LINES:
        return plan
    angles = torch.arange(along, dtype=torch.float64)[:, None] * (2 * torch.pi / along) * changed
    weights = torch.where((changed == 0) | (2 * changed == along), 1.0, 2.0) / along  # for itself and its mirror image
    losses = torch.cat([torch.ones(len(plan.removed), across), 1 - plan.gains])
    waves = torch.cat([angles.cos(), -angles.sin()], dim=1)
    return plan._replace(taken=_Taken(waves.float(), (losses * weights[:, None]).T.float()))


def _filter_(matrix: Tensor, plan: _Plan) -> None:
    """Filter an (H, W) float32 matrix in place."""
    if plan.taken is not None:
        _take_lines(matrix.T if plan.axis == 0 else matrix, plan.taken)
    elif len(plan.removed) or len(plan.varying):
        if plan.axis == 1 and matrix.is_contiguous():
            _transform(matrix, plan)
            return
        lines = matrix.T if plan.axis == 0 else matrix
        rows = scratch("filter rows", lines.shape, lines.dtype, lines.device).copy_(lines)
        _transform(rows, plan)
        matrix.copy_(rows.T if plan.axis == 0 else rows)


def _take_lines(rows: Tensor, taken: _Taken) -> None:
    """Subtract a few lines of the spectrum, each as a wave: two thin matrix products instead of two transforms."""
    waves, losses = taken.waves.to(rows.device), taken.losses.to(rows.device)
    parts = rows @ waves  # (length of a line, 2·L): real and imaginary parts
    spectrum = torch.complex(*(part.contiguous() for part in parts.chunk(2, dim=1)))
    spectrum = torch.fft.ifft(torch.fft.fft(spectrum, dim=0).mul_(losses), dim=0)
    rows.addmm_(torch.cat([spectrum.real, spectrum.imag], dim=1), waves.T, alpha=-1)


def _transform(rows: Tensor, plan: _Plan) -> None:
    """Transform a few rows at a time; their spectrum overwrites them as far as it fits.

    Args:
        rows: (length of a line, length of the axis) float32, contiguous; overwritten.
        plan: the operations on the lines.
    """
    length = rows.shape[1]
    stays = torch.ones(length // 2 + 1, dtype=torch.bool).index_fill_(0, plan.removed, False).nonzero()[:, 0].tolist()
    if not stays:
        rows.zero_()
        return
    first, last = stays[0], stays[-1] + 1
    if length % 2 or rows.storage_offset() % 2:
        held = [(first, scratch("filter spectrum", (len(rows), last - first), torch.complex64, rows.device))]
    else:  # a whole spectrum needs one line more than there is room for
        end = min(last, first + length // 2)
        inside = rows.view(torch.complex64)[:, : end - first]
        held = [(first, inside), (end, inside.new_empty(len(rows), last - end))]
    step = at_a_time(_BLOCK, rows.device) // length + 1
    blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
    for block in blocks:
        spectrum = torch.fft.rfft(rows[block])
        for start, lines in held:
            lines[block] = spectrum[:, start : start + lines.shape[1]]
    for start, lines in held:
        _filter_lines(lines, start, plan)
    for block in blocks:
        spectrum = rows.new_zeros(len(rows[block]), length // 2 + 1, dtype=torch.complex64)
        for start, lines in held:
            spectrum[:, start : start + lines.shape[1]] = lines[block]
        rows[block] = torch.fft.irfft(spectrum, n=length)


def _filter_lines(lines: Tensor, start: int, plan: _Plan) -> None:
    """Apply the gains to some lines of a half spectrum, (length of a line, L) complex64, from line `start` on."""
    stop = start + lines.shape[1]
    removed = plan.removed[(plan.removed >= start) & (plan.removed < stop)] - start
    lines[:, removed.to(lines.device)] = 0
    begin, end = torch.searchsorted(plan.varying, torch.tensor([start, stop])).tolist()
    step = max(1, at_a_time(_BLOCK, lines.device) // len(lines))
    for some in range(begin, end, step):
        part = slice(some, min(some + step, end))
        which, gains = (plan.varying[part] - start).to(lines.device), plan.gains[part].to(lines.device)
        varied = lines[:, which].T.contiguous()  # (lines, length of a line)
        lines[:, which] = torch.fft.ifft(torch.fft.fft(varied).mul_(gains)).T
