"""How a FineTuner makes the head of a task: a linear probe, a trained layer, class names, or prototypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from freemerge.data import Task, TaskData, check_templates, load_tokenizer
from freemerge.models import (
    Backbone,
    CosineHead,
    ImageTextBackbone,
    LanguageBackbone,
    extract_features,
    head_from_state,
    prototypes,
)
from freemerge.training.objectives import Objective

HeadKind = Literal["probe", "linear", "zero_shot", "prototypes"]
_PREFIX = "head."  # of the head's tensors in a FineTuner's state dict


@dataclass(frozen=True)
class HeadMaker:
    """Makes the heads of a backbone's tasks.

    Args:
        backbone: the pretrained backbone.
        kind: kind of head; see `FineTuner`.
        templates: prompts of a zero-shot head for tasks without their own.
        logit_scale: factor of the cosines; None: the usual one.
        samples: number of training samples of each class that prototypes average.
    """

    backbone: Backbone
    kind: HeadKind
    templates: Sequence[str]
    logit_scale: float | None
    samples: int

    def check(self) -> None:
        """Raise a ValueError if an option is invalid, or the head does not suit the backbone."""
        if self.kind not in get_args(HeadKind):
            raise ValueError(f"FineTuner: head must be one of {', '.join(get_args(HeadKind))}, got {self.kind!r}")
        if self.kind == "zero_shot" and not self.backbone.reads_texts:
            raise ValueError(
                "FineTuner: a zero-shot head needs a text encoder or an ImageTextBackbone, got "
                f"{type(self.backbone).__name__} of {type(self.backbone.model).__name__}; use 'prototypes' or 'probe'"
            )
        if self.kind == "prototypes" and isinstance(self.backbone, LanguageBackbone):
            raise ValueError("FineTuner: a LanguageBackbone has its own head; leave `head` out")
        if self.logit_scale is not None and not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"FineTuner: logit_scale must be above 0, got {self.logit_scale}")
        if self.samples < 1:
            raise ValueError(f"FineTuner: prototype_samples must be at least 1, got {self.samples}")
        check_templates("FineTuner", self.templates)

    @property
    def is_trained(self) -> bool:
        """Whether the head is trained with the backbone; other kinds are frozen."""
        return self.kind == "linear"

    @property
    def by_cosine(self) -> bool:
        """Whether the head is made of one direction per class."""
        return self.kind in ("zero_shot", "prototypes")

    def unfitted(self, num_outputs: int) -> nn.Module | None:
        """A head of the right class without its values; None if it is an ordinary layer.

        Args:
            num_outputs: number of classes C.
        """
        if isinstance(self.backbone, LanguageBackbone):
            return nn.Identity()
        return CosineHead(self.backbone.feature_dim, num_outputs, *self._scale) if self.by_cosine else None

    def frozen(self, task: Task | int) -> nn.Module | None:
        """The task's head, if it needs no fitting.

        Args:
            task: the task, or the number of classes of a classification.

        Returns:
            An identity for a language model, which has its own head; a zero-shot head; or None for other heads.

        Raises:
            ValueError: if a zero-shot head has no class names.
        """
        if isinstance(self.backbone, LanguageBackbone):
            return nn.Identity()
        if self.kind != "zero_shot":
            return None
        if isinstance(task, int):
            raise ValueError("FineTuner: a zero-shot head needs the class names of a classification task")
        return self.zero_shot(task, task.class_names)

    def zero_shot(self, task: Task, class_names: Sequence[str]) -> nn.Module:
        """A frozen head of some of a task's classes, from their names in the task's prompts.

        Raises:
            ValueError: if the backbone cannot embed them.
        """
        tokenizer = None if task.tokenizer is None else load_tokenizer(task.tokenizer)
        return self.backbone.class_head(class_names, task.templates or self.templates, tokenizer, self.logit_scale)

    def fitted(self, objective: Objective, data: TaskData, device: torch.device) -> nn.Module:
        """A probe or prototypes from the base's features of a task's training data; the backbone is on `device`.

        Raises:
            ValueError: if a class of prototypes has no training sample.
        """
        if self.kind == "prototypes":
            return self.prototypes(objective, data.drawn_dataloader(), device)
        return objective.fit_probe(*extract_features(self.backbone, data.train_dataloader(), device))

    def prototypes(self, objective: Objective, loader: Iterable[Any], device: torch.device) -> nn.Module:
        """A head of the mean features of the first samples of each class in a loader.

        Raises:
            ValueError: if a class has no sample.
        """
        means = prototypes(self.backbone, loader, objective.num_outputs, self.samples, device)
        return CosineHead.of(means, *self._scale)

    def saved(self, state: Mapping[str, Tensor]) -> nn.Module | None:
        """The zero-shot head in a FineTuner's state dict, because its class depends on the backbone; else None."""
        if self.kind != "zero_shot":
            return None
        return head_from_state({name.removeprefix(_PREFIX): state[name] for name in state if name.startswith(_PREFIX)})

    @property
    def _scale(self) -> tuple[float, ...]:
        return () if self.logit_scale is None else (self.logit_scale,)


def default_template(backbone: Backbone) -> str:
    """The prompt of a class where none is configured: CLIP's usual one, or the class name alone for texts."""
    return "a photo of a {}." if isinstance(backbone, ImageTextBackbone) else "{}"
