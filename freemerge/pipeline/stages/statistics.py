"""Statistics of the tasks' data that `merge` collects first, for methods with `statistics: collect`.

- RegMean: Gram matrices of the individual models' layers, on training inputs.
- FisherMerging: squared gradients of the individual models, on training inputs.
- AdaMerging: coefficients of the task vectors, on validation inputs without their labels.

    <run>/merge/statistics/<task>.gram_matrices.safetensors, <task>.squared_gradients.safetensors, …
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from freemerge.data import Task, collate, derive_seed
from freemerge.inputs import IGNORED, Inputs, batch_size, select, to_device
from freemerge.merging import (
    AdaMerging,
    GramMatrices,
    MeasuredMethod,
    SquaredGradients,
    TaskArithmetic,
    draw_log_probability,
    measurable_layers,
    merge,
    task_vector,
)
from freemerge.models import Backbone
from freemerge.pipeline.context import RunContext
from freemerge.pipeline.store.stage_folder import from_rank_zero
from freemerge.tuning import learn_coefficients


def collect_statistics(run: RunContext) -> None:
    """Collect the statistics that methods of the stage `merge` need.

    Every rank computes them, as it computes the merges, and rank 0 writes them.
    """
    for method in run.files.collected.values():
        _write(run, method)
        from_rank_zero(lambda: None)  # no rank may read the files before they are complete
        run.console.print(f"merge: measured {method.measures.replace('_', ' ')}", markup=False)


def _write(run: RunContext, method: MeasuredMethod) -> None:
    """Collect and write the statistics of all tasks."""
    with isolate_rng(include_cuda=False):  # the same augmentations each time; other draws stay as they are
        torch.manual_seed(run.seed)
        for task, table in _learned(run, method) if isinstance(method, AdaMerging) else _measured(run, method):
            path = run.files.statistics_path(method, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            run.write(path, table)


def _measured(run: RunContext, method: MeasuredMethod) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each task with the statistics of its individual model, one model at a time."""
    device = run.measure.device
    for task in run.suite.names:
        backbone = run.files.backbone(run.files.finetuned(task)).eval().to(device)
        batches = _batches(run, task, device)
        if method.measures == "gram_matrices":
            yield task, gram_matrices(backbone, batches)
        else:
            head = run.files.heads(shared=False)[task].eval().to(device)
            yield task, squared_gradients(backbone, head, run.suite.task(task), batches, run.seed)


def _learned(run: RunContext, method: AdaMerging) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each task with its coefficients; all coefficients are learned together."""
    device, tasks = run.measure.device, run.suite.names
    start = run.files.base_weights()
    begun = run.measure.with_own_statistics(merge(start, run.files.finetuned_paths(), TaskArithmetic(method.initial)))
    backbone = run.files.backbone(begun).eval().to(device)
    names = [name for name, value in backbone.model.named_parameters() if value.is_floating_point()]
    heads = {task: head.eval().to(device) for task, head in run.files.heads().items()}
    vectors = {}
    for task in tasks:
        vector = task_vector(start, run.files.finetuned(task))
        vectors[task] = {name: vector[name].to(device) for name in names}

    def predict(task: str, weights: Any, inputs: Inputs) -> Tensor:
        inside = {f"model.{name}": value.to(start[name].dtype) for name, value in weights.items()}
        output: Tensor = heads[task](functional_call(backbone, inside, (inputs,)))
        return output

    for module in (backbone, *heads.values()):
        module.requires_grad_(False)
    learned = learn_coefficients(
        {name: start[name].to(device, torch.float32, copy=True) for name in names},
        vectors,
        {task: partial(predict, task) for task in tasks},
        {task: _unlabelled(run.suite.task(task).val, method.batch_size, _seed(run, task), device) for task in tasks},
        initial=method.initial,
        rate=method.rate,
        steps=method.steps,
    )
    yield from learned.items()


def _seed(run: RunContext, task: str) -> int:
    return derive_seed(run.seed, "coefficients", task)


def _unlabelled(dataset: Dataset, size: int, seed: int, device: torch.device) -> Iterator[Inputs]:
    """Yield batches of inputs without end, shuffled again in each pass."""
    generator = torch.Generator().manual_seed(seed)
    loader: DataLoader = DataLoader(dataset, size, shuffle=True, generator=generator, collate_fn=collate)
    while True:
        for inputs, _ in loader:
            yield to_device(inputs, device)


def _batches(run: RunContext, task: str, device: torch.device) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield training batches on the device, up to the configured number of samples."""
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
    """Compute the Gram matrices of the inputs of a backbone's layers, by the names of their weights."""
    with GramMatrices(measurable_layers(backbone.model)) as grams:
        for inputs, _ in batches:
            backbone(inputs)
    return grams.tensors()


def squared_gradients(
    backbone: Backbone, head: nn.Module, task: Task, batches: Iterator[tuple[Inputs, Tensor]], seed: int
) -> dict[str, Tensor]:
    """Compute the mean squared gradients of log p(y|x) for a backbone's weights; y is drawn from the model.

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
