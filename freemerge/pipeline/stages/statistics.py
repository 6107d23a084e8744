"""What `merge` measures before it merges: statistics of each fine-tuned model on its task's training data.

Only methods with `statistics: collect` (RegMean, FisherMerging) need them.

    <run>/merge/statistics/<task>.gram_matrices.safetensors, <task>.squared_gradients.safetensors
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from freemerge.data import Task
from freemerge.inputs import IGNORED, Inputs, batch_size, select, to_device
from freemerge.merging import GramMatrices, SquaredGradients, draw_log_probability, measurable_layers
from freemerge.models import Backbone
from freemerge.pipeline.context import RunContext
from freemerge.pipeline.store.stage_folder import from_rank_zero


def collect_statistics(run: RunContext) -> None:
    """Measure and write what the methods of the stage `merge` ask for; every rank waits for the first."""
    for kind in sorted(run.files.collected):
        for task in run.suite.names:
            from_rank_zero(lambda kind=kind, task=task: run.write(*_measured(run, kind, task)))
            run.console.print(f"merge: {kind.replace('_', ' ')} of {task}", markup=False)


def _measured(run: RunContext, kind: str, task: str) -> tuple[Any, dict[str, Tensor]]:
    """The file of one task's statistics, and its tensors."""
    path = run.files.statistics_path(kind, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    device = run.measure.device
    backbone = run.files.backbone(run.files.finetuned(task)).eval().to(device)
    with isolate_rng(include_cuda=False):  # the same augmentations each time, and none that changes other draws
        torch.manual_seed(run.seed)
        batches = _batches(run, task, device)
        if kind == "gram_matrices":
            return path, gram_matrices(backbone, batches)
        head = run.files.heads(shared=False)[task].eval().to(device)
        return path, squared_gradients(backbone, head, run.suite.task(task), batches, run.seed)


def _batches(run: RunContext, task: str, device: torch.device) -> Iterator[tuple[Inputs, Tensor]]:
    """Training batches on the device, with as many samples in all as the settings say."""
    left = run.settings.merge.statistics_samples
    data = run.suite.for_task(task)
    data.prepare_data()
    data.setup()
    for inputs, labels in data.train_dataloader():
        count = min(left, batch_size(inputs))
        yield to_device(select(inputs, slice(0, count)), device), labels[:count].to(device)
        left -= count
        if left <= 0:
            return


@torch.no_grad()
def gram_matrices(backbone: Backbone, batches: Iterator[tuple[Inputs, Tensor]]) -> dict[str, Tensor]:
    """Gram matrices of the inputs of a backbone's layers, by the names of their weights."""
    with GramMatrices(measurable_layers(backbone.model)) as grams:
        for inputs, _ in batches:
            backbone(inputs)
    return grams.tensors()


def squared_gradients(
    backbone: Backbone, head: nn.Module, task: Task, batches: Iterator[tuple[Inputs, Tensor]], seed: int
) -> dict[str, Tensor]:
    """Mean squared gradients of log p(y|x) of a backbone's weights, y drawn from the model.

    Args:
        backbone: the fine-tuned backbone.
        head: the task's own head.
        task: the task, which says what the outputs are.
        batches: inputs with labels, of which only the places of the tokens that count are used.
        seed: of the drawn answers.
    """
    parameters = {name: value.detach().requires_grad_() for name, value in backbone.model.named_parameters()}
    inside = {f"model.{name}": value for name, value in parameters.items()}
    squares, generator = SquaredGradients(parameters), torch.Generator().manual_seed(seed)
    distribution: Any = {"classification": "classes", "regression": "normal"}.get(task.kind, "tokens")
    for inputs, labels in batches:
        for index in range(batch_size(inputs)):
            one = slice(index, index + 1)
            outputs = head(functional_call(backbone, inside, (select(inputs, one),)))
            counted = labels[one] != IGNORED if distribution == "tokens" else None
            if task.kind == "causal_lm" and counted is not None:  # each output is of the next token
                outputs, counted = outputs[:, :-1], counted[:, 1:]
            squares.add(draw_log_probability(outputs, generator, distribution, counted))
    return squares.tensors()
