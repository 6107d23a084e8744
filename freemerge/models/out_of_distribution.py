"""The out-of-distribution score of a router's inputs, called familiarity in names and files: high is close to the data.

A confident router may never have seen an input like this one, since softmax only compares the tasks. The input of its
last layer is therefore modelled by one Gaussian per task over a few leading directions (after Lee et al., arXiv
1807.03888, who share one covariance between all classes and use all features).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SHRINKAGE = 0.01  # fraction of the mean variance that is added to each direction's variance


class Familiarity(nn.Module):
    """Log density, up to a constant, of features under the likeliest of K Gaussians.

    All values are buffers that `fit` estimates; nothing is trained. Before `fit`, all inputs have the same score.

    Args:
        num_tasks: number of tasks K.
        width: number of features F.
        directions: number r of leading directions of the features that are used, at most F.

    Attributes:
        least: (), inputs with a lower score are out-of-distribution; −∞ until the router's training sets it.
    """

    mean: Tensor
    directions: Tensor
    centers: Tensor
    whitening: Tensor
    offsets: Tensor
    least: Tensor

    def __init__(self, num_tasks: int, width: int, directions: int = 16) -> None:
        super().__init__()
        directions = min(directions, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("directions", torch.zeros(width, directions))
        self.register_buffer("centers", torch.zeros(num_tasks, directions))
        self.register_buffer("whitening", torch.zeros(num_tasks, directions, directions))
        self.register_buffer("offsets", torch.zeros(num_tasks))
        self.register_buffer("least", torch.tensor(float("-inf")))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, F) → (B,), in float32."""
        seen = (features.float() - self.mean.float()) @ self.directions.float()  # (B, r)
        apart = seen - self.centers.float()[:, None]  # (K, B, r)
        distances = (apart @ self.whitening.float().mT).square().sum(dim=2)  # (K, B)
        return -(distances + self.offsets.float()[:, None]).amin(dim=0)

    @torch.no_grad()
    def fit(self, features: Tensor, tasks: Tensor) -> None:
        """Estimate directions and Gaussians.

        Args:
            features: (N, F), of training inputs, on the CPU.
            tasks: (N,) int64, the task of each, in [0, K).

        Raises:
            ValueError: if some task has no inputs.
        """
        features = features.double()
        mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        spread = spread.clamp(min=1e-3 * float(spread.max()) + 1e-12)  # features that never change tell nothing
        standard = (features - mean) / spread
        _, leading = torch.linalg.eigh(standard.T @ standard / len(standard))  # by rising eigenvalue
        directions = leading.flip(1)[:, : self.directions.shape[1]] / spread[:, None]
        seen = (features - mean) @ directions  # (N, r)
        self.mean.copy_(mean)
        self.directions.copy_(directions)
        for task in range(len(self.centers)):
            own = seen[tasks == task]
            if not len(own):
                raise ValueError(f"Familiarity: no inputs of task {task}; fit it on inputs of all {len(self.centers)}")
            apart = own - own.mean(dim=0)
            covariance = apart.T @ apart / len(own)
            floor = _SHRINKAGE * float(covariance.diagonal().mean()) + 1e-6
            root = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance)))
            self.centers[task].copy_(own.mean(dim=0))
            self.whitening[task].copy_(torch.linalg.inv(root))
            self.offsets[task].copy_(2 * root.diagonal().log().sum())
