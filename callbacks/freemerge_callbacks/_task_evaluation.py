"""What MultiTaskEvaluation and MergePreview have in common: loaders, heads, and one number for each task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import lightning as L
from torch import Tensor, nn

from freemerge.data import TaskSuite
from freemerge_callbacks._predicting import check_loaders, count_classes, evaluating, linear_head, predictor
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._weights import get_part, refuse_placeholders


class TaskEvaluation:
    """Evaluates a module on several tasks.

    Args:
        who: what messages begin with.
        loaders: task → loader of (inputs, labels), or a suite.
        heads: task → module or file; None where the module's forward gives logits.
        backbone: dotted path of the backbone.
        head: dotted path of the module's own head.
        split: which part of a suite's data.
    """

    def __init__(
        self,
        who: str,
        loaders: TaskSuite | Mapping[str, Iterable],
        heads: Mapping[str, nn.Module | str] | None,
        backbone: str,
        head: str,
        split: str,
    ) -> None:
        self.who = who
        self.loaders = loaders
        self.heads = heads
        self.backbone = backbone
        self.head = head
        self.split = split
        self._loaders: dict[str, Iterable] = {}
        self._read: dict[str, nn.Module] = {}
        self._classes: dict[str, int] = {}

    def open(self, trainer: L.Trainer) -> None:
        """Build the loaders and read the heads' files.

        Raises:
            ValueError: something is missing or would make the result inexact.
        """
        if self.split not in ("val", "test"):
            raise ValueError(f"{self.who}: `split` must be 'val' or 'test', got {self.split!r}")
        refuse_placeholders(trainer.strategy, self.who)
        self._loaders = self._open_loaders(trainer)
        check_loaders(trainer, self._loaders, self.who)
        self._check_heads()
        self._classes = {}

    def check(self, module: nn.Module) -> None:
        """Require that the module has the parts that were named."""
        get_part(module, self.backbone, self.who)
        self._heads_of(module)

    def run(self, trainer: L.Trainer, module: L.LightningModule, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Task → accuracy in [0, 1]. Every rank must call this, and all get the result.

        Args:
            trainer: the Trainer.
            module: the module.
            weights: tensors to use instead of the module's own, under the module's names, on any device.
        """
        from freemerge.evaluation import LabelSpace, evaluate

        heads, device = self._heads_of(module), trainer.strategy.root_device
        with evaluating([module, *(heads or {}).values()], device):
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
            predict = predictor(trainer, module, self.backbone, heads, weights)
            self._classes = self._classes or count_classes(predict, self._loaders, device, self.who)
            return evaluate(predict, self._loaders, LabelSpace(self._classes), device)

    def _open_loaders(self, trainer: L.Trainer) -> dict[str, Iterable]:
        if not isinstance(self.loaders, TaskSuite):
            return dict(self.loaders)
        on_rank_zero(trainer, self.loaders.prepare_data)
        parts = {name: self.loaders.for_task(name) for name in self.loaders.names}
        return {name: getattr(part, f"{self.split}_dataloader")() for name, part in parts.items()}

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        if unknown := [task for task in self.heads if task not in self._loaders]:
            raise ValueError(f"{self.who}: a head for '{unknown[0]}', a task without a loader")
        missing = [task for task in self._loaders if task not in self.heads]
        if len(missing) > 1:
            raise ValueError(f"{self.who}: no heads for {', '.join(missing)}; only one task may use the module's own")
        files = {task: head for task, head in self.heads.items() if not isinstance(head, nn.Module)}
        self._read = {task: linear_head(head, self.who) for task, head in files.items()}

    def _heads_of(self, module: nn.Module) -> dict[str, nn.Module] | None:
        if self.heads is None:
            return None
        known = {**self.heads, **self._read}
        return {
            task: known[task] if task in known else get_part(module, self.head, self.who, "head")
            for task in self._loaders
        }


def named_metrics(results: Mapping[str, float], prefix: str) -> dict[str, float]:
    """`<prefix>/<task>/acc` for each task and their mean, `<prefix>/mean_acc`."""
    mean = sum(results.values()) / len(results)
    return {**{f"{prefix}/{task}/acc": value for task, value in results.items()}, f"{prefix}/mean_acc": mean}
