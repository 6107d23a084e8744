"""Suites that a configuration describes: a mapping from task names to sources, or a folder of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from freemerge.checkpoints import expand
from freemerge.data.arrays import Augmentation
from freemerge.data.sources import NpzSource, PooledSource, TaskSource, TextTableSource
from freemerge.data.suite import TaskSuite
from freemerge.data.tasks import Kind, Task
from freemerge.names import class_name


class SourceSuite(TaskSuite):
    """A suite whose tasks come from any sources; their kinds can be mixed.

    Args:
        sources: task name → source of its data.
        tasks: the selected tasks, in order; None selects all.
        batch_size: samples per training batch of each task.
        eval_batch_size: samples per batch of validation, test and prediction.
        num_workers: worker processes per loader; 0 is fastest for data in memory.
        seed: seed of the splits, the subsets and the training order.
        held_out: out-of-domain tasks: evaluated, but neither fine-tuned on nor merged.
        shared_heads: groups of tasks with the same classes that share one head.
        pretraining_source: the data that a backbone without pretrained weights is pretrained on; None: no pretraining.

    Raises:
        ValueError: if a task is unknown or selected twice, none is selected, or a size is out of range.
    """

    def __init__(
        self,
        sources: dict[str, TaskSource],
        tasks: list[str] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        held_out: list[str] | None = None,
        shared_heads: list[list[str]] | None = None,
        pretraining_source: TaskSource | None = None,
    ) -> None:
        self.sources = dict(sources)
        self.pretraining_source = pretraining_source
        super().__init__(tasks, batch_size, eval_batch_size, num_workers, seed, held_out, shared_heads)

    def available(self) -> tuple[str, ...]:
        """The keys of `sources`."""
        return tuple(self.sources)

    def prepare_data(self) -> None:
        """Let the sources of the selected tasks download their data."""
        for name in (*self.names, *self.held_out):
            self.sources[name].prepare()
        if self.pretraining_source is not None:
            self.pretraining_source.prepare()

    @property
    def has_pretraining(self) -> bool:
        """Whether there is a `pretraining_source`."""
        return self.pretraining_source is not None

    def pretraining(self) -> Task | None:
        """The task of `pretraining_source`, or None."""
        source = self.pretraining_source
        return None if source is None else source.build("pretraining", self.seed)

    def build(self, name: str) -> Task:
        """Build a task from its source.

        Args:
            name: one of `available()`.

        Returns:
            The task.

        Raises:
            ValueError: if the source's data are missing or not as expected.
        """
        return self.sources[name].build(name, self.seed)

    def identity(self) -> dict[str, Any]:
        """What determines the data: the sources and the seed. A subclass's own arguments only describe the sources.

        Returns:
            JSON-compatible values.
        """
        kind = type(self)
        sources = {name: source.identity() for name, source in self.sources.items()}
        arguments = {"seed": self.seed, "shared_heads": self.shared_heads, "sources": sources}
        if self.pretraining_source is not None:
            arguments["pretraining"] = self.pretraining_source.identity()
        return {"class": class_name(kind), "version": self.DATA_VERSION, "arguments": arguments}

    def task_identity(self, name: str) -> dict[str, Any]:
        """What determines one task's data: its source and the seed.

        Args:
            name: one of `available()`.

        Returns:
            JSON-compatible values.
        """
        return {"source": self.sources[name].identity(), "task": name, "seed": self.seed}

    def pretraining_identity(self) -> dict[str, Any]:
        """What determines the pretraining data: their source and the seed."""
        source = self.pretraining_source
        return {"source": None if source is None else source.identity(), "seed": self.seed}


class NpzSuite(SourceSuite):
    """A suite in a folder of NPZ files of images, one per task and named after it. See `NpzSource`.

    Args:
        folder: the folder.
        tasks: the selected tasks, in order; None selects all files, sorted by name.
        image_size: height and width of the model's input in pixels; None keeps the images' size.
        channels: 3 repeats grey images, 1 converts colour to grey; None keeps the images' channels.
        mean: subtracted from pixels in [0, 1]: one number, or one per channel.
        std: divides the difference: one number, or one per channel.
        augment: augmentations of training batches, in order: transforms of `torchvision.transforms.v2`, classes of
            `freemerge.data.augment`, or callables of float32 (B, C, H, W) in [0, 1].
        class_names: task → readable class names for a zero-shot head, reports and predictions: a list in the order of
            the classes, or class → name. Other tasks and classes keep the names that the data give.
        templates: task → prompts with one `{}` for a zero-shot head, which averages them.
        train_size: number of training samples of each task, drawn with the seed; None takes all.
        val_size: likewise for validation.
        test_size: likewise for test.
        batch_size: images per training batch of each task.
        eval_batch_size: images per batch of validation, test and prediction.
        num_workers: worker processes per loader; the data are in memory, so 0 is usually fastest.
        seed: seed of the splits, the subsets and the training order.
        held_out: out-of-domain tasks: evaluated, but neither fine-tuned on nor merged.
        shared_heads: groups of tasks with the same classes that share one head.
        pretraining: the data that a backbone without pretrained weights is pretrained on: `pooled` (the training images
            of all files as one task with all their classes) or the path of another NPZ file; None: no pretraining.
    """

    def __init__(
        self,
        folder: str,
        tasks: list[str] | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        augment: list[Augmentation] | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        held_out: list[str] | None = None,
        shared_heads: list[list[str]] | None = None,
        pretraining: str | None = None,
        class_names: dict[str, list[str] | dict[str, str]] | None = None,
        templates: dict[str, list[str]] | None = None,
    ) -> None:
        read = partial(
            NpzSource,
            image_size=image_size,
            channels=channels,
            mean=mean,
            std=std,
            augment=augment,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
        )
        files = _files(folder, (".npz",))
        _check_tasks(folder, files, class_names=class_names, templates=templates)
        names, prompts = class_names or {}, templates or {}
        sources: dict[str, TaskSource] = {
            name: read(path=path, class_names=names.get(name), templates=prompts.get(name))
            for name, path in files.items()
        }
        source: TaskSource | None = None
        if pretraining is not None:
            pooled = pretraining == "pooled"
            source = PooledSource(sources=sources) if pooled else read(path=pretraining)
        super().__init__(sources, tasks, batch_size, eval_batch_size, num_workers, seed, held_out, shared_heads, source)


class TextTableSuite(SourceSuite):
    """A suite in a folder of text tables, one per task and named after it. See `TextTableSource`.

    Args:
        folder: a folder of .csv, .tsv, .jsonl (plain or .gz) and .parquet files; `<task>.classes.txt` can name the
            classes of a task.
        tokenizer: hub id or folder of the model's tokenizer.
        tasks: the selected tasks, in order; None selects all files, sorted by name.
        text: one or two text columns; None takes all columns except `label` and `split`.
        label: the label column; null for a `causal_lm` without targets.
        split: the column with the values train, val and test.
        kind: kind of task: classification, regression, seq2seq or causal_lm.
        metrics: task → its metric; other tasks use the default of `kind`.
        class_names: task → readable class names for a zero-shot head, reports and predictions: a list in the order of
            the classes, or class → name. Other tasks and classes keep the names that the data give.
        templates: task → prompts with one `{}` for a zero-shot head, which averages them.
        max_length: texts are truncated to this many tokens.
        max_target_length: targets of `seq2seq` are truncated to this many tokens.
        train_size: number of training samples of each task, drawn with the seed; None takes all.
        val_size: likewise for validation.
        test_size: likewise for test.
        batch_size: texts per training batch of each task.
        eval_batch_size: texts per batch of validation, test and prediction.
        num_workers: worker processes per loader; the data are in memory, so 0 is usually fastest.
        seed: seed of the splits, the subsets and the training order.
        held_out: out-of-domain tasks: evaluated, but neither fine-tuned on nor merged.
        shared_heads: groups of tasks with the same classes that share one head.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: str,
        tasks: list[str] | None = None,
        text: list[str] | None = None,
        label: str | None = "label",
        split: str | None = "split",
        kind: Kind = "classification",
        metrics: dict[str, str] | None = None,
        max_length: int = 128,
        max_target_length: int = 128,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        held_out: list[str] | None = None,
        shared_heads: list[list[str]] | None = None,
        class_names: dict[str, list[str] | dict[str, str]] | None = None,
        templates: dict[str, list[str]] | None = None,
    ) -> None:
        read = partial(
            TextTableSource,
            tokenizer=tokenizer,
            text=text,
            label=label,
            split=split,
            kind=kind,
            max_length=max_length,
            max_target_length=max_target_length,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
        )
        files = _files(folder, (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz"))
        _check_tasks(folder, files, metrics=metrics, class_names=class_names, templates=templates)
        judged, names, prompts = metrics or {}, class_names or {}, templates or {}
        sources: dict[str, TaskSource] = {
            name: read(path=path, metric=judged.get(name), class_names=names.get(name), templates=prompts.get(name))
            for name, path in files.items()
        }
        super().__init__(sources, tasks, batch_size, eval_batch_size, num_workers, seed, held_out, shared_heads)


def _check_tasks(folder: str, tasks: Mapping[str, str], **said: Mapping[str, Any] | None) -> None:
    """Raise a ValueError if something is said of a task that is not there."""
    for key, by_task in said.items():
        if unknown := sorted(set(by_task or {}) - set(tasks)):
            raise ValueError(f"{folder}: {key} names {unknown[0]!r}; tasks: {', '.join(tasks)}")


def _files(folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Task name → file, sorted by name."""
    if not expand(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    found: dict[str, str] = {}
    for path in sorted(expand(folder).iterdir()):
        name, dot, rest = path.name.partition(".")
        if dot + rest not in suffixes:
            continue
        if name in found:
            raise ValueError(f"{folder}: two files for the same task: {Path(found[name]).name} and {path.name}")
        found[name] = str(path)
    if not found:
        raise ValueError(f"{folder}: the folder has no {', '.join(suffixes)} file")
    return found
