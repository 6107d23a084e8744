"""Linear probes: heads that are fitted on the frozen base's features before fine-tuning.

With such a head, fine-tuned backbones stay closer to the base (linear probing then fine-tuning, arXiv 2202.10054), and
because the head is frozen, everything that is learnt is in the backbone, which can be merged. It takes the place of the
zero-shot text head in the CLIP experiments of the merging papers.

The probes are fitted by scikit-learn, with which the published numbers were measured; torch's L-BFGS stops at slightly
different solutions. The functions import it, because the import is slow and few commands need it.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, inverse_regularization: float = 1.0) -> nn.Linear:
    """Fit a linear head by multinomial logistic regression.

    Features are standardised for the fit, and the standardisation is folded into the returned weights. Features that
    are constant over all samples get zero weights.

    Args:
        features: (N, F) float.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C; classes without a sample get zero weights and a bias below all others.
        inverse_regularization: scikit-learn's parameter C.

    Returns:
        A linear layer F → C in float32.

    Raises:
        ValueError: if fewer than two classes occur in `labels`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, mean, std = _standardisation(features)
    regression = LogisticRegression(C=inverse_regularization, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 iterations are enough for a head to start from
        regression.fit((x - mean) / std, labels.cpu().numpy())
    coefficients = torch.from_numpy(regression.coef_ / std)  # (C', F), or (1, F) for two classes
    bias = torch.from_numpy(regression.intercept_) - coefficients @ torch.from_numpy(mean)
    if len(regression.classes_) == 2:  # for two classes scikit-learn returns one row: split it into two
        coefficients, bias = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-bias, bias]) / 2
    head = nn.Linear(features.shape[1], num_classes)
    seen = torch.from_numpy(regression.classes_)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(float(bias.min()) - 1.0)
        head.weight[seen] = coefficients.float()
        head.bias[seen] = bias.float()
    return head


def fit_regression_probe(features: Tensor, labels: Tensor, regularization: float = 1.0) -> nn.Linear:
    """Fit a linear head with one output by ridge regression.

    Features are standardised for the fit, as in `fit_probe`.

    Args:
        features: (N, F) float.
        labels: (N,) float.
        regularization: scikit-learn's parameter alpha.

    Returns:
        A linear layer F → 1 in float32.
    """
    from sklearn.linear_model import Ridge

    x, mean, std = _standardisation(features)
    regression = Ridge(alpha=regularization).fit((x - mean) / std, labels.double().cpu().numpy())
    coefficients = torch.from_numpy(regression.coef_ / std)  # (F,)
    head = nn.Linear(features.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(coefficients.float()[None])
        head.bias.fill_(float(regression.intercept_ - coefficients @ torch.from_numpy(mean)))
    return head


def _standardisation(features: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, F) in float64, their means (F,) and their standard deviations (F,).

    An almost constant feature would get a huge weight, and change the outputs greatly once fine-tuning changes it. Its
    standard deviation is therefore set to infinity, which gives it a zero weight.
    """
    x = features.double().cpu().numpy()
    std = x.std(axis=0)
    return x, x.mean(axis=0), np.where(std > 1e-6 * std.max(), std + 1e-8, np.inf)
