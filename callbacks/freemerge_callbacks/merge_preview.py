"""MergePreview: evaluate, during fine-tuning, a merge of the current weights with the other tasks' models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from freemerge.checkpoints import hash_base, open_checkpoint, read_record
from freemerge.data import TaskSuite
from freemerge.merging import FRMerging, MergeMethod, Plan, Reader, TaskArithmetic, make_plan, merge
from freemerge.tensors import compile_patterns
from freemerge_callbacks._base import FitBase, dtypes_of, open_finetuned
from freemerge_callbacks._batches import BatchFormat
from freemerge_callbacks._others import base_hashes, check_base_hashes, find_others
from freemerge_callbacks._predicting import merged_into, own_heads
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._similarity import Similarity, similarity
from freemerge_callbacks._task_evaluation import TaskEvaluation
from freemerge_callbacks._weights import is_dev_run, part_weights
from freemerge_callbacks.merge_at_fit_end import OWN_LABEL


class MergePreview(Callback):
    """Merges the current backbone with the other tasks' models after each validation, in memory, and evaluates it.

    Logs `<prefix>/<task>/acc`, `<prefix>/mean_acc` and `<prefix>/mean_normalized_acc`, which ModelCheckpoint and
    EarlyStopping can monitor, so that a task is trained until its merge is best; MergeAtFitEnd with weights="best" then
    merges that checkpoint. Also logs the similarity of the task vectors: `task_vector/norm`, for each other model
    `task_vector/cosine/<name>` and `task_vector/sign_agreement/<name>` (random vectors: 0 and 0.5), and
    `task_vector/low_frequency_energy`, the fraction of its energy that FR-Merging's filter (or the method's own) would
    remove. The trained weights are the same, bit for bit, as without this callback.

    Args:
        method: the merging method. If it takes one number per model, this fit's comes first, then those of `others`.
        base: path of the pretrained model from which all models were fine-tuned.
        others: the other tasks' fine-tuned models, as in MergeAtFitEnd. They are read again for each preview.
        loaders: task → loader or data module; or one suite or data module for all tasks. As in MultiTaskEvaluation.
        heads: task → head, as in MultiTaskEvaluation.
        every_n_epochs: merge after every n-th training epoch; use 1 if a callback monitors the result. The task vectors
            are compared after each validation.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        head: dotted path of the module's own head, for the task that `heads` leaves out.
        include: names of the tensors to merge, relative to the backbone: globs, or regular expressions after "re:".
            None for all.
        exclude: names of the tensors that keep the base's values, and of heads that only fine-tuned models have.
        split: the split of a suite to evaluate; a checkpoint should not be chosen on "test".
        prefix: prefix of the logged results' names.
        metrics: task → metric, as in MultiTaskEvaluation.
        batch_norm: training data on which the statistics of merged batch-norm layers are measured again, as in
            MultiTaskEvaluation.
        individual: task → metric of its own fine-tuned model, by which the results are normalized. A task left out is
            measured once, with the model among `others` that has the task's name (TaskCheckpoint's files record it).
            The task being trained is measured each time with the current weights. To choose a checkpoint, give its
            value here or monitor `mean_acc`: early weights merge without a loss only because they have learnt little.
        inputs: the key of a batch's inputs, as in MultiTaskEvaluation.
        labels: the key of a batch's labels, as in MultiTaskEvaluation.
        adapt: batch → (inputs, labels), as in MultiTaskEvaluation.
        features: how to read the features from a backbone's output, as in MultiTaskEvaluation.

    Attributes:
        results: task → value of its metric in the latest preview, accuracies in [0, 1].
        individual: task → the value by which its result is normalized, for the tasks for which it is known.
        similarity: the latest comparison of the task vectors; None before.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(
        self,
        method: MergeMethod,
        base: str,
        others: list[str],
        loaders: TaskSuite | L.LightningDataModule | dict[str, DataLoader | L.LightningDataModule],
        heads: dict[str, nn.Module | str] | None = None,
        every_n_epochs: int = 1,
        backbone: str = "backbone",
        head: str = "head",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        split: Literal["val", "test"] = "val",
        prefix: str = "merged",
        metrics: dict[str, str | Metric] | None = None,
        batch_norm: dict[str, DataLoader] | int | None = None,
        individual: dict[str, float] | None = None,
        inputs: str | int | list[str] | list[int] | None = None,
        labels: str | int | None = None,
        adapt: Callable | None = None,
        features: str | Callable | None = None,
    ) -> None:
        self.method = method
        self.base = FitBase(base, Path("preview"), "MergePreview")
        self._start = Path.cwd()
        self.others = others
        format = BatchFormat("MergePreview", inputs, labels, adapt)
        self.evaluation = TaskEvaluation(
            "MergePreview", loaders, heads, metrics, backbone, head, split, batch_norm, format, features
        )
        self.every_n_epochs = every_n_epochs
        self.backbone = backbone
        self.include = include
        self.exclude = exclude
        self.prefix = prefix
        self.individual = dict(individual or {})
        self.results: dict[str, float] = {}
        self._given = frozenset(self.individual)
        self.similarity: Similarity | None = None
        self._found: dict[str, Path] = {}
        self._logged: dict[str, float] | None = None  # metrics of the current validation, logged at its end
        self._warned = False

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
        """Check the arguments, find the other models, and open loaders, heads and metrics.

        Args:
            trainer: the Trainer.
            pl_module: not used; it may be incomplete.
            stage: only "fit" matters.

        Raises:
            ValueError: if an argument is invalid.
        """
        if stage != "fit" or is_dev_run(trainer):
            return
        if self.every_n_epochs < 1:
            raise ValueError(f"MergePreview: every_n_epochs must be at least 1, got {self.every_n_epochs}")
        if not trainer.enable_validation:
            raise ValueError("MergePreview: it runs after each validation, but this fit has none; add validation data")
        compile_patterns(self.include, "include")
        compile_patterns(self.exclude, "exclude")
        open_checkpoint(self.base.path)
        self._found = find_others(self.others, self._start, [self.base.path], "MergePreview")
        self.method.check([OWN_LABEL, *self._found])
        self.evaluation.open(trainer)
        if unknown := sorted(self._given - set(self.evaluation.tasks)):
            raise ValueError(f"MergePreview: `individual` names '{unknown[0]}', a task without a loader")
        self.individual = {task: self.individual[task] for task in self._given}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the models can be merged and evaluated.

        Args:
            trainer: the Trainer.
            pl_module: the module.

        Raises:
            ValueError: if the models do not match, have different bases, or the evaluation of a task fails.
        """
        if is_dev_run(trainer):
            return
        self.evaluation.check(trainer, pl_module)
        weights = part_weights(trainer, pl_module, self.backbone, "MergePreview")
        self.base.find(trainer, self.backbone, weights)
        on_rank_zero(trainer, lambda: self._check_fit(weights))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a new validation, whose preview is still to be made.

        Args:
            trainer: the Trainer.
            pl_module: the module.
        """
        self._logged = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # By the first batch, every callback that swaps the weights for the validation (a moving average) has done so,
        # whatever the callbacks' order, and DDP has broadcast the buffers of rank 0.
        """Merge and evaluate after the first batch of a validation.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            outputs: not used.
            batch: not used.
            batch_idx: not used.
            dataloader_idx: not used.
        """
        self._preview(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the results of the preview.

        Args:
            trainer: the Trainer.
            pl_module: the module.
        """
        self._preview(trainer, pl_module)  # for a rank without batches, because the others wait for it
        if self._logged:
            pl_module.log_dict(self._logged, sync_dist=True)

    def _preview(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge and evaluate once in each validation of a fit."""
        idle = is_dev_run(trainer) or trainer.sanity_checking or trainer.state.fn != "fit"
        if idle or self._logged is not None:
            return
        weights = part_weights(trainer, pl_module, self.backbone, "MergePreview")
        filter = getattr(self.method, "filter", None) or FRMerging().filter
        plan = self._plan(weights)
        self.similarity = similarity(Reader(plan).vectors().subset(plan.weights), filter)
        self._logged = similarity_metrics(self.similarity, distinct_names(list(self._found.values())))
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            merged = self._placed(pl_module, self._merge(weights))
            self.results = self.evaluation.run(trainer, pl_module, merged)
            self._measure_individual(trainer, pl_module)
            self._logged |= self.evaluation.named(self.results, self.prefix) | self._normalized()

    def _placed(self, module: L.LightningModule, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merged weights under the module's names, without those of a head: the module keeps its own."""
        own = own_heads(module, self.backbone, self.evaluation.head, self.include, self.exclude)
        weights = merged_into(module, self.backbone, merged)
        return {name: tensor for name, tensor in weights.items() if name not in own}

    def _measure_individual(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Update `individual`: the other tasks once, this fit's task each time."""
        others = dict(zip(distinct_names(list(self._found.values())), self._found.values(), strict=True))
        for task in self.evaluation.tasks:
            if task in others and task not in self.individual:
                weights = merged_into(module, self.backbone, self._finetuned(others[task]))
                self.individual |= self.evaluation.run(trainer, module, weights, [task], merged=False)
        remaining = [task for task in self.evaluation.tasks if task not in others and task not in self._given]
        own = self.evaluation.own_task or (remaining[0] if len(remaining) == 1 else None)
        if own in remaining:
            self.individual |= self.evaluation.run(trainer, module, {}, [own])
        unknown = [task for task in remaining if task != own]
        if unknown and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"MergePreview: {self.prefix}/mean_normalized_{self.evaluation.mean_label} is not logged, because the "
                f"individual results of {', '.join(unknown)} are unknown; pass individual={{...}}, or `others` that "
                "TaskCheckpoint has written"
            )

    def _normalized(self) -> dict[str, float]:
        """The mean over the tasks of merged ÷ individual (individual ÷ merged if lower is better)."""
        if any(task not in self.individual for task in self.results):
            return {}
        ratios = []
        for task, merged in self.results.items():
            above, below = merged, self.individual[task]
            if not self.evaluation.higher_is_better(task):
                above, below = below, above
            ratios.append(above / below if below else 0.0)
        return {f"{self.prefix}/mean_normalized_{self.evaluation.mean_label}": sum(ratios) / len(ratios)}

    def _finetuned(self, path: Path) -> Mapping[str, Tensor]:
        """The weights of another task's model, under the base's names."""
        base = self.base.open()
        model = open_finetuned(path).relative_to(base.names)
        return merge(base, [model], TaskArithmetic(1.0)) if model.deltas else model

    def _check_fit(self, weights: Mapping[str, Tensor]) -> None:
        self._plan(weights)
        if base_hashes(self._found.values()):
            check_base_hashes(self._found.values(), hash_base(self.base.open(), dtypes_of(weights)), "MergePreview")

    def _plan(self, weights: Mapping[str, Tensor]) -> Plan:
        base = self.base.open()
        models = [open_checkpoint(weights, label=OWN_LABEL), *(open_finetuned(path) for path in self._found.values())]
        return make_plan(base, models, self.include, self.exclude)

    def _merge(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        base = self.base.open()
        models = {OWN_LABEL: weights, **{label: open_finetuned(path) for label, path in self._found.items()}}
        return merge(base, models, self.method, include=self.include, exclude=self.exclude)


def similarity_metrics(found: Similarity, names: Sequence[str]) -> dict[str, float]:
    """The similarities under the names that they are logged with.

    Args:
        found: the comparison with the other models.
        names: the other models' names.

    Returns:
        Logged name → value.
    """
    metrics = {"task_vector/norm": found.norm, "task_vector/low_frequency_energy": found.low_frequency_energy}
    for name, cosine, agreement in zip(names, found.cosine, found.sign_agreement, strict=True):
        metrics |= {f"task_vector/cosine/{name}": cosine, f"task_vector/sign_agreement/{name}": agreement}
    return metrics


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A short, unique name for each checkpoint.

    Args:
        paths: the checkpoints.

    Returns:
        The recorded task or the file name; if these clash, the folder's name; if these clash too, with a number.
    """
    records = [read_record(path) for path in paths]
    names = [path.stem if record is None else record.task for path, record in zip(paths, records, strict=True)]
    counts = Counter(names)
    names = [name if counts[name] == 1 else path.parent.name for name, path in zip(names, paths, strict=True)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{index}" for index, name in enumerate(names)]
