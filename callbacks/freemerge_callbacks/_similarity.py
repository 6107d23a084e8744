"""Similarity of task vectors: norms, cosines and sign agreement, and the fraction that a high-pass filter removes.

Notation: v_0 is the current task vector, v_1 … v_{K−1} are the others; sums run over all D entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from freemerge.merging import Filter, Vectors


@dataclass(frozen=True)
class Similarity:
    """The first task vector compared with each of the others.

    Args:
        norm: ‖v_0‖.
        cosine: v_0·v_k / (‖v_0‖·‖v_k‖) for k = 1 … K−1; 0 where a norm is 0.
        sign_agreement: for k = 1 … K−1, the fraction of equal signs among the entries in which neither v_0 nor v_k is
            0; 0 if there are none. For random vectors it is 0.5.
        low_frequency_energy: 1 − Σ‖G(v_0)‖² / Σ‖v_0‖² over the weights with two or more dimensions, which a filter G
            acts on: the fraction of the energy below its cutoff; 0 if the energy is 0.
    """

    norm: float
    cosine: tuple[float, ...]
    sign_agreement: tuple[float, ...]
    low_frequency_energy: float


def similarity(vectors: Vectors, filter: Filter) -> Similarity:
    """Compare the first of K task vectors with the others in one pass, with float64 sums.

    Args:
        vectors: K task vectors, read tensor by tensor.
        filter: the high-pass filter G.

    Returns:
        The similarities.
    """
    count = len(vectors.labels)
    dots, squares, equal, nonzero = (torch.zeros(count, dtype=torch.float64) for _ in range(4))
    energy, passed = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for _, deltas in vectors:  # (K, *shape) float32
        first = deltas[0]
        if first.dim() > 1:
            energy += first.square().sum(dtype=torch.float64).cpu()
            passed += filter(first).square().sum(dtype=torch.float64).cpu()
        for k, delta in enumerate(deltas):
            signs = first.sign() * delta.sign()
            dots[k] += (first * delta).sum(dtype=torch.float64).cpu()
            squares[k] += delta.square().sum(dtype=torch.float64).cpu()
            equal[k] += (signs > 0).sum().cpu()
            nonzero[k] += signs.count_nonzero().cpu()
    norms = squares.sqrt()
    tiny = torch.finfo(torch.float64).tiny
    cosine = dots / (norms[0] * norms).clamp(min=tiny)
    agreement = equal / nonzero.clamp(min=1)
    removed = float(1 - passed / energy) if energy > 0 else 0.0
    return Similarity(float(norms[0]), tuple(cosine[1:].tolist()), tuple(agreement[1:].tolist()), removed)
