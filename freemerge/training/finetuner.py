"""FineTuner: fine-tunes one backbone with one head on one task, which gives a task vector."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric

from freemerge.checkpoints import expand
from freemerge.data import Task, TaskData, TaskMetric
from freemerge.inputs import Inputs, batch_size
from freemerge.models import Backbone, LanguageBackbone, extract_features
from freemerge.training.adapters import add_adapter, has_adapter, merged_weights, peft_config
from freemerge.training.heads import HeadKind, HeadMaker, default_template
from freemerge.training.objectives import Objective
from freemerge.training.optimization import OptimizedModule, Schedule

_OBJECTS = ("backbone", "optimizer", "_instantiator", "_class_path")  # LightningCLI adds the last two
_TASK = "freemerge_task"
_NO_TASK = 'FineTuner: there is no head; pass `num_classes`, or the data of one task: datamodule=suite["birds"]'


class FineTuner(OptimizedModule):
    """Fine-tunes a backbone on a task: classification, regression, or language modelling with the model's own head.

    In a suite, one FineTuner is the template: `for_task` makes a new one for each task, with the same base weights. In
    a Trainer of your own, `trainer.fit(tuner, datamodule=suite["birds"])` fits the FineTuner itself.

    A checkpoint contains the task's kind and number of outputs, so that `load_from_checkpoint(path, backbone=…)` can
    rebuild the head.

    Args:
        backbone: the pretrained backbone.
        num_classes: number of classes C; not needed with a suite or the data module of one task.
        head: kind of head. `probe`: a linear probe, fitted on the base's features at the start of the fit and frozen,
            so that the task vector contains everything that is learnt. `linear`: a linear layer, initialised at random
            and trained. `zero_shot`: the cosine with the embeddings of the class names in prompts, frozen; a text
            encoder embeds them itself before it is fine-tuned, an `ImageTextBackbone` with its text tower.
            `prototypes`: the cosine with the mean features of a few training samples of each class, frozen. A
            `LanguageBackbone` uses the model's own head.
        optimizer: makes the optimizer; None is AdamW.
        schedule: learning rate schedule after the warm-up.
        warmup: fraction of the steps over which the learning rate rises.
        label_smoothing: label smoothing of the cross-entropy.
        peft: trains a PEFT adapter and merges it into the weights afterwards: `{kind: lora, r: 8, …}`, `{kind: ia3,
            …}`, or `{class_path: peft.LoraConfig, init_args: {…}}`; null trains all weights.
        gradient_checkpointing: save memory by recomputing activations in the backward pass.
        templates: prompts of a zero-shot head for tasks without their own, with one `{}` for the class name. None is
            `a photo of a {}.` for an `ImageTextBackbone`, and the class name alone for texts.
        logit_scale: factor of the cosines of `zero_shot` and `prototypes`; None is the model's own for an
            `ImageTextBackbone`, and 20 for others.
        prototype_samples: number of training samples of each class that `prototypes` averages.

    Raises:
        ValueError: if an option is invalid, or the head does not suit the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int | None = None,
        head: HeadKind = "probe",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        peft: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        templates: list[str] | None = None,
        logit_scale: float | None = None,
        prototype_samples: int = 16,
    ) -> None:
        super().__init__(optimizer, schedule, warmup)
        # Plain data only, because checkpoints are read with weights_only; objects are passed to `load_from_checkpoint`.
        self.save_hyperparameters(ignore=[*_OBJECTS, *(["schedule"] if callable(schedule) else [])])
        self.backbone = backbone
        self.head_kind = head
        self.templates = tuple(templates or (default_template(backbone),))
        self.logit_scale = logit_scale
        self.prototype_samples = prototype_samples
        self.label_smoothing = label_smoothing
        self.peft = None if peft is None else peft_config(peft)
        self.heads.check()
        if gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        # In the state dict, so that a resumed fit does not refit the probe on a partly fine-tuned backbone.
        self.head_ready: Tensor
        self.register_buffer("head_ready", torch.tensor(False))
        self.head: nn.Module | None = None
        self.objective: Objective | None = None
        if num_classes is not None:
            self._set_task(num_classes)

    # -- the task -----------------------------------------------------------------------------------------------------

    def for_task(self, task: Task | int) -> FineTuner:
        """Copy this module, with its base weights, for a task.

        Args:
            task: the task, or the number of classes of a classification.

        Returns:
            A new FineTuner with a head for the task.

        Raises:
            ValueError: if the backbone or the head does not suit the task.
        """
        tuner = copy.deepcopy(self)
        tuner._set_task(task)
        return tuner

    @property
    def heads(self) -> HeadMaker:
        """Makes this backbone's heads by the configured options."""
        return HeadMaker(self.backbone, self.head_kind, self.templates, self.logit_scale, self.prototype_samples)

    def _set_task(self, task: Task | int) -> None:
        objective, head = self.objective_of(task), self.heads.frozen(task)
        self._prepare(objective, self.new_head(objective.num_outputs) if head is None else head)
        if head is None:
            self._own_head().requires_grad_(self.heads.is_trained)
        self.head_ready.fill_(head is not None or self.heads.is_trained)

    def _prepare(self, objective: Objective, head: nn.Module) -> None:
        """Set the task's head and metrics, and add the adapter if one is configured."""
        self.objective, self.head = objective, head
        if self.peft is not None and not has_adapter(self.backbone.model):
            self.backbone.model = add_adapter(self.backbone.model, self.peft)
        self.metrics = nn.ModuleDict({split: objective.make_metrics() for split in ("val", "test")})

    def make_head(self, num_outputs: int) -> nn.Module:
        """Make a new head. Override this method for heads of your own, together with `head: linear`.

        Args:
            num_outputs: number of classes C; 1 for a regression.

        Returns:
            A module that maps features (B, F) to (B, num_outputs).
        """
        return nn.Linear(self.backbone.feature_dim, num_outputs)

    def new_head(self, num_outputs: int) -> nn.Module:
        """A head of this tuner's kind before it is fitted.

        Args:
            num_outputs: classes C; 1 for a regression.
        """
        head = self.heads.unfitted(num_outputs)
        return self.make_head(num_outputs) if head is None else head

    @property
    def makes_own_heads(self) -> bool:
        """Whether a subclass overrides `make_head`, so that heads need not be linear layers."""
        return self.heads.is_trained and type(self).make_head is not FineTuner.make_head

    def objective_of(self, task: Task | int) -> Objective:
        """The loss and metric of a task.

        Args:
            task: the task, or the number of classes of a classification.

        Returns:
            The objective.

        Raises:
            ValueError: if the backbone does not suit this kind of task.
        """
        objective, who = Objective.of(task, self.label_smoothing), type(self.backbone).__name__
        backbone = self.backbone
        wanted = {backbone.kind} if isinstance(backbone, LanguageBackbone) else {"classification", "regression"}
        if objective.kind not in wanted:
            needed = "LanguageBackbone" if objective.kind in ("seq2seq", "causal_lm") else "TransformersBackbone"
            raise ValueError(
                f"FineTuner: this {who} is for {' and '.join(sorted(wanted))}, but the task is {objective.kind}, which "
                f"needs a {needed} of that kind"
            )
        if self.heads.by_cosine and objective.kind != "classification":
            raise ValueError(
                f"FineTuner: head {self.heads.kind!r} needs a classification, and the task is a {objective.kind}; "
                "use 'probe'"
            )
        return objective

    def _own_objective(self) -> Objective:
        if self.objective is None:
            raise ValueError(_NO_TASK)
        return self.objective

    def _own_head(self) -> nn.Module:
        if self.head is None:
            raise ValueError(_NO_TASK)
        return self.head

    @property
    def monitor(self) -> str:
        """The name under which validation logs the task's metric, such as `val/acc`."""
        return f"val/{self._own_objective().metric.label}"

    @property
    def monitor_mode(self) -> Literal["max", "min"]:
        """Whether a higher or a lower value of `monitor` is better."""
        return "max" if self._own_objective().metric.higher_is_better else "min"

    def logged(self, task: Task | int) -> tuple[str, ...]:
        """The metrics that a fit on a task logs. Override it in a subclass that logs others.

        Args:
            task: the task, or the number of classes of a classification.

        Returns:
            Names such as `train/loss` and `val/acc`.

        Raises:
            ValueError: if the backbone does not suit this kind of task.
        """
        return ("train/loss", *(f"val/{name}" for name in self.objective_of(task).make_metrics()))

    # -- results ------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The backbone's weights for merging, with an adapter merged in.

        Returns:
            Name → tensor, named as in the backbone's model without adapters.
        """
        model = self.backbone.model
        return merged_weights(model) if has_adapter(model) else self.backbone.weights()

    def save_adapter(self, folder: str | Path) -> bool:
        """Write the adapter in PEFT's format.

        Args:
            folder: the folder to write to.

        Returns:
            Whether there was an adapter; without one, nothing is written.
        """
        if not has_adapter(self.backbone.model):
            return False
        # PEFT would ask the hub whether embeddings were resized; here they never are.
        model: Any = self.backbone.model  # a PeftModel
        model.save_pretrained(str(expand(folder)), save_embedding_layers=False)
        return True

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Tensor:
        """Compute the outputs of a batch.

        Args:
            inputs: a batch.

        Returns:
            Logits (B, C), numbers (B, 1) for a regression, or a language model's logits (B, L, V).
        """
        return self._own_head()(self.backbone(inputs))

    def setup(self, stage: str) -> None:
        """Take the task from the data module, if it has one and no task has been set.

        Args:
            stage: ignored.

        Raises:
            ValueError: if there is neither a task nor a head.
        """
        data = getattr(self.trainer, "datamodule", None)
        if self.head is None and isinstance(data, TaskData):
            self._set_task(data.task)
        if self.head is None:
            raise ValueError(_NO_TASK)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the task's kind, outputs and metric, so that `load_from_checkpoint` can rebuild the head.

        Args:
            checkpoint: Lightning's checkpoint; changed in place.
        """
        super().on_save_checkpoint(checkpoint)
        objective = self._own_objective()
        checkpoint[_TASK] = {
            "kind": objective.kind,
            "num_outputs": objective.num_outputs,
            "metric": objective.metric.name,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the head of the checkpoint's task, if no task has been set.

        Args:
            checkpoint: Lightning's checkpoint.
        """
        if self.head is not None or _TASK not in checkpoint:
            return
        task = checkpoint[_TASK]
        metric = TaskMetric(task["kind"], task["metric"])
        objective = Objective(task["kind"], task["num_outputs"], metric, self.label_smoothing)
        head = self.heads.saved(checkpoint["state_dict"])
        self._prepare(objective, self.new_head(objective.num_outputs) if head is None else head)
        self._own_head().requires_grad_(self.heads.is_trained)

    def on_train_start(self) -> None:
        """Fit the head to the base's features of the training data, unless it comes from a checkpoint."""
        if self.head_ready:
            return
        objective, data = self._own_objective(), getattr(self.trainer, "datamodule", None)
        if self.heads.kind == "prototypes":
            loader: Any = data.drawn_dataloader() if isinstance(data, TaskData) else self.trainer.train_dataloader
            head = self.heads.prototypes(objective, loader, self.device)
        else:
            head = objective.fit_probe(*self._features_for_head())
        self._own_head().load_state_dict(self.trainer.strategy.broadcast(head.state_dict()))
        self.head_ready.fill_(True)

    def _features_for_head(self) -> tuple[Tensor, Tensor]:
        """Features (N, F) and labels (N,) of the training data of all tasks that share the head."""
        data = getattr(self.trainer, "datamodule", None)
        head_dataloader = getattr(data, "head_dataloader", None)
        shared = None if head_dataloader is None else head_dataloader()
        if shared is not None:  # this loader is not distributed, so every rank reads all of it
            return extract_features(self.backbone, shared, self.device)
        features, labels = extract_features(self.backbone, self.trainer.train_dataloader, self.device)
        if self.trainer.world_size > 1:  # each rank read a part: (world, n, …) → (world · n, …)
            gathered: list[Any] = [self.all_gather(part.to(self.device)) for part in (features, labels)]
            features, labels = (part.flatten(0, 1) for part in gathered)
        return features, labels

    def training_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch; logs `train/loss`.

        Args:
            batch: (inputs, labels).
            batch_idx: ignored.

        Returns:
            Scalar loss.
        """
        inputs, labels = batch
        loss = self._own_objective().loss(self(inputs), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size(inputs))
        return loss

    def validation_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        """Log `val/loss` and the task's metric.

        Args:
            batch: (inputs, labels).
            batch_idx: ignored.
        """
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Raise a NotFiniteError if an output was NaN or infinite."""
        self.check_outputs("validation")

    def test_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        """Log `test/loss` and the task's metric.

        Args:
            batch: (inputs, labels).
            batch_idx: ignored.
        """
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Raise a NotFiniteError if an output was NaN or infinite."""
        self.check_outputs("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Compute the outputs of a batch.

        Args:
            batch: inputs, or a list [inputs, labels] from a loader of labelled samples.
            batch_idx: ignored.
            dataloader_idx: ignored.

        Returns:
            The outputs; see `forward`.
        """
        return self(batch[0] if isinstance(batch, list) else batch)

    def _evaluate(self, batch: tuple[Inputs, Tensor], split: str) -> None:
        inputs, labels = batch
        metrics, objective, outputs = self.metrics[split], self._own_objective(), self(inputs)
        assert isinstance(metrics, nn.ModuleDict)  # see `_prepare`
        self.record_outputs(outputs)
        objective.update(metrics, outputs, labels)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            on_bar = name == objective.metric.label
            self.log(f"{split}/{name}", metric, prog_bar=on_bar, on_epoch=True, batch_size=len(labels))
