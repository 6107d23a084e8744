"""Coefficients of task vectors by the entropy of predictions on inputs without labels (AdaMerging, arXiv 2310.02575).

Notation: K tasks, L tensors, λ (K, L), merged tensor l: θ_l = θ_base,l + Σ_k λ_kl · v_kl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from freemerge.inputs import Inputs

Weights = Mapping[str, Tensor]
Predict = Callable[[Weights, Inputs], Tensor]
"""The merged weights and a batch of inputs → logits (B, C)."""


def learn_coefficients(
    base: Weights,
    vectors: Mapping[str, Weights],
    predict: Mapping[str, Predict],
    batches: Mapping[str, Iterator[Inputs]],
    *,
    initial: float = 0.3,
    rate: float = 1e-3,
    steps: int = 500,
) -> dict[str, dict[str, Tensor]]:
    """Minimize Σ_k E[H(p_k(y|x))] over λ by Adam, λ kept in [0, 1] as the released code does.

    Base, task vectors, merged weights and their gradients are in memory: K + 3 models.

    Args:
        base: name → tensor, the L tensors that have coefficients, float32.
        vectors: task → its task vector, of the same tensors.
        predict: task → the model with the task's head.
        batches: task → batches of its inputs, at least `steps` of them.
        initial: λ at the start.
        rate: Adam's learning rate.
        steps: number of steps, each on a batch of every task.

    Returns:
        Task → name → λ, () float32.

    Raises:
        ValueError: the entropy becomes NaN or infinite.
    """
    tasks, names = list(vectors), list(base)
    device = next(iter(base.values())).device
    coefficients = torch.full((len(tasks), len(names)), initial, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=rate)
    for step in range(steps):
        inputs = {task: next(batches[task]) for task in tasks}
        value, coefficients.grad = entropy_gradient(coefficients.detach(), base, vectors, predict, inputs)
        if not bool(torch.isfinite(torch.tensor(value))):
            raise ValueError(f"AdaMerging: the entropy is {value} in step {step + 1}; try a lower `initial` or `rate`")
        optimizer.step()
        with torch.no_grad():
            coefficients.clamp_(0.0, 1.0)
    found = coefficients.detach().cpu()
    return {
        task: {name: found[row, column].clone() for column, name in enumerate(names)} for row, task in enumerate(tasks)
    }


def entropy_gradient(
    coefficients: Tensor,
    base: Weights,
    vectors: Mapping[str, Weights],
    predict: Mapping[str, Predict],
    inputs: Mapping[str, Inputs],
) -> tuple[float, Tensor]:
    """Σ_k of the mean entropies of a batch of each task, and its gradient in λ.

    ∂/∂λ_kl = ⟨∂/∂θ_l, v_kl⟩, so that no graph holds the task vectors, and only one task's activations exist at a time.

    Args:
        coefficients: λ, (K, L) float32, in the order of `vectors` and of `base`.
        base: see `learn_coefficients`, also for `vectors` and `predict`.
        vectors: task → task vector.
        predict: task → the model with the task's head.
        inputs: task → a batch.

    Returns:
        The sum in nats, and (K, L) float32.
    """
    merged = {}
    for column, (name, start) in enumerate(base.items()):
        total = start.clone()
        for row, vector in enumerate(vectors.values()):
            total.add_(vector[name], alpha=float(coefficients[row, column]))
        merged[name] = total.requires_grad_()
    value = 0.0
    with torch.enable_grad():
        for task, batch in inputs.items():
            loss = entropy(predict[task](merged, batch)).mean()
            loss.backward()
            value += float(loss.detach())
    gradient = torch.zeros_like(coefficients)
    for column, (name, tensor) in enumerate(merged.items()):
        if tensor.grad is not None:
            for row, vector in enumerate(vectors.values()):
                gradient[row, column] = (tensor.grad * vector[name]).sum()
    return value, gradient


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ_c p_c · log p_c of each prediction, in nats: (B, C) → (B,) float32."""
    logs = logits.float().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)
