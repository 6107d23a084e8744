"""Extraction of experts: the entries or singular directions of a residual that an expert keeps.

Notation: r = θ_k − θ_merged is the residual of task k against the merged backbone, d the density and D the number of
floating-point parameters; an expert holds d·D values. Selection over the whole model is exact and does not copy the
model, because its threshold is a streamed order statistic of the magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from freemerge.checkpoints import find_tied
from freemerge.experts.kinds.low_rank import LowRankExpert, matrix_shape
from freemerge.experts.kinds.sparse import SparseExpert
from freemerge.merging import order_statistics
from freemerge.tensors.patterns import select

Scope = Literal["model", "tensor", "row"]
Vectors = Literal["whole", "ranked", "none"]

STATISTICS = ("*running_mean", "*running_var")
"""Patterns of batch norm's running statistics, which are measured, not learnt; a changed variance could be negative."""


def extract(
    residual: Mapping[str, Tensor],
    density: float,
    *,
    scope: Scope = "model",
    rescale: Literal["none", "released"] = "none",
    vectors: Vectors = "ranked",
    exclude: Sequence[str] | None = STATISTICS,
    metadata: Mapping[str, str] | None = None,
) -> SparseExpert:
    """Keep the top-d entries of a residual by magnitude: M(r, d).

    Args:
        residual: tensor name → r of any shape, floating point; usually θ_k − θ_merged.
        density: fraction d ∈ (0, 1] of the entries to keep.
        scope: where magnitudes are compared: over the whole `model`, within each `tensor`, or within each `row` (dim 0,
            as in the released code; tensors with fewer than 2 dimensions are one row).
        rescale: `none` leaves the entries unchanged; `released` multiplies them by μ = −E|kept|·log10(d) / E|r| per
            tensor, as FREE-Merging's released code does.
        vectors: treatment of tensors with fewer than 2 dimensions (norms, biases). `ranked`: like all others. `whole`:
            kept as a whole, smallest first, within half of the budget. `none`: left out.
        exclude: patterns of names to leave out; batch norm's running statistics by default.
        metadata: strings to store with the expert; the density is added.

    Returns:
        The expert. It has max(1, round(d·D)) entries for scope `model`, and max(1, round(d·n)) of each tensor or row of
        n entries otherwise. Among equal magnitudes, earlier tensors and positions are kept.

    Raises:
        ValueError: if an argument is out of range or the residual has no floating-point entries.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"extract: density must be in (0, 1], got {density}")
    if scope not in ("model", "tensor", "row"):
        raise ValueError(f"extract: scope must be 'model', 'tensor' or 'row', got {scope!r}")
    if rescale not in ("none", "released"):
        raise ValueError(f"extract: rescale must be 'none' or 'released', got {rescale!r}")
    floating = _floating(residual, exclude)
    total = sum(tensor.numel() for tensor in floating.values())
    budget = max(1, round(density * total))
    kept_whole = _whole_vectors(floating, vectors, budget)
    ranked = {
        name: tensor
        for name, tensor in floating.items()
        if name not in kept_whole and (vectors != "none" or tensor.dim() >= 2)
    }
    if scope == "model":
        count = budget - sum(floating[name].numel() for name in kept_whole)
        found = _top_of_model(ranked, min(count, sum(tensor.numel() for tensor in ranked.values())))
    else:
        found = {name: _top_of_rows(_rows(tensor.float().abs(), scope), density) for name, tensor in ranked.items()}
    found |= {name: torch.arange(floating[name].numel(), device=floating[name].device) for name in kept_whole}
    indices = {name: found[name] for name in floating if name in found}
    values = {name: floating[name].reshape(-1)[index].float() for name, index in indices.items()}
    if rescale == "released":
        values = {name: value * _released_factor(value, floating[name], density) for name, value in values.items()}
    return SparseExpert(
        indices=indices,
        values=values,
        shapes={name: tuple(floating[name].shape) for name in indices},
        metadata={**(metadata or {}), "density": repr(density)},
    )


def extract_low_rank(
    residual: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    density: float | None = None,
    vectors: Vectors = "whole",
    exclude: Sequence[str] | None = STATISTICS,
    metadata: Mapping[str, str] | None = None,
) -> LowRankExpert:
    """Keep the leading singular directions of each weight's residual: r ≈ U·V, both scaled by √σ.

    Args:
        residual: tensor name → r of any shape, floating point; usually θ_k − θ_merged.
        rank: number of directions per weight; give either this or `density`.
        density: fraction d of the D parameters to keep as values. Directions of all weights are ranked by the squared
            norm that they explain per value, σ² / (O + I); those of one weight are taken in order.
        vectors: treatment of tensors with fewer than 2 dimensions. `whole`: kept as a whole, smallest first, within
            half of the budget of a density. `none`: left out. `ranked`: the same as `whole`.
        exclude: patterns of names to leave out; batch norm's running statistics by default.
        metadata: strings to store with the expert; the rank or density is added.

    Returns:
        The expert. A weight whose factors would have as many values as the weight itself is kept as a whole.

    Raises:
        ValueError: if not exactly one of `rank` and `density` is given, or an argument is out of range.
    """
    if (rank is None) == (density is None):
        raise ValueError("extract_low_rank: give either `rank` or `density`")
    if rank is not None and rank < 1:
        raise ValueError(f"extract_low_rank: rank must be at least 1, got {rank}")
    if density is not None and not 0.0 < density <= 1.0:
        raise ValueError(f"extract_low_rank: density must be in (0, 1], got {density}")
    floating = _floating(residual, exclude)
    budget = None if density is None else max(1, round(density * sum(t.numel() for t in floating.values())))
    kept_whole = _whole_vectors(floating, "whole" if vectors == "ranked" else vectors, budget)
    matrices = {name: tensor for name, tensor in floating.items() if tensor.dim() >= 2}
    spectra = {}
    for name, tensor in matrices.items():
        matrix = tensor.float().reshape(matrix_shape(tuple(tensor.shape)))
        spectra[name] = torch.linalg.svd(matrix, full_matrices=False)
    if rank is not None:
        ranks = {name: min(rank, len(spectrum[1])) for name, spectrum in spectra.items()}
    else:
        assert budget is not None  # because a density is given
        ranks = _allocated_ranks(spectra, budget - sum(floating[name].numel() for name in kept_whole))
    left, right, whole = {}, {}, {name: floating[name].float() for name in kept_whole}
    for name, r in ranks.items():
        u, sigma, v = spectra[name]
        if r * (len(u) + v.shape[1]) >= matrices[name].numel():
            whole[name] = matrices[name].float()
        elif r > 0:
            root = sigma[:r].sqrt()
            left[name], right[name] = u[:, :r] * root, root[:, None] * v[:r]
    shapes = {name: tuple(tensor.shape) for name, tensor in floating.items() if name in left or name in whole}
    stated = {"rank": str(rank)} if density is None else {"density": repr(density)}
    return LowRankExpert(left, right, whole, shapes, {**(metadata or {}), **stated})


def _floating(residual: Mapping[str, Tensor], exclude: Sequence[str] | None) -> dict[str, Tensor]:
    """The floating-point tensors that an expert may change, tied ones once."""
    tensors = {
        name: residual[name].detach()
        for name in select(residual, None, exclude)
        if residual[name].is_floating_point() and residual[name].numel() > 0
    }
    if not tensors:
        raise ValueError("extract: the residual has no floating-point entries")
    tied = find_tied(tensors)  # a tensor with two names is changed once and counted once
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _whole_vectors(tensors: Mapping[str, Tensor], vectors: Vectors, budget: int | None) -> list[str]:
    """Names of the tensors with fewer than 2 dimensions to keep whole: smallest first, within half the budget."""
    if vectors not in ("whole", "ranked", "none"):
        raise ValueError(f"extract: vectors must be 'whole', 'ranked' or 'none', got {vectors!r}")
    if vectors != "whole":
        return []
    names = sorted((name for name in tensors if tensors[name].dim() < 2), key=lambda name: tensors[name].numel())
    kept, held = [], 0
    for name in names:
        held += tensors[name].numel()
        if budget is not None and held > budget // 2:
            break
        kept.append(name)
    return kept


def _top_of_model(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Tensor name → flat positions of the `count` largest magnitudes of all tensors, without empty entries."""
    if count <= 0:
        return {}
    total = sum(tensor.numel() for tensor in tensors.values())
    stride = total >> 17 | 1
    sample = torch.cat([tensor.reshape(-1)[::stride].float().abs() for tensor in tensors.values()])

    def scan(visit: Callable[[Tensor], None]) -> None:
        for tensor in tensors.values():
            visit(tensor.reshape(1, -1).float().abs())

    threshold = float(order_statistics(scan, [total - count], (1, total), sample[None]))
    above = {name: (tensor.float().abs() > threshold).reshape(-1) for name, tensor in tensors.items()}
    room = count - sum(int(mask.sum()) for mask in above.values())  # for entries that equal the threshold
    found = {}
    for name, mask in above.items():
        if room > 0:
            equal = (tensors[name].float().abs() == threshold).reshape(-1).nonzero().squeeze(1)[:room]
            room -= len(equal)
            mask[equal] = True
        if bool(mask.any()):
            found[name] = mask.nonzero().squeeze(1)
    return found


def _rows(tensor: Tensor, scope: Scope) -> Tensor:
    """A tensor as rows (R, n), in each of which magnitudes are compared."""
    return tensor.reshape(tensor.shape[0], -1) if scope == "row" and tensor.dim() >= 2 else tensor.reshape(1, -1)


def _top_of_rows(rows: Tensor, density: float) -> Tensor:
    """(R, n) → ascending flat positions of each row's top entries."""
    count = max(1, round(density * rows.shape[1]))
    # The stable sort keeps the earlier of equal magnitudes, which `topk` does not guarantee.
    top = rows.sort(dim=1, descending=True, stable=True).indices[:, :count]
    starts = torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    return (top + starts).reshape(-1).sort().values


def _released_factor(kept: Tensor, whole: Tensor, density: float) -> float:
    """μ = −E|kept|·log10(d) / E|whole|; 1 for a tensor of zeros."""
    mean = whole.float().abs().mean().item()
    return -kept.abs().mean().item() * math.log10(density) / mean if mean > 0 else 1.0


def _allocated_ranks(spectra: Mapping[str, tuple[Tensor, Tensor, Tensor]], budget: int) -> dict[str, int]:
    """Weight name → rank, within a budget of values: directions that explain most per value are taken first."""
    gains, costs, owners = [], [], []
    for name, (u, sigma, v) in spectra.items():
        cost = len(u) + v.shape[1]
        gains.append(sigma.square() / cost)
        costs += [cost] * len(sigma)
        owners += [name] * len(sigma)
    ranks = dict.fromkeys(spectra, 0)
    for index in torch.cat(gains).argsort(descending=True, stable=True).tolist() if gains else []:
        if costs[index] <= budget:  # singular values descend, so the directions of a weight come in order
            budget -= costs[index]
            ranks[owners[index]] += 1
    return ranks
