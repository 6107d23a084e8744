"""Suites whose tasks are told by a configuration: a mapping from names to sources, or a folder of files."""

from __future__ import annotations

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
    """Tasks from any sources, mixed as you like.

    Args:
        sources: task name → where its data come from.
        tasks: Which tasks, in this order; None is all of them.
        batch_size: Samples per training batch, of each task.
        eval_batch_size: Samples per batch of validation, test and prediction.
        num_workers: Worker processes per loader. Data in memory is served fastest by none.
        seed: Determines what is drawn from the data, and the order of training.
        held_out: Tasks that are evaluated but neither fine-tuned on nor merged: out-of-domain.
        shared_heads: Groups of tasks with the same classes that share one head.
        pretraining_source: What a backbone without pretrained weights is pretrained on; None is nothing.
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
        return tuple(self.sources)

    def prepare_data(self) -> None:
        for name in (*self.names, *self.held_out):
            self.sources[name].prepare()
        if self.pretraining_source is not None:
            self.pretraining_source.prepare()

    @property
    def has_pretraining(self) -> bool:
        return self.pretraining_source is not None

    def pretraining(self) -> Task | None:
        source = self.pretraining_source
        return None if source is None else source.build("pretraining", self.seed)

    def build(self, name: str) -> Task:
        return self.sources[name].build(name, self.seed)

    def identity(self) -> dict[str, Any]:
        """The sources and the seed say all; a subclass's arguments are a shorter way to say the sources."""
        kind = type(self)
        sources = {name: source.identity() for name, source in self.sources.items()}
        arguments = {"seed": self.seed, "shared_heads": self.shared_heads, "sources": sources}
        if self.pretraining_source is not None:
            arguments["pretraining"] = self.pretraining_source.identity()
        return {"class": class_name(kind), "version": self.DATA_VERSION, "arguments": arguments}

    def task_identity(self, name: str) -> dict[str, Any]:
        """The task's own source, and the seed."""
        return {"source": self.sources[name].identity(), "task": name, "seed": self.seed}

    def pretraining_identity(self) -> dict[str, Any]:
        source = self.pretraining_source
        return {"source": None if source is None else source.identity(), "seed": self.seed}


class NpzSuite(SourceSuite):
    """A folder of NPZ files of images, one per task; the file's name is the task's. See `NpzSource`.

    Args:
        folder: the folder.
        tasks: Which tasks, in this order; None is all files, by name.
        image_size: height and width of what the model gets; None leaves images as they are.
        channels: 3 repeats grey images, 1 makes grey of colour; None leaves images as they are.
        mean: subtracted from pixels in [0, 1]: one number, or one per channel.
        std: what the difference is divided by.
        augment: for training batches, in order: transforms of `torchvision.transforms.v2`, classes of
            `freemerge.data.augment`, or callables of float32 (B, C, H, W) in [0, 1].
        train_size: take so many training samples of each task, drawn by the seed; None takes all.
        val_size: likewise for validation.
        test_size: likewise for test.
        batch_size: Images per training batch, of each task.
        eval_batch_size: Images per batch of validation, test and prediction.
        num_workers: Worker processes per loader. The data are in memory, so none is usually fastest.
        seed: Determines what is drawn from the data, and the order of training.
        held_out: Tasks that are evaluated but neither fine-tuned on nor merged: out-of-domain.
        shared_heads: Groups of tasks with the same classes that share one head.
        pretraining: What a backbone without pretrained weights is pretrained on: `pooled`, the training images of all
            files as one task with the classes of all, or another NPZ file's path; None is nothing.
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
        sources: dict[str, TaskSource] = {name: read(path=path) for name, path in files.items()}
        source: TaskSource | None = None
        if pretraining is not None:
            pooled = pretraining == "pooled"
            source = PooledSource(sources=sources) if pooled else read(path=pretraining)
        super().__init__(sources, tasks, batch_size, eval_batch_size, num_workers, seed, held_out, shared_heads, source)


class TextTableSuite(SourceSuite):
    """A folder of tables of texts, one per task; the file's name is the task's. See `TextTableSource`.

    Args:
        folder: the folder: .csv, .tsv, .jsonl (plain or .gz) and .parquet files; `<task>.classes.txt` names classes.
        tokenizer: hub id or folder of the model's tokenizer.
        tasks: Which tasks, in this order; None is all files, by name.
        text: the one or two columns of text; None takes all columns but those of label and split.
        label: the column of the label; null for plain texts of `causal_lm`.
        split: the column that says train, val or test.
        kind: what is asked: classification, regression, seq2seq or causal_lm.
        metrics: task → what it is judged by; the kind's default for those not named.
        max_length: texts are cut to so many tokens.
        max_target_length: targets of `seq2seq` are cut to so many tokens.
        train_size: take so many training samples of each task, drawn by the seed; None takes all.
        val_size: likewise for validation.
        test_size: likewise for test.
        batch_size: Texts per training batch, of each task.
        eval_batch_size: Texts per batch of validation, test and prediction.
        num_workers: Worker processes per loader. The data are in memory, so none is usually fastest.
        seed: Determines what is drawn from the data, and the order of training.
        held_out: Tasks that are evaluated but neither fine-tuned on nor merged: out-of-domain.
        shared_heads: Groups of tasks with the same classes that share one head.
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
        if unknown := set(metrics or {}) - set(files):
            raise ValueError(f"{folder}: metrics names {sorted(unknown)[0]!r}; tasks: {', '.join(files)}")
        sources: dict[str, TaskSource] = {
            name: read(path=path, metric=(metrics or {}).get(name)) for name, path in files.items()
        }
        super().__init__(sources, tasks, batch_size, eval_batch_size, num_workers, seed, held_out, shared_heads)


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
            raise ValueError(f"{folder}: two files for one task: {Path(found[name]).name} and {path.name}")
        found[name] = str(path)
    if not found:
        raise ValueError(f"{folder}: there is no {', '.join(suffixes)} file in it")
    return found
