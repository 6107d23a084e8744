"""The diagonal of the Fisher information, E[(∂ log p(y|x) / ∂θ)²], which Fisher merging takes (arXiv 2111.09832)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["classes", "tokens", "normal"]


class SquaredGradients:
    """Adds up squared gradients, one sample at a time, because the square of a sum is not the sum of squares.

    Sums are in float32 on the CPU, as large as the parameters.

    Args:
        parameters: name → tensor that the outputs are computed with, and that requires a gradient.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._sums = {name: torch.zeros(tensor.shape, dtype=torch.float32) for name, tensor in parameters.items()}
        self.samples = 0

    def add(self, log_probability: Tensor) -> None:
        """Add (∂ log p / ∂θ)² of one sample.

        Args:
            log_probability: log p(y|x), (), with its graph. Parameters that it does not depend on have a gradient of 0.
        """
        gradients = torch.autograd.grad(log_probability, list(self._parameters.values()), allow_unused=True)
        for total, gradient in zip(self._sums.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.float().square().cpu())  # a copy: gradients may share memory
        self.samples += 1

    def tensors(self) -> dict[str, Tensor]:
        """Name → the mean square over the samples, float32, in the parameter's shape."""
        return {name: total / max(self.samples, 1) for name, total in self._sums.items()}


def draw_log_probability(
    outputs: Tensor,
    generator: torch.Generator,
    distribution: Distribution = "classes",
    counted: Tensor | None = None,
) -> Tensor:
    """Draw an answer y from the model's own distribution, and return log p(y|x) of it.

    Args:
        outputs: of one sample, with their graph: logits (1, C), or (1, L, V) for tokens; or means (1, n) of normal
            distributions of variance 1, as the squared error assumes.
        generator: on the CPU.
        distribution: of the answers.
        counted: (1, L) bool, the tokens that count; all if None.

    Returns:
        () float32: a sum over the tokens that count.
    """
    outputs = outputs.float()
    if distribution == "normal":
        noise = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return -0.5 * (outputs - (outputs.detach() + noise)).square().sum()  # without the constant
    flat = outputs.flatten(0, -2)  # (1, C), or (L, V)
    if counted is not None:
        flat = flat[counted.flatten().to(flat.device)]
    logs = flat.log_softmax(-1)
    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
    return logs.gather(1, drawn.to(logs.device)).sum()
