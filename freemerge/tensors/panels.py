"""Symmetric matrices as their lower triangle in panels of a few columns: half of the memory, half of the arithmetic.

The Cholesky factor overwrites the triangle, and a solution its right-hand sides. Panels, and rows of right-hand sides,
are processed by several threads in parallel; no result depends on their number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from freemerge.runtime.pages import fresh
from freemerge.runtime.threads import each, load_linalg
from freemerge.tensors.chunks import at_a_time

_WIDTH = 256  # columns of a panel: large enough for fast products, small enough that little of the upper half is stored
_ROWS = 256  # rows of right-hand sides that a thread solves at a time


class Panels:
    """The lower triangle of S, (n, n) float32 and symmetric, or of its Cholesky factor L, S = L Lᵀ.

    Args:
        size: n.
        device: of the memory.
        whole: (n, n) memory whose lower triangle is used, with the panels as views of it; new memory of half the size
            if None. It is set to zero.
    """

    def __init__(self, size: int, device: torch.device, whole: Tensor | None = None) -> None:
        self.size, self._whole = size, whole
        self.parts = column_parts(size, device)
        if whole is not None:
            self.panels = [whole.zero_()[part.start :, part] for part in self.parts]
            return
        shapes = [(size - part.start, part.stop - part.start) for part in self.parts]
        memory = fresh((sum(rows * columns for rows, columns in shapes),), torch.float32, device).zero_()
        runs = memory.split([rows * columns for rows, columns in shapes])
        self.panels = [run.view(shape) for run, shape in zip(runs, shapes, strict=True)]  # rows start at the diagonal

    def fill(self, add: Callable[[slice, Tensor], object]) -> None:
        """Call `add` with the columns of each panel and its memory, (n − first column, columns), in parallel."""
        each(lambda index: add(self.parts[index], self.panels[index]), range(len(self.parts)))

    def add_to_diagonal_(self, value: float) -> None:
        """S + value·1, in place."""
        for panel in self.panels:
            panel.diagonal().add_(value)

    def full(self) -> Tensor:
        """S as a whole, (n, n): in the memory given for it, or in new memory."""
        whole = self._whole
        if whole is None:
            whole = fresh((self.size, self.size), torch.float32, self.panels[0].device)
            for part, panel in zip(self.parts, self.panels, strict=True):
                whole[part.start :, part] = panel
        mirror_(whole)
        return whole

    def factorize_(self) -> bool:
        """Replace S by L, in place; False if S is singular: the memory is then undefined."""
        load_linalg(self.panels[0].device)
        for index, panel in enumerate(self.panels):
            width = panel.shape[1]
            factor, failed = torch.linalg.cholesky_ex(panel[:width])
            if bool(failed):
                return False
            panel[:width] = factor
            self._reduce(index, factor)
        return True

    def _reduce(self, index: int, factor: Tensor) -> None:
        """One step of the factorization: a panel below its factor, and its part in all later ones."""
        below, first = self.panels[index][len(factor) :], self.parts[index].stop

        def reduce(later: int) -> None:
            part = self.parts[later]
            own = below[part.start - first :]
            self.panels[later].addmm_(own, own[: part.stop - part.start].T, alpha=-1)

        each(lambda rows: _divide_(rows, factor.T, upper=True), below.split(4 * _ROWS))
        each(reduce, range(index + 1, len(self.panels)))

    def divide_(self, products: Tensor) -> Tensor:
        """X S⁻¹ = X L⁻ᵀ L⁻¹, given the factor; (R, n) float32, overwritten by the result."""

        def divide(rows: Tensor) -> None:
            for part, panel in zip(self.parts, self.panels, strict=True):
                width = panel.shape[1]
                own = _divide_(rows[:, part], panel[:width].T, upper=True)
                rows[:, part.stop :].addmm_(own, panel[width:].T, alpha=-1)
            for part, panel in zip(reversed(self.parts), reversed(self.panels), strict=True):
                width = panel.shape[1]
                own = rows[:, part].addmm_(rows[:, part.stop :], panel[width:], alpha=-1)
                _divide_(own, panel[:width], upper=False)

        each(divide, products.split(at_a_time(_ROWS, products.device, self.size)))
        return products


def column_parts(size: int, device: torch.device) -> list[slice]:
    """Ranges of columns, or of rows, for one job of a thread each; on a GPU, few large ones."""
    width = at_a_time(_WIDTH, device, size)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def gram(matrix: Tensor) -> Tensor:
    """A Aᵀ of (m, n) float32 or float64: (m, m), exactly symmetric."""
    rows = len(matrix)
    whole = fresh((rows, rows), matrix.dtype, matrix.device)

    def multiply(part: slice) -> None:
        torch.mm(matrix[part.start :], matrix[part].T, out=whole[part.start :, part])

    each(multiply, column_parts(rows, matrix.device))
    mirror_(whole)
    return whole


def mirror_(matrix: Tensor) -> None:
    """Copy the lower triangle of (n, n) to the upper one, in place."""
    for part in column_parts(len(matrix), matrix.device):
        matrix[part, part.stop :] = matrix[part.stop :, part].T
        square = matrix[part, part]
        square.copy_(square.tril() + square.tril(-1).T)


def _divide_(rows: Tensor, triangle: Tensor, upper: bool) -> Tensor:
    """X T⁻¹ in place, with T triangular."""
    return rows.copy_(torch.linalg.solve_triangular(triangle, rows, upper=upper, left=False))
