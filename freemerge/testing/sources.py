"""`check_source`: whether a task source of your own works with training, merging and resuming."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from freemerge.data import SPLITS, Task, TaskSource, collate
from freemerge.inputs import IGNORED


def check_source(source: TaskSource, seed: int = 0, samples: int = 16, workers: int = 2) -> Task:
    """Build a task and check everything that training, merging and resuming rely on.

        def test_birds(tmp_path):
            write_a_few_birds(tmp_path)
            check_source(Birds(root=str(tmp_path)))

    The checks are: the source can be pickled and identified; equal seeds build equal tasks; no split is empty; some
    samples of each split have valid inputs and labels; a batch fetched at once equals its samples; loader workers
    return the same batches; test samples are not training samples.

    Args:
        source: the source; its data must be present, or its `prepare` must fetch them.
        seed: the seed to build with.
        samples: number of samples to check per split, evenly spaced.
        workers: number of loader processes, which must return the same batches as the main process; 0 skips this check.

    Returns:
        The task, for further assertions of your own.

    Raises:
        AssertionError: if a check fails; the message states where, and what was expected and found.
    """
    where = type(source).__name__
    _check(isinstance(source, TaskSource), f"{where} is not a TaskSource; derive it from freemerge.data.TaskSource")
    copy = _pickled(where, source)
    _check_identity(where, source, copy)
    source.prepare()
    with torch.random.fork_rng(devices=[]):  # augmentations draw from the global generator
        return _check_task(where, source, copy, seed, samples, workers)


def _check_task(where: str, source: TaskSource, copy: TaskSource, seed: int, samples: int, workers: int) -> Task:
    """Two builds with one seed are equal, and every split is valid."""
    name = "checked"
    task, again = source.build(name, seed), copy.build(name, seed)
    _check(isinstance(task, Task), f"{where}.build returns {type(task).__name__}, expected a freemerge.data.Task")
    _check(task.name == name, f"{where}.build({name!r}, …) returns a task called {task.name!r}")
    _check(
        (task.kind, task.class_names, task.metric) == (again.kind, again.class_names, again.metric),
        f"{where}: two builds with one seed differ in their kind, classes or metric",
    )
    checked = {split: _check_split(f"{where}, {split}", task, again, split, samples) for split in SPLITS}
    _check_separate(where, task, checked)
    for split in SPLITS:
        _check_loading(f"{where}, {split}", getattr(task, split), checked[split], workers)
    _check(isinstance(source.build(name, seed + 1), Task), f"{where}.build fails with another seed")
    return task


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _pickled(where: str, value: Any) -> Any:
    """A value after pickling and unpickling."""
    try:
        return pickle.loads(pickle.dumps(value))
    except Exception as error:  # a `__reduce__` may raise anything
        raise AssertionError(
            f"{where} cannot be pickled, which loader workers and processes need ({type(error).__name__}: {error}); "
            f"lambdas and local functions are the usual reason: use functions at module level or functools.partial"
        ) from error


def _check_identity(where: str, source: TaskSource, copy: TaskSource) -> None:
    """`identity()` is JSON-serialisable and equal for a copy."""
    try:
        first, second = (json.dumps(each.identity(), sort_keys=True) for each in (source, copy))
    except TypeError as error:
        raise AssertionError(f"{where}.identity() is not JSON-serialisable ({error}); return plain values") from error
    _check(first == second, f"{where}.identity() differs for a copy of the source; it must describe the data")
    address = re.search(r" at 0x[0-9a-f]+", first)
    _check(address is None, f"{where}.identity() contains a memory address ({address and address[0].strip()})")


def _check_split(where: str, task: Task, again: Task, split: str, samples: int) -> list[int]:
    """Check some samples of a split; returns their indices."""
    dataset, other = getattr(task, split), getattr(again, split)
    size = len(dataset)
    _check(size > 0, f"{where}: there are no samples")
    _check(size == len(other), f"{where}: two builds with one seed have {size} and {len(other)} samples")
    chosen = sorted({index * size // samples for index in range(samples)})
    first = _sample(where, dataset, 0)[0]
    for index in chosen:
        place = f"{where}[{index}]"
        inputs, label = _seeded(place, dataset, index)
        _check_inputs(place, inputs, first)
        _check_label(place, task, label)
        _check(
            _equal((inputs, label), _seeded(place, other, index)),
            f"{place}: two builds with one seed differ, with equal generator states; draw random numbers from `seed`",
        )
    return chosen


def _seeded(place: str, dataset: Any, index: int) -> tuple[Any, Any]:
    """A sample with torch's generator seeded by its index, so that augmentation is reproducible."""
    torch.manual_seed(index)
    return _sample(place, dataset, index)


def _sample(place: str, dataset: Any, index: int) -> tuple[Any, Any]:
    """A sample as (inputs, label)."""
    sample = dataset[index]
    _check(
        isinstance(sample, (tuple, list)) and len(sample) == 2,
        f"{place} is a {type(sample).__name__}, expected the pair (inputs, label)",
    )
    return sample[0], sample[1]


def _check_inputs(place: str, inputs: Any, first: Any) -> None:
    """Inputs are finite tensors with the keys or the shape of the first sample's inputs."""
    tensors = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
    for key, value in tensors.items():
        _check(isinstance(value, Tensor), f"{place}: {key} is a {type(value).__name__}, expected a tensor")
        _check(value.numel() > 0, f"{place}: {key} is empty, shape {tuple(value.shape)}")
        if value.is_floating_point():
            _check(bool(value.isfinite().all()), f"{place}: {key} has values that are not finite")
    _check(len(tensors) > 0, f"{place}: there are no inputs")
    if isinstance(inputs, Mapping):
        _check(inputs.keys() == first.keys(), f"{place} has the keys {', '.join(inputs)}, [0] has {', '.join(first)}")
    else:
        _check(
            inputs.shape == first.shape,
            f"{place} has the shape {tuple(inputs.shape)}, [0] has {tuple(first.shape)}; they cannot be in one batch",
        )


def _check_label(place: str, task: Task, label: Any) -> None:
    """A label has the dtype, shape and range of the task's kind."""
    label = torch.as_tensor(label)
    if task.kind == "classification":
        _check(
            label.dtype == torch.int64 and label.ndim == 0,
            f"{place}: the label is {label.dtype} {tuple(label.shape)}, expected an int64 scalar",
        )
        _check(0 <= int(label) < task.num_classes, f"{place}: the label is {int(label)}, of {task.num_classes} classes")
    elif task.kind == "regression":
        _check(
            label.dtype == torch.float32 and label.ndim == 0 and math.isfinite(float(label)),
            f"{place}: the label is {label.dtype} {tuple(label.shape)}, expected a finite float32 scalar",
        )
    else:
        _check(
            label.dtype == torch.int64 and label.ndim == 1 and bool((label != IGNORED).any()),
            f"{place}: the labels are {label.dtype} {tuple(label.shape)}, expected int64 (L,), not all {IGNORED}",
        )


def _check_separate(where: str, task: Task, checked: Mapping[str, list[int]]) -> None:
    """Test samples are not training samples; a few images may be equal by chance, but not all."""
    if isinstance(task.train[0][0], Mapping):  # short texts occur repeatedly
        return
    size = len(task.train)  # type: ignore[arg-type] # torch's class has no length; every dataset of a task has one
    train = {_content(_seeded(where, task.train, index)) for index in range(min(size, 2000))}
    test = [_content(_seeded(where, task.test, index)) for index in checked["test"]]
    _check(
        len(set(test)) < 3 or not set(test) <= train,
        f"{where}: every checked test sample is also a training sample; the splits must be disjoint",
    )


def _content(sample: tuple[Any, Any]) -> bytes:
    return sample[0].contiguous().numpy().tobytes()


def _check_loading(where: str, dataset: Any, chosen: list[int], workers: int) -> None:
    """A batch equals its samples, in this process and in loader workers, and the dataset can be pickled."""
    copy = _pickled(f"the dataset of {where}", dataset)
    _check(len(copy) == len(dataset), f"the dataset of {where} has another length after pickling")
    few = chosen[:4]
    singles = collate([_seeded(where, dataset, index) for index in few])
    whole = _batch(dataset, few)
    _check(
        [_shapes(part) for part in whole] == [_shapes(part) for part in singles] and torch.equal(whole[1], singles[1]),
        f"{where}: a batch fetched by __getitems__ differs from its single samples",
    )
    if workers:
        loader = DataLoader(Subset(dataset, few), batch_size=2, num_workers=workers, collate_fn=collate)
        labels = [batch[1] for batch in loader]
        expected = [_batch(dataset, few[start : start + 2])[1] for start in range(0, len(few), 2)]
        _check(
            all(torch.equal(found, right) for found, right in zip(labels, expected, strict=True)),
            f"{where}: loader workers return other labels than the main process",
        )


def _batch(dataset: Any, indices: list[int]) -> Any:
    fetch = getattr(dataset, "__getitems__", None)
    return collate(fetch(indices) if fetch else [dataset[index] for index in indices])


def _shapes(value: Any) -> Any:
    return {key: item.shape for key, item in value.items()} if isinstance(value, Mapping) else value.shape


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_equal(value, second[key]) for key, value in first.items())
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return torch.equal(torch.as_tensor(first), torch.as_tensor(second))
