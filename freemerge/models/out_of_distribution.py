"""The out-of-distribution score of a router's inputs: a log density, low for inputs that resemble no task's data.

Softmax only compares the tasks, so a router can be confident about an input that is unlike all of its training data.
The features that enter the router's last layer are therefore modelled by one Gaussian per task over their leading
directions, after Lee et al. (arXiv 1807.03888), who use one covariance for all classes and all features. Router files
call the score `familiarity`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freemerge.moved import names_that_moved

_SHRINKAGE = 0.01  # fraction of the mean variance that is added to the variance of each direction


class OutOfDistributionScore(nn.Module):
    """Log density of features under the most likely of K Gaussians, up to an additive and a multiplicative constant.

    With z = (x − mean)·directions, the score is max_k −(‖L_k⁻¹·(z − c_k)‖² + log det Σ_k), where Σ_k = L_k·L_kᵀ is the
    covariance of task k and c_k its center. All values are buffers that `fit` estimates; nothing is trained. Before
    `fit`, all inputs have the same score.

    Args:
        num_tasks: number of tasks K.
        width: number of features F.
        directions: number r of leading directions of the features to use; reduced to F if larger.

    Attributes:
        mean: (F,), the mean of the training features.
        directions: (F, r), the leading directions of the standardised features.
        centers: (K, r), c_k.
        whitening: (K, r, r), L_k⁻¹.
        offsets: (K,), log det Σ_k.
        least: (), the threshold: inputs with a lower score are out-of-distribution. −∞ until training sets it.
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

    @property
    def threshold(self) -> Tensor:
        """The buffer `least`, (): inputs with a lower score are out-of-distribution."""
        return self.least

    def forward(self, features: Tensor) -> Tensor:
        """The scores of features.

        Args:
            features: (B, F).

        Returns:
            (B,) float32.
        """
        projected = (features.float() - self.mean.float()) @ self.directions.float()  # (B, r)
        centered = projected - self.centers.float()[:, None]  # (K, B, r)
        distances = (centered @ self.whitening.float().mT).square().sum(dim=2)  # (K, B)
        return -(distances + self.offsets.float()[:, None]).amin(dim=0)

    @torch.no_grad()
    def fit(self, features: Tensor, tasks: Tensor) -> None:
        """Estimate the directions and the Gaussians.

        Args:
            features: (N, F), of the training inputs, on the CPU.
            tasks: (N,) int64, the task index of each input, in [0, K).

        Raises:
            ValueError: if a task has no inputs.
        """
        features = features.double()
        mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        spread = spread.clamp(min=1e-3 * float(spread.max()) + 1e-12)  # constant features carry no information
        standard = (features - mean) / spread
        _, leading = torch.linalg.eigh(standard.T @ standard / len(standard))  # ascending eigenvalues
        directions = leading.flip(1)[:, : self.directions.shape[1]] / spread[:, None]
        projected = (features - mean) @ directions  # (N, r)
        self.mean.copy_(mean)
        self.directions.copy_(directions)
        for task in range(len(self.centers)):
            own = projected[tasks == task]
            if not len(own):
                count = len(self.centers)
                raise ValueError(f"OutOfDistributionScore: no inputs of task {task}; fit it on inputs of all {count}")
            centered = own - own.mean(dim=0)
            covariance = centered.T @ centered / len(own)
            floor = _SHRINKAGE * float(covariance.diagonal().mean()) + 1e-6
            root = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance)))
            self.centers[task].copy_(own.mean(dim=0))
            self.whitening[task].copy_(torch.linalg.inv(root))
            self.offsets[task].copy_(2 * root.diagonal().log().sum())


__getattr__ = names_that_moved(__name__)
