"""The router: which task does an input belong to?

R(x) → task logits (FREE-Merging, arXiv 2411.16815, section 4.2). It sees the input before any expert is switched in, at
a small share of a forward pass of the backbone:

- `ConvRouter` is a separate small network over images;
- `EarlyRouter` looks at what the merged backbone itself makes of any input at an early point, its embeddings or its
  first block, and leaves the rest of the pass out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freemerge.experts import private
from freemerge.inputs import Inputs
from freemerge.models.backbones.base import Backbone
from freemerge.models.out_of_distribution import Familiarity


class Router(nn.Module):
    """Base class of routers: features of an input, and a small head on them.

    Args:
        num_tasks: number of tasks K.
        num_features: number of features F.
        hidden: width of the head's hidden layer; 0 makes it linear.
        directions: how many directions of what the head's last layer takes in are looked at, to tell inputs that are
            like none of the tasks'; see `Familiarity`.
        config: the other arguments of the class, from which `make_router` makes it again.
    """

    KIND: ClassVar[str]

    def __init__(self, num_tasks: int, num_features: int, hidden: int, directions: int, **config: Any) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.config = {"kind": self.KIND, "num_tasks": num_tasks, "hidden": hidden, "directions": directions, **config}
        layers = [nn.Linear(num_features, hidden), nn.GELU()] if hidden else []
        self.standardise = nn.BatchNorm1d(num_features, affine=False)  # by the training data's statistics
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(hidden or num_features, num_tasks)
        self.familiarity = Familiarity(num_tasks, hidden or num_features, directions)

    @abstractmethod
    def features(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """Features (B, F) of a batch; `backbone` is the merged one, for those who look at what it makes of it."""

    def seen(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """What the head's last layer takes in: (B, hidden), or (B, F) where it is linear; in the dtype of the head."""
        return self.hidden(self.standardise(self.features(inputs, backbone).to(self.head.weight.dtype)))

    def forward(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """Task logits (B, K) of a batch."""
        return self.head(self.seen(inputs, backbone))

    def judge(self, inputs: Inputs, backbone: Backbone | None = None) -> tuple[Tensor, Tensor]:
        """Task logits (B, K) of a batch, and the out-of-distribution score of each input, (B,) float32."""
        seen = self.seen(inputs, backbone)
        return self.head(seen), self.familiarity(seen)

    @torch.no_grad()
    def round_(self) -> Router:
        """Round what is trained to bfloat16, which `stored` keeps in half the bytes; the dtype stays."""
        for parameter in self.parameters():
            parameter.copy_(parameter.bfloat16())
        return self

    def stored(self) -> dict[str, Tensor]:
        """The state for a file: parameters as bfloat16 where that is exact, all else as it is."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        for name, parameter in self.named_parameters():
            rounded = state[name].bfloat16()
            if torch.equal(rounded.to(parameter), state[name]):
                state[name] = rounded
        return state

    def abstains(self, logits: Tensor, familiarity: Tensor, threshold: float) -> Tensor:
        """Where what `judge` says is not enough to choose an expert by: (B,) bool.

        Args:
            logits: (B, K).
            familiarity: (B,), held against `familiarity.least`.
            threshold: for the most likely task's probability.
        """
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        return (confidence < threshold) | (familiarity < self.familiarity.least)


class ConvRouter(Router):
    """A small network over images: a head on cheap features.

    What three strided convolutions see, and the pixels themselves, are summed up by mean, spread and maximum over all
    places: what colours, edges and textures there are, wherever they are. Images of any size will do.

    Args:
        num_tasks: number of tasks K.
        channels: channels C of the images.
        width: channels of the first convolution; the others have twice as many.
        hidden, directions: of the base class.
    """

    KIND = "conv"

    def __init__(self, num_tasks: int, channels: int, width: int = 16, hidden: int = 64, directions: int = 16) -> None:
        super().__init__(num_tasks, 3 * (channels + 5 * width), hidden, directions, channels=channels, width=width)
        self.norm = nn.BatchNorm2d(channels)  # standardises the pixels by the training data's statistics
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(channels, width, 5, stride=2, padding=2),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            ]
        )

    def features(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """Images (B, C, H, W) → (B, 3·(C + 5·width)) in float32."""
        maps = self.norm(inputs)
        found = [_summed_up(_places(maps))]
        for convolution in self.convolutions:
            maps = F.gelu(convolution(maps))
            found.append(_summed_up(_places(maps)))
        return torch.cat(found, dim=1)


class EarlyRouter(Router):
    """A small head on what the merged backbone makes of an input at an early point.

    What comes out there, tokens (B, N, F) or maps (B, F, H, W), is summed up by its mean, its spread and its maximum
    over tokens or places (for texts: where `attention_mask` is 1). Of pairs of texts, each text is summed up by itself:
    how a question differs from its answer, or a premise from its hypothesis, tells tasks apart that their words do not.

    Args:
        num_tasks: number of tasks K.
        point: name of the submodule of the backbone's model whose output is looked at; nothing after it runs.
        width: F, channels of that output; `feature_width` finds it.
        segments: S, texts of an input, told apart by `token_type_ids`; 1 sums up all there is at once.
        hidden, directions: of the base class.
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
        """(B, 3·F·S) in float32, without gradient.

        Raises:
            ValueError: without a backbone.
        """
        if backbone is None:
            raise ValueError("EarlyRouter: looks at the backbone's features; give the backbone")
        with torch.no_grad():
            return early_features(inputs, backbone, self.point, self.segments)


def make_router(config: Mapping[str, Any]) -> Router:
    """An untrained router from its `config`."""
    settings = dict(config)
    kinds = {kind.KIND: kind for kind in (ConvRouter, EarlyRouter)}
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown kind of router {kind!r}; kinds: {', '.join(kinds)}")
    return kinds[kind](**settings)


def early_features(inputs: Inputs, backbone: Backbone, point: str, segments: int = 1) -> Tensor:
    """Mean, spread and maximum of a submodule's output over the tokens or places of each segment: (B, 3·F·S).

    Args:
        inputs: a batch; nothing is computed for an empty one.
        backbone: the backbone; the rest of its pass, after the submodule, is left out.
        point: name of the submodule of `backbone.model`.
        segments: S; more than one are told apart by the inputs' `token_type_ids`.

    Raises:
        ValueError: if there is no such submodule, it does not run, its output is neither tokens nor maps, or the
            inputs do not say which segment a token is of.
    """
    try:
        backbone.model.get_submodule(point)
    except AttributeError as error:
        near = ", ".join(name for name, _ in list(backbone.model.named_modules())[1:6])
        raise ValueError(f"router: the backbone has no submodule {point!r}; it has {near}, …") from error

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    with private(backbone) as own:  # or another thread's pass would end here, too
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
        raise ValueError(f"router: {point!r} puts out {shape}; expected tokens (B, N, F) or maps (B, F, H, W)")
    tokens = _places(found) if found.dim() == 4 else found
    given: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    mask = given.get("attention_mask")  # (B, N)
    if segments == 1:
        return _summed_up(tokens, mask)
    if (segment := given.get("token_type_ids")) is None:
        raise ValueError(f"router: tells {segments} segments apart by token_type_ids, which the inputs do not have")
    mask = torch.ones_like(segment) if mask is None else mask
    return torch.cat([_summed_up(tokens, mask * (segment == index)) for index in range(segments)], dim=1)


def _places(maps: Tensor) -> Tensor:
    """Maps (B, F, H, W) → tokens (B, H·W, F)."""
    return maps.flatten(2).transpose(1, 2)


def _summed_up(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean, spread and maximum of tokens (B, N, F), where a mask (B, N) is 1: (B, 3·F) in float32; 0 of no token."""
    tokens = tokens.float()
    count: Tensor | int
    if mask is None:
        count, largest = tokens.shape[1], tokens.amax(dim=1)
    else:
        kept = mask.to(tokens.dtype)[:, :, None]  # (B, N, 1)
        held = kept.sum(dim=1)  # (B, 1)
        largest = tokens.masked_fill(kept == 0, float("-inf")).amax(dim=1).masked_fill(held == 0, 0.0)
        tokens, count = tokens * kept, held.clamp(min=1)
    mean, square = tokens.sum(dim=1) / count, tokens.square().sum(dim=1) / count  # many times as fast as `std`
    spread = (square - mean.square()).clamp(min=1e-6).sqrt()  # the root of 0 has no gradient
    return torch.cat([mean, spread, largest], dim=1)


def feature_width(inputs: Inputs, backbone: Backbone, point: str) -> int:
    """F of `EarlyRouter`, by looking at a batch."""
    with torch.no_grad():
        return early_features(inputs, backbone, point).shape[1] // 3


def choose_thresholds(logits: Tensor, familiarity: Tensor, share: float = 0.99) -> tuple[float, float]:
    """Choose the confidence and the out-of-distribution score below which a router abstains, on validation data.

    Both thresholds lie at the same quantile, so each of them excludes the same number of samples.

    Args:
        logits: (N, K), of samples of the suite that the router was not trained on.
        familiarity: (N,), their out-of-distribution scores.
        share: fraction of these samples that must stay above both thresholds.

    Returns:
        The largest such thresholds, of the most likely task's probability and of the familiarity; 0 and −∞ for a share
        of 1.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"the share of samples to route must be in (0, 1], got {share}")
    scores = torch.stack([logits.float().softmax(dim=1).amax(dim=1), familiarity.float()])  # (2, N)
    ordered = scores.sort(dim=1).values
    # A sample is below the thresholds at a rank if its own, the last among equals, is smaller by either score.
    ranks = (torch.searchsorted(ordered, scores, right=True) - 1).amin(dim=0).sort().values
    below = int((1 - share) * len(ranks) + 1e-9)
    rank = int(ranks[below]) if below else 0
    confidence, least = ordered[:, rank].tolist() if rank else (0.0, float("-inf"))
    return confidence, least


class _Reached(Exception):
    """Carries an early output out of the forward pass."""

    def __init__(self, output: Any) -> None:
        super().__init__("reached")
        self.output = output
