"""Routers predict which task an input belongs to.

R(x) → task logits (FREE-Merging, arXiv 2411.16815, section 4.2). A router runs before an expert is chosen and costs a
small fraction of the backbone's forward pass:

- `ConvRouter` is a separate small network on images.
- `EarlyRouter` uses the merged backbone's own features at an early point, such as its embeddings or its first block,
  and skips the rest of the pass. It accepts any inputs that the backbone accepts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freemerge.experts import workspace
from freemerge.inputs import Inputs
from freemerge.models.backbones.base import Backbone
from freemerge.models.out_of_distribution import OutOfDistributionScore


class Router(nn.Module):
    """Base class of routers: features of an input and a small head on them.

    Args:
        num_tasks: number of tasks K.
        num_features: number of features F.
        hidden: width of the head's hidden layer; 0 makes the head linear.
        directions: number of leading directions of the last layer's inputs that the out-of-distribution score uses;
            see `OutOfDistributionScore`. 0 disables the score.
        config: the other arguments of the subclass, from which `make_router` rebuilds the router.
    """

    KIND: ClassVar[str]
    """The name of this kind of router in configurations and files."""

    familiarity: OutOfDistributionScore

    def __init__(self, num_tasks: int, num_features: int, hidden: int, directions: int, **config: Any) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.config = {"kind": self.KIND, "num_tasks": num_tasks, "hidden": hidden, "directions": directions, **config}
        layers = [nn.Linear(num_features, hidden), nn.GELU()] if hidden else []
        self.standardise = nn.BatchNorm1d(num_features, affine=False)  # with the training data's statistics
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(hidden or num_features, num_tasks)
        self.familiarity = OutOfDistributionScore(num_tasks, hidden or num_features, directions)  # its name in files

    @property
    def out_of_distribution(self) -> OutOfDistributionScore:
        """The model of the training data that scores inputs; `familiarity` in state dicts."""
        return self.familiarity

    @abstractmethod
    def features(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """The features that the head classifies.

        Args:
            inputs: a batch (B, …).
            backbone: the merged backbone, for routers that use its features.

        Returns:
            (B, F).
        """

    def head_inputs(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """The inputs of the head's last layer.

        Args:
            inputs: a batch (B, …).
            backbone: the merged backbone, for routers that use its features.

        Returns:
            (B, hidden), or (B, F) if the head is linear; in the head's dtype.
        """
        return self.hidden(self.standardise(self.features(inputs, backbone).to(self.head.weight.dtype)))

    def forward(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """The task logits of a batch.

        Args:
            inputs: a batch (B, …).
            backbone: the merged backbone, for routers that use its features.

        Returns:
            (B, K).
        """
        return self.head(self.head_inputs(inputs, backbone))

    def judge(self, inputs: Inputs, backbone: Backbone | None = None) -> tuple[Tensor, Tensor]:
        """The task logits of a batch and the out-of-distribution scores of its inputs.

        Args:
            inputs: a batch (B, …).
            backbone: the merged backbone, for routers that use its features.

        Returns:
            Logits (B, K) and scores (B,) float32; low scores are out-of-distribution.
        """
        features = self.head_inputs(inputs, backbone)
        return self.head(features), self.out_of_distribution(features)

    @torch.no_grad()
    def round_(self) -> Router:
        """Round the trained parameters to bfloat16 in place, so that `stored` needs half the bytes.

        Returns:
            The router; its dtype does not change.
        """
        for parameter in self.parameters():
            parameter.copy_(parameter.bfloat16())
        return self

    def stored(self) -> dict[str, Tensor]:
        """The state dict for a file: parameters as bfloat16 where this is exact, all other tensors unchanged."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        for name, parameter in self.named_parameters():
            rounded = state[name].bfloat16()
            if torch.equal(rounded.to(parameter), state[name]):
                state[name] = rounded
        return state

    def abstains(self, logits: Tensor, scores: Tensor, threshold: float) -> Tensor:
        """Which samples the router abstains from, given the results of `judge`.

        Args:
            logits: (B, K).
            scores: (B,), compared with `out_of_distribution.threshold`.
            threshold: minimum probability of the most likely task.

        Returns:
            (B,) bool: True where the confidence is too low or the input is out-of-distribution.
        """
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        return (confidence < threshold) | (scores < self.out_of_distribution.threshold)


class ConvRouter(Router):
    """A small network on images: a head on statistics of three strided convolutions.

    The mean, standard deviation and maximum over all positions summarise the pixels and the outputs of each
    convolution: which colours, edges and textures an image has, wherever they are. Images may have any size.

    Args:
        num_tasks: number of tasks K.
        channels: channels C of the images.
        width: channels of the first convolution; the other two have twice as many.
        hidden: see `Router`.
        directions: see `Router`.
    """

    KIND = "conv"

    def __init__(self, num_tasks: int, channels: int, width: int = 16, hidden: int = 64, directions: int = 16) -> None:
        super().__init__(num_tasks, 3 * (channels + 5 * width), hidden, directions, channels=channels, width=width)
        self.norm = nn.BatchNorm2d(channels)  # standardises the pixels with the training data's statistics
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(channels, width, 5, stride=2, padding=2),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            ]
        )

    def features(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """The statistics of images.

        Args:
            inputs: images (B, C, H, W).
            backbone: not used.

        Returns:
            (B, 3·(C + 5·width)) float32.
        """
        maps = self.norm(inputs)
        statistics = [_statistics(_as_tokens(maps))]
        for convolution in self.convolutions:
            maps = F.gelu(convolution(maps))
            statistics.append(_statistics(_as_tokens(maps)))
        return torch.cat(statistics, dim=1)


class EarlyRouter(Router):
    """A small head on the merged backbone's features at an early point.

    The mean, standard deviation and maximum over tokens or positions summarise the output of a submodule, tokens
    (B, N, F) or maps (B, F, H, W); for texts, over the tokens whose `attention_mask` is 1. The texts of a pair are
    summarised separately, because the difference between a question and its answer, or between a premise and its
    hypothesis, can separate tasks that have the same words. Of a language model's inputs, only the prompt is read.

    Args:
        num_tasks: number of tasks K.
        point: name of the submodule of the backbone's model whose output is used; nothing after it runs.
        width: channels F of that output; `feature_width` returns it.
        segments: number S of texts per input, which `token_type_ids` separates; 1 summarises the whole input.
        hidden: see `Router`.
        directions: see `Router`.
    """

    KIND = "early"

    def __init__(
        self, num_tasks: int, point: str, width: int, segments: int = 1, hidden: int = 64, directions: int = 16
    ) -> None:
        features = 3 * width * segments
        super().__init__(num_tasks, features, hidden, directions, point=point, width=width, segments=segments)
        self.point = point
        self.segments = segments

    def features(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """The statistics of the backbone's early features, without gradient.

        Args:
            inputs: a batch (B, …).
            backbone: the merged backbone.

        Returns:
            (B, 3·F·S) float32.

        Raises:
            ValueError: if there is no backbone.
        """
        if backbone is None:
            raise ValueError("EarlyRouter: it uses the backbone's features; pass `backbone=`")
        with torch.no_grad():
            return early_features(inputs, backbone, self.point, self.segments)


def make_router(config: Mapping[str, Any]) -> Router:
    """An untrained router from its `config`.

    Args:
        config: the `config` of a router: its `kind` and the arguments of its class.

    Raises:
        ValueError: if the kind is unknown.
    """
    settings = dict(config)
    kinds = {kind.KIND: kind for kind in (ConvRouter, EarlyRouter)}
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown kind of router {kind!r}; kinds: {', '.join(kinds)}")
    return kinds[kind](**settings)


def early_features(inputs: Inputs, backbone: Backbone, point: str, segments: int = 1) -> Tensor:
    """Mean, standard deviation and maximum of a submodule's output over the tokens or positions of each segment.

    Args:
        inputs: a batch (B, …).
        backbone: the backbone; its pass ends after the submodule.
        point: name of the submodule of `backbone.model`.
        segments: number S of segments; if there are several, the inputs' `token_type_ids` separate them.

    Returns:
        (B, 3·F·S) float32.

    Raises:
        ValueError: if there is no such submodule, it does not run, its output is neither tokens nor maps, or several
            segments are asked for and the inputs have no `token_type_ids`.
    """
    try:
        backbone.model.get_submodule(point)
    except AttributeError as error:
        near = ", ".join(name for name, _ in list(backbone.model.named_modules())[1:6])
        raise ValueError(f"router: the backbone has no submodule {point!r}; it has {near}, …") from error

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output))

    inputs = backbone.router_inputs(inputs)
    with workspace(backbone) as own:  # in the backbone itself, the hook would end other threads' passes too
        handle = own[backbone.model].get_submodule(point).register_forward_hook(stop)
        try:
            own[backbone](inputs)
        except _Reached as reached:
            found = reached.output
        else:
            raise ValueError(f"router: the backbone's submodule {point!r} does not run in a forward pass")
        finally:
            handle.remove()
    if not isinstance(found, Tensor) or found.dim() not in (3, 4):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"router: {point!r} returns {shape}; expected tokens (B, N, F) or maps (B, F, H, W)")
    tokens = _as_tokens(found) if found.dim() == 4 else found
    given: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    mask = given.get("attention_mask")  # (B, N)
    if mask is not None and mask.shape != tokens.shape[:2]:  # the tokens are a decoder's
        mask = None
    if segments == 1:
        return _statistics(tokens, mask)
    if (segment := given.get("token_type_ids")) is None:
        raise ValueError(f"router: {segments} segments need token_type_ids, which the inputs do not have")
    mask = torch.ones_like(segment) if mask is None else mask
    return torch.cat([_statistics(tokens, mask * (segment == index)) for index in range(segments)], dim=1)


def _as_tokens(maps: Tensor) -> Tensor:
    """Maps (B, F, H, W) → tokens (B, H·W, F)."""
    return maps.flatten(2).transpose(1, 2)


def _statistics(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean, standard deviation and maximum over the tokens (B, N, F) whose mask (B, N) is 1 → (B, 3·F) float32.

    A sample without tokens has zeros as mean and maximum.
    """
    tokens = tokens.float()
    count: Tensor | int
    if mask is None:
        count, largest = tokens.shape[1], tokens.amax(dim=1)
    else:
        kept = mask.to(tokens.dtype)[:, :, None]  # (B, N, 1)
        held = kept.sum(dim=1)  # (B, 1)
        largest = tokens.masked_fill(kept == 0, float("-inf")).amax(dim=1).masked_fill(held == 0, 0.0)
        tokens, count = tokens * kept, held.clamp(min=1)
    mean, square = tokens.sum(dim=1) / count, tokens.square().sum(dim=1) / count  # many times faster than `std`
    spread = (square - mean.square()).clamp(min=1e-6).sqrt()  # the root has no gradient at 0
    return torch.cat([mean, spread, largest], dim=1)


def feature_width(inputs: Inputs, backbone: Backbone, point: str) -> int:
    """The width F that an `EarlyRouter` at a point needs.

    Args:
        inputs: a batch, which the backbone runs on.
        backbone: the backbone.
        point: name of the submodule of `backbone.model`.

    Returns:
        The number of channels of the submodule's output.

    Raises:
        ValueError: as `early_features`.
    """
    with torch.no_grad():
        return early_features(inputs, backbone, point).shape[1] // 3


def choose_thresholds(logits: Tensor, scores: Tensor, fraction: float = 0.99) -> tuple[float, float]:
    """Choose the confidence and the out-of-distribution score below which a router abstains, on validation data.

    Both thresholds lie at the same quantile, so each of them excludes the same number of samples.

    Args:
        logits: (N, K), of samples of the suite that the router was not trained on.
        scores: (N,), their out-of-distribution scores.
        fraction: fraction of these samples that must stay above both thresholds, in (0, 1].

    Returns:
        The largest such thresholds: of the most likely task's probability and of the score; 0 and −∞ if `fraction`
        is 1.

    Raises:
        ValueError: if `fraction` is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the fraction of samples to route must be in (0, 1], got {fraction}")
    values = torch.stack([logits.float().softmax(dim=1).amax(dim=1), scores.float()])  # (2, N)
    ordered = values.sort(dim=1).values
    # A sample's rank is the lower of its two ranks, the last among equal values; it abstains below either threshold.
    ranks = (torch.searchsorted(ordered, values, right=True) - 1).amin(dim=0).sort().values
    below = int((1 - fraction) * len(ranks) + 1e-9)
    rank = int(ranks[below]) if below else 0
    confidence, least = ordered[:, rank].tolist() if rank else (0.0, float("-inf"))
    return confidence, least


class _Reached(Exception):
    """Ends a forward pass early and carries the output out of it."""

    def __init__(self, output: Any) -> None:
        super().__init__("reached")
        self.output = output
