"""`check_source`: whether a task source of your own is one that everything here can use."""

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
    """Build a task and look at everything that training, merging and resuming rely on.

        def test_birds(tmp_path):
            write_a_few_birds(tmp_path)
            check_source(Birds(root=str(tmp_path)))

    Checked are: that the source can be pickled and identified; that equal seeds build equal tasks; that no split is
    empty; inputs and labels of some samples of each split; that a batch fetched at once is its samples; that datasets
    reach loader workers; that test samples are not those of training.

    Args:
        source: the source; its data must be there or be fetched by its `prepare`.
        seed: to build with.
        samples: so many samples of each split are looked at, evenly spaced.
        workers: loader processes that must give the same batches as none; 0 leaves this out.

    Returns:
        The task, for further assertions of your own.

    Raises:
        AssertionError: if something is not as it should be; the message says where, expected and found.
    """
    where = type(source).__name__
    _check(isinstance(source, TaskSource), f"{where} is no TaskSource: derive it from freemerge.data.TaskSource")
    copy = _pickled(where, source)
    _check_identity(where, source, copy)
    source.prepare()
    with torch.random.fork_rng(devices=[]):  # augmentations draw from the global generator
        return _check_task(where, source, copy, seed, samples, workers)


def _check_task(where: str, source: TaskSource, copy: TaskSource, seed: int, samples: int, workers: int) -> Task:
    name = "checked"
    task, again = source.build(name, seed), copy.build(name, seed)
    _check(isinstance(task, Task), f"{where}.build returns {type(task).__name__}, expected a freemerge.data.Task")
    _check(task.name == name, f"{where}.build({name!r}, …) returns a task called {task.name!r}")
    _check(
        (task.kind, task.class_names, task.metric) == (again.kind, again.class_names, again.metric),
        f"{where}: two builds with one seed differ in their kind, classes or metric",
    )
    looked_at = {split: _check_split(f"{where}, {split}", task, again, split, samples) for split in SPLITS}
    _check_apart(where, task, looked_at)
    for split in SPLITS:
        _check_loading(f"{where}, {split}", getattr(task, split), looked_at[split], workers)
    _check(isinstance(source.build(name, seed + 1), Task), f"{where}.build fails with another seed")
    return task


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _pickled(where: str, value: Any) -> Any:
    try:
        return pickle.loads(pickle.dumps(value))
    except Exception as error:  # whatever its own __reduce__ raises
        raise AssertionError(
            f"{where} cannot be pickled, as loader workers and processes need ({type(error).__name__}: {error}); "
            f"lambdas and local functions are the usual reason, functions at module level and functools.partial will do"
        ) from error


def _check_identity(where: str, source: TaskSource, copy: TaskSource) -> None:
    try:
        first, second = (json.dumps(each.identity(), sort_keys=True) for each in (source, copy))
    except TypeError as error:
        raise AssertionError(f"{where}.identity() holds what JSON cannot ({error}): return plain values") from error
    _check(first == second, f"{where}.identity() differs for a copy of the source: it must say what the data are")
    address = re.search(r" at 0x[0-9a-f]+", first)
    _check(address is None, f"{where}.identity() holds a place in memory ({address and address[0].strip()})")


def _check_split(where: str, task: Task, again: Task, split: str, samples: int) -> list[int]:
    """Looks at some samples; returns their indices."""
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
            f"{place}: two builds with one seed differ, though torch's generator was seeded alike: draw from `seed`",
        )
    return chosen


def _seeded(place: str, dataset: Any, index: int) -> tuple[Any, Any]:
    """A sample, augmented alike each time."""
    torch.manual_seed(index)
    return _sample(place, dataset, index)


def _sample(place: str, dataset: Any, index: int) -> tuple[Any, Any]:
    sample = dataset[index]
    _check(
        isinstance(sample, (tuple, list)) and len(sample) == 2,
        f"{place} is a {type(sample).__name__}, expected the pair (inputs, label)",
    )
    return sample[0], sample[1]


def _check_inputs(place: str, inputs: Any, first: Any) -> None:
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
            f"{place} has the shape {tuple(inputs.shape)}, [0] has {tuple(first.shape)}: they cannot be in one batch",
        )


def _check_label(place: str, task: Task, label: Any) -> None:
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


def _check_apart(where: str, task: Task, looked_at: Mapping[str, list[int]]) -> None:
    """Test samples are not training samples; a few pictures may be alike, all of them are not by chance."""
    if isinstance(task.train[0][0], Mapping):  # short texts recur
        return
    size = len(task.train)  # type: ignore[arg-type] # torch's class has no length, and every dataset of a task has
    train = {_content(_seeded(where, task.train, index)) for index in range(min(size, 2000))}
    test = [_content(_seeded(where, task.test, index)) for index in looked_at["test"]]
    _check(
        len(set(test)) < 3 or not set(test) <= train,
        f"{where}: every test sample that was looked at is a training sample too: the splits must be apart",
    )


def _content(sample: tuple[Any, Any]) -> bytes:
    return sample[0].contiguous().numpy().tobytes()


def _check_loading(where: str, dataset: Any, chosen: list[int], workers: int) -> None:
    """A batch is its samples, from here, from a copy and from other processes."""
    copy = _pickled(f"the dataset of {where}", dataset)
    _check(len(copy) == len(dataset), f"the dataset of {where} has another length after pickling")
    few = chosen[:4]
    singles = collate([_seeded(where, dataset, index) for index in few])
    whole = _batch(dataset, few)
    _check(
        [_shapes(part) for part in whole] == [_shapes(part) for part in singles] and torch.equal(whole[1], singles[1]),
        f"{where}: a batch fetched by __getitems__ is not what its samples give one by one",
    )
    if workers:
        loader = DataLoader(Subset(dataset, few), batch_size=2, num_workers=workers, collate_fn=collate)
        labels = [batch[1] for batch in loader]
        expected = [_batch(dataset, few[start : start + 2])[1] for start in range(0, len(few), 2)]
        _check(
            all(torch.equal(found, right) for found, right in zip(labels, expected, strict=True)),
            f"{where}: loader workers give other labels than the main process",
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
