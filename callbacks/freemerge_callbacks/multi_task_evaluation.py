"""MultiTaskEvaluation: evaluate one backbone on every task, during training and after a merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from freemerge.checkpoints import expand
from freemerge.data import TaskSuite
from freemerge_callbacks._batches import BatchFormat
from freemerge_callbacks._predicting import merged_into, own_heads
from freemerge_callbacks._ranks import log_metrics
from freemerge_callbacks._task_evaluation import TaskEvaluation
from freemerge_callbacks._weights import callbacks_of, is_dev_run
from freemerge_callbacks.merge_at_fit_end import MergeAtFitEnd


class MultiTaskEvaluation(Callback):
    """Evaluates the backbone on every task, not only on the one that it is being fine-tuned on.

    Logs `<prefix>/<task>/acc` for each task and their mean, `<prefix>/mean_acc`. Other metrics are logged under their
    own names, and the mean is then `<prefix>/mean_score`. The evaluation is exact on any number of ranks: every sample
    counts once. It does not affect the training: modes, devices and random number generators are restored.

    Args:
        loaders: task → loader, or a data module with one loader; or one suite, or one data module whose loaders are
            such a dict. Loaders must not shuffle; batches are (inputs, labels), or dicts with `labels`. The inputs are
            passed to the backbone (to the module, if there are no `heads`): a tensor, or a dict or tuple, whose values
            are passed as arguments if its forward accepts them. They may be nested. See `inputs`, `labels` and `adapt`
            for other batches.
        heads: task → head, from the backbone's features to logits: a module, a file of TaskCheckpoint, or a
            .safetensors file with a linear head's `weight` and `bias`. One task may be left out: the one being trained,
            which uses the module's own head. None: the module's forward returns the logits of every task.
        every_n_epochs: evaluate the current weights after every n-th training epoch, in addition to the evaluation at
            the end. None: only at the end.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        head: dotted path of the module's own head, for the task that `heads` leaves out.
        merged: the weights to evaluate when the fit ends: those that a MergeAtFitEnd has merged, or those in a file.
            "auto": those of the Trainer's MergeAtFitEnd, if it has one. None: the current weights.
        split: the split of a suite to evaluate.
        prefix: prefix of the logged names, which must differ between several of these callbacks.
        metrics: task → metric: accuracy, f1_macro, matthews, recall@5 (or another number), pearson, spearman,
            exact_match, perplexity, mean_iou for dense predictions, or a torchmetrics metric, which gets outputs and
            labels in comparable shapes: (B, 1) becomes (B,), and (B, L, C) with labels (B, L) becomes (B, C, L).
            Tasks left out use the suite's metric, or accuracy. perplexity is for a causal model whose labels are its
            inputs; if the labels are aligned with the logits, use seq2seq:perplexity.
        batch_norm: training data of all tasks, on which the statistics of merged batch-norm layers are measured again:
            task → loader, or a number of batches for each task of a suite. None: the merged statistics are used.
        inputs: the key of a batch's inputs, or several keys, whose values are passed on as a dict (as a tuple if the
            keys are positions). None: the first entry of a pair, or everything in a dict except the labels.
        labels: the key of a batch's labels. None: the second entry of a pair, or `labels` in a dict.
        adapt: batch → (inputs, labels); replaces `inputs` and `labels`.
        features: how to read the features from a backbone that returns a dict: their key, or a function of the output.
            None: `pooler_output`, or the only tensor (B, F).

    Attributes:
        results: task → value of its metric in the latest evaluation, accuracies in [0, 1].

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(
        self,
        loaders: TaskSuite | L.LightningDataModule | dict[str, DataLoader | L.LightningDataModule],
        heads: dict[str, nn.Module | str] | None = None,
        every_n_epochs: int | None = None,
        backbone: str = "backbone",
        head: str = "head",
        merged: MergeAtFitEnd | str | None = "auto",
        split: Literal["val", "test"] = "val",
        prefix: str = "multitask",
        metrics: dict[str, str | Metric] | None = None,
        batch_norm: dict[str, DataLoader] | int | None = None,
        inputs: str | int | list[str] | list[int] | None = None,
        labels: str | int | None = None,
        adapt: Callable | None = None,
        features: str | Callable | None = None,
    ) -> None:
        format = BatchFormat("MultiTaskEvaluation", inputs, labels, adapt)
        self.evaluation = TaskEvaluation(
            "MultiTaskEvaluation", loaders, heads, metrics, backbone, head, split, batch_norm, format, features
        )
        self.every_n_epochs = every_n_epochs
        self.backbone = backbone
        self.merged = merged
        self._start = Path.cwd()
        self.prefix = prefix
        self.results: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """A key that contains the prefix, so that a Trainer can have several callbacks of this class."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The state that Lightning saves in a checkpoint.

        Returns:
            The latest results.
        """
        return {"results": self.results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the latest results.

        Args:
            state_dict: the result of `state_dict`.
        """
        self.results = state_dict["results"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the arguments, and open loaders, heads and metrics.

        Args:
            trainer: the Trainer.
            pl_module: not used; it may be incomplete.
            stage: only "fit" matters.

        Raises:
            ValueError: if an argument is invalid.
        """
        if stage != "fit" or is_dev_run(trainer):
            return
        if self.every_n_epochs is not None and self.every_n_epochs < 1:
            raise ValueError(f"MultiTaskEvaluation: every_n_epochs must be at least 1, got {self.every_n_epochs}")
        self._check_order(trainer)
        self.evaluation.open(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate one batch of each task, so that errors show before training.

        Args:
            trainer: the Trainer.
            pl_module: the module.

        Raises:
            ValueError: if the evaluation of a task fails.
        """
        if not is_dev_run(trainer):
            self.evaluation.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the current weights, if `every_n_epochs` is set and an evaluation is due.

        Args:
            trainer: the Trainer.
            pl_module: the module.
        """
        due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not is_dev_run(trainer):
            self.results = self.evaluation.run(trainer, pl_module, {})
            pl_module.log_dict(self.evaluation.named(self.results, self.prefix), sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the merged weights, or the current ones if there is no merge.

        Args:
            trainer: the Trainer.
            pl_module: the module.
        """
        if is_dev_run(trainer):
            return
        path = self._merged_path(trainer)
        weights = {} if path is None else merged_into(pl_module, self.backbone, path)
        if isinstance(merge := self._merge(trainer), MergeAtFitEnd):
            own = own_heads(pl_module, self.backbone, self.evaluation.head, merge.include, merge.exclude)
            weights = {name: tensor for name, tensor in weights.items() if name not in own}
        self.results = self.evaluation.run(trainer, pl_module, weights)
        metrics = self.evaluation.named(self.results, self.prefix)
        log_metrics(trainer, metrics)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        rank_zero_info(f"MultiTaskEvaluation: {path or 'current weights'}: {scores}")

    def _merged_path(self, trainer: L.Trainer) -> Path | None:
        merge = self._merge(trainer)
        if isinstance(merge, MergeAtFitEnd):
            return merge.merged_path
        return None if merge is None else self._start / expand(merge)

    def _merge(self, trainer: L.Trainer) -> MergeAtFitEnd | str | None:
        if self.merged != "auto":
            return self.merged
        found = [callback for callback in callbacks_of(trainer) if isinstance(callback, MergeAtFitEnd)]
        if len(found) > 1:
            raise ValueError(
                "MultiTaskEvaluation: the Trainer has several MergeAtFitEnd callbacks; choose one with merged=..."
            )
        return found[0] if found else None

    def _check_order(self, trainer: L.Trainer) -> None:
        merge = self._merge(trainer)
        callbacks = callbacks_of(trainer)
        if isinstance(merge, MergeAtFitEnd) and merge not in callbacks[: callbacks.index(self)]:
            raise ValueError("MultiTaskEvaluation: put its MergeAtFitEnd before it in the Trainer's list of callbacks")
