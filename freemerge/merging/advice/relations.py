"""How task vectors relate to each other and to their base: norms, angles, signs, leading directions, frequencies.

- One pass in chunks over all values gives norms, cosines and signs, each tensor's sums in one thread, so that the
  numbers do not depend on the number of threads.
- Leading directions and frequencies need whole matrices, and are measured on a seeded sample of them.

Notation: K models, v_k the task vector of model k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from freemerge.merging.engine.reader import Reader
from freemerge.merging.methods.angles import inner_products, inverse_of, normalized
from freemerge.merging.methods.filters import Filter
from freemerge.merging.methods.matrices import is_embedding, stack_shape
from freemerge.runtime.threads import run
from freemerge.tensors.chunks import Chunk, chunks
from freemerge.tensors.low_rank import factorize

_Result = TypeVar("_Result")
Table = tuple[tuple[float, ...], ...]

_MATRICES = 12  # sampled
_LARGEST = 1 << 26  # values of a sampled matrix, which bounds time and memory
_DIRECTIONS = 8  # leading singular directions of a matrix, of at most a quarter of its shorter side
_NOTHING = 1e-5  # singular values below this fraction of the largest are rounding


@dataclass(frozen=True)
class Relations:
    """Measurements on K task vectors.

    Args:
        labels: names of the K models.
        parameters: number of values of one task vector.
        base_norm: ‖θ_base‖ over the merged tensors.
        norms: ‖v_k‖.
        changed: fraction of the values that fine-tuning changed.
        cosines: ⟨v_i, v_j⟩ / (‖v_i‖·‖v_j‖); 0 for a vector of zeros.
        sign_conflicts: of the values that both models changed, the fraction that they changed in opposite directions.
        disagreement: of the values that several models changed, the fraction whose signs are not all the same.
        matrices: names of the sampled matrices, of those that a model changed; the other measurements are means over
            them, those of pairs over the ones that both changed.
        directions: number of leading singular directions that were compared, r.
        left_overlap: ‖U_iᵀU_j‖² / r with the leading left singular vectors: 1 for the same subspace, 0 for orthogonal
            ones.
        right_overlap: likewise with the right ones.
        left_chance: the overlap of random subspaces.
        right_chance: likewise on the right.
        low_frequency: fraction of ‖v_k‖² that the filter removes.
        low_frequency_chance: the fraction that it removes of white noise.
    """

    labels: tuple[str, ...]
    parameters: int
    base_norm: float
    norms: tuple[float, ...]
    changed: tuple[float, ...]
    cosines: Table
    sign_conflicts: Table
    disagreement: float
    matrices: tuple[str, ...]
    directions: float
    left_overlap: Table
    right_overlap: Table
    left_chance: float
    right_chance: float
    low_frequency: tuple[float, ...]
    low_frequency_chance: float

    @property
    def relative_norms(self) -> tuple[float, ...]:
        """‖v_k‖ / ‖θ_base‖; 0 for a base of zeros."""
        return tuple(norm / self.base_norm if self.base_norm else 0.0 for norm in self.norms)


def measure(reader: Reader, filter: Filter, count: Callable[[Chunk], None] | None = None) -> Relations:
    """Measure the task vectors of a plan.

    Args:
        reader: reads the plan's tensors.
        filter: the filter whose removed energy is measured.
        count: called with each chunk of the pass over all values after it was read.

    Raises:
        MergeError: a value is NaN or infinite.
    """
    plan = reader.plan
    models = len(plan.models)
    sums = _Sums.zeros(models)
    parts = _in_threads(lambda name: _sum(reader, name, count), plan.weights)
    for part in parts:
        sums.add(part)
    norms, cosines = normalized(sums.products)
    changed = [name for name, part in zip(plan.weights, parts, strict=True) if bool(part.changed.any())]
    sampled = _sample({name: plan.shapes[name] for name in changed})
    sizes = {name: math.prod(_matrix_shape(name, plan.shapes[name]) or ()) for name in sampled}
    matrices = _in_threads(lambda name: _look(reader, name, filter), sampled, sizes)
    total = max(len(matrices), 1)
    energy = sum((matrix.energy for matrix in matrices), torch.zeros(models, dtype=torch.float64))
    removed = sum((matrix.removed for matrix in matrices), torch.zeros(models, dtype=torch.float64))
    empty = torch.zeros(models, models, dtype=torch.float64)
    compared = sum((matrix.compared for matrix in matrices), empty).clamp(min=1)
    return Relations(
        labels=tuple(model.label for model in plan.models),
        parameters=sum(plan.shapes[name].numel() for name in plan.weights),
        base_norm=float(sums.base) ** 0.5,
        norms=tuple(norms.tolist()),
        changed=tuple((sums.changed.diagonal() / max(sums.values, 1)).tolist()),
        cosines=_table(cosines),
        sign_conflicts=_table((sums.changed - sums.agreed) / 2 / sums.changed.clamp(min=1)),
        disagreement=sums.disputed / max(sums.shared, 1),
        matrices=tuple(sampled),
        directions=sum(matrix.directions for matrix in matrices) / total,
        left_overlap=_table(sum((matrix.left for matrix in matrices), empty) / compared),
        right_overlap=_table(sum((matrix.right for matrix in matrices), empty) / compared),
        left_chance=sum(matrix.left_chance for matrix in matrices) / total,
        right_chance=sum(matrix.right_chance for matrix in matrices) / total,
        low_frequency=tuple((removed * inverse_of(energy)).tolist()),
        low_frequency_chance=sum(matrix.removed_of_noise for matrix in matrices) / total,
    )


@dataclass
class _Sums:
    """Sums over values of K task vectors."""

    products: Tensor  # ⟨v_i, v_j⟩, (K, K) float64
    changed: Tensor  # number of values that models i and j both changed, (K, K) float64
    agreed: Tensor  # those changed in the same direction, less those in opposite ones, (K, K) float64
    base: float = 0.0  # ‖θ_base‖²
    values: int = 0
    shared: int = 0  # values that several models changed
    disputed: int = 0  # those of them whose signs differ

    @classmethod
    def zeros(cls, models: int) -> _Sums:
        products, changed, agreed = torch.zeros(3, models, models, dtype=torch.float64)
        return cls(products, changed, agreed)

    def add(self, other: _Sums) -> None:
        self.products += other.products
        self.changed += other.changed
        self.agreed += other.agreed
        self.base += other.base
        self.values += other.values
        self.shared += other.shared
        self.disputed += other.disputed

    @classmethod
    def of(cls, base: Tensor, deltas: Tensor) -> _Sums:
        """The sums of a chunk: (n,) of any floating-point dtype, and (K, n) float32."""
        products = inner_products(deltas)
        signs = deltas.sign()
        up, down = (signs > 0).sum(0), (signs < 0).sum(0)
        agreed = (signs @ signs.T).double().cpu()  # whole numbers below 2²⁴: exact in float32
        changes = signs.abs_()
        return cls(
            products,
            (changes @ changes.T).double().cpu(),
            agreed,
            float(base.double().square().sum()),
            base.numel(),
            int((up + down > 1).sum()),
            int(((up > 0) & (down > 0)).sum()),
        )


def _sum(reader: Reader, name: str, count: Callable[[Chunk], None] | None) -> _Sums:
    """The sums over one tensor."""
    models = len(reader.plan.models)
    total = _Sums.zeros(models)
    for chunk in chunks({name: reader.plan.shapes[name]}, models, reader.chunk):
        operands = reader.read_again(chunk)
        total.add(_Sums.of(operands.base, operands.deltas))
        if count is not None:
            count(chunk)
    return total


class _Matrix(NamedTuple):
    """Measurements on one matrix of K models; see `Relations`."""

    directions: int
    compared: Tensor  # whether both models changed it, (K, K) float64
    left: Tensor  # (K, K) float64
    right: Tensor  # (K, K) float64
    left_chance: float
    right_chance: float
    energy: Tensor  # (K,) float64
    removed: Tensor  # (K,) float64
    removed_of_noise: float


def _sample(shapes: Mapping[str, torch.Size]) -> list[str]:
    """Matrices of all depths: a seeded one of each equal part of all, so that no kind of layer is left out."""
    names = [name for name, shape in shapes.items() if _matrix_shape(name, shape) is not None]
    if len(names) <= _MATRICES:
        return names
    offsets = torch.rand(_MATRICES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = (torch.arange(_MATRICES) + offsets) * (len(names) / _MATRICES)
    return list(dict.fromkeys(names[place] for place in places.long().tolist()))


def _matrix_shape(name: str, shape: torch.Size) -> tuple[int, int] | None:
    """The shape of the matrix to look at, of stacked experts the first one's; None if there is none."""
    stack = stack_shape(name, shape)
    if stack is None or is_embedding(name):
        return None
    _, rows, columns = stack
    return (rows, columns) if min(rows, columns) > 1 and rows * columns <= _LARGEST else None


def _look(reader: Reader, name: str, filter: Filter) -> _Matrix:
    """Measure one matrix."""
    found = _matrix_shape(name, reader.plan.shapes[name])
    assert found is not None  # see `_sample`
    rows, columns = found
    deltas = reader.read(Chunk(name, 0, rows * columns)).deltas.view(-1, rows, columns)
    rank = max(1, min(_DIRECTIONS, min(rows, columns) // 4))
    factors = [factorize(delta, rank) for delta in deltas]
    left = [_basis(factor.left) for factor in factors]
    right = [_basis(factor.right.T) for factor in factors]
    energy = torch.tensor([_energy(delta) for delta in deltas], dtype=torch.float64)
    kept = torch.tensor([_energy(filter.apply_(delta)) for delta in deltas], dtype=torch.float64)
    return _Matrix(
        rank,
        (energy[:, None] * energy > 0).double(),
        _overlaps(left),
        _overlaps(right),
        rank / rows,
        rank / columns,
        energy,
        energy - kept,
        1 - _passes(filter, rows, columns),
    )


def _basis(factor: Tensor) -> Tensor:
    """Orthonormal columns from a factor of `factorize`, (m, r), without those that are rounding: (m, ≤ r)."""
    norms = factor.norm(dim=0)  # square roots of the singular values
    kept = norms.square() > norms.square().max() * _NOTHING
    return factor[:, kept] / norms[kept]


def _overlaps(bases: Sequence[Tensor]) -> Tensor:
    """‖U_iᵀU_j‖² / min(r_i, r_j), (K, K) float64; 0 with a basis that is empty."""
    table = torch.zeros(len(bases), len(bases), dtype=torch.float64)
    for i, one in enumerate(bases):
        for j, other in enumerate(bases):
            directions = min(one.shape[1], other.shape[1])
            if directions:
                table[i, j] = float((one.T @ other).square().sum()) / directions
    return table


def _passes(filter: Filter, height: int, width: int) -> float:
    """The fraction of white noise's energy that a filter lets through: the mean of its squared gains."""
    columns = torch.arange(width, dtype=torch.float64)[None, :]
    total = 0.0
    for some in torch.arange(height, dtype=torch.float64)[:, None].split(max(1, (1 << 18) // width)):
        mirrored = filter.gain((height - some) % height, (width - columns) % width, height, width)
        # The real part of the inverse transform has the mean of the gains of a bin and of its mirror image.
        total += float(((filter.gain(some, columns, height, width) + mirrored) / 2).square().sum())
    return total / (height * width)


def _energy(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _in_threads(
    function: Callable[[str], _Result], names: Sequence[str], sizes: Mapping[str, int] | None = None
) -> list[_Result]:
    """The results of a function of tensors, in their order, from all threads.

    Args:
        function: called with a name.
        names: names of tensors.
        sizes: name → number of values that a call holds; no more are held at a time than the largest call takes.
    """
    found: dict[str, _Result] = {}

    def work(jobs: Iterator[str]) -> None:
        for name in jobs:
            found[name] = function(name)

    if sizes:
        run(work, names, cost=sizes.__getitem__, budget=max(sizes.values()))
    else:
        run(work, names)
    return [found[name] for name in names]


def _table(values: Tensor) -> Table:
    return tuple(tuple(row) for row in values.tolist())
