"""How task vectors relate: norms, cosines, agreement of signs.

Notation: v_0 the task vector of interest, v_1 … v_{K−1} those that it is compared with; sums run over all D entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from freemerge.merging import Vectors


@dataclass(frozen=True)
class Similarity:
    """The first task vector against each of the others.

    Args:
        norm: ‖v_0‖.
        cosine: v_0·v_k / (‖v_0‖·‖v_k‖) for k = 1 … K−1; 0 where a norm is 0.
        sign_agreement: for k = 1 … K−1, the share of equal signs among the entries in which neither v_0 nor v_k is 0;
            0 where there is none. Random vectors agree in half of them.
    """

    norm: float
    cosine: tuple[float, ...]
    sign_agreement: tuple[float, ...]


def similarity(vectors: Vectors) -> Similarity:
    """Compare the first of K task vectors with the others, in one pass and float64 sums.

    Args:
        vectors: K task vectors, read tensor by tensor.
    """
    count = len(vectors.labels)
    dots, squares, equal, nonzero = (torch.zeros(count, dtype=torch.float64) for _ in range(4))
    for _, deltas in vectors:  # (K, *shape) float32
        first = deltas[0]
        for k, delta in enumerate(deltas):
            signs = first.sign() * delta.sign()
            dots[k] += (first * delta).sum(dtype=torch.float64).cpu()
            squares[k] += delta.square().sum(dtype=torch.float64).cpu()
            equal[k] += (signs > 0).sum().cpu()
            nonzero[k] += signs.count_nonzero().cpu()
    norms = squares.sqrt()
    tiny = torch.finfo(torch.float64).tiny
    cosine = dots / (norms[0] * norms).clamp(min=tiny)
    return Similarity(float(norms[0]), tuple(cosine[1:].tolist()), tuple((equal / nonzero.clamp(min=1))[1:].tolist()))
