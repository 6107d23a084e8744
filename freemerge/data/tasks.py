"""A task: the only form in which the packages above `freemerge.data` see data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.utils.data import Dataset

Kind = Literal["classification", "regression", "seq2seq", "causal_lm"]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro", "matthews", "recall@k"),
    "regression": ("pearson", "spearman"),
    "seq2seq": ("exact_match", "perplexity"),
    "causal_lm": ("perplexity", "exact_match"),
}
"""Kind of task → the metrics that suit it; the first is the default. In recall@k, k is any positive number."""


@dataclass(frozen=True)
class Task:
    """One task: a name, a kind, and three datasets of (inputs, label).

    Inputs are a tensor (…) or a dict of tensors. A label is an int64 scalar for classification, a float32 scalar for
    regression, and int64 tokens (L,) for the two kinds of language modelling, with −100 at positions without a loss.
    For `seq2seq` the labels are the target's tokens, which the inputs contain as `labels` too, for the decoder. For
    `causal_lm` they are the input tokens at the same positions (the loss shifts them by one); the inputs' `prompt_mask`
    is 1 at the tokens before the answer, which are all that a router reads.

    Args:
        name: the task's name in configurations and reports.
        class_names: one name per class; a label is an index into it. Empty unless the task is a classification.
        train: dataset of (inputs, label).
        val: dataset for choosing hyperparameters.
        test: dataset for the final number only; it shares no sample with `train` and `val`.
        kind: `classification`, `regression`, `seq2seq` or `causal_lm`.
        metric: the task's metric; None takes the kind's default: accuracy, pearson, exact_match or perplexity.
        templates: prompts with one `{}` each, which a zero-shot head fills with class names.
        tokenizer: hub id or folder of the tokenizer that made the inputs; it decodes a language model's predictions.

    Raises:
        ValueError: if the parts do not fit together.
    """

    name: str
    class_names: tuple[str, ...]
    train: Dataset
    val: Dataset
    test: Dataset
    kind: Kind = "classification"
    metric: str | None = None
    templates: tuple[str, ...] = field(default=())
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_kind(f"task {self.name!r}", self.kind, self.metric)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "templates", tuple(self.templates))
        object.__setattr__(self, "metric", self.metric or METRICS[self.kind][0])
        if (self.kind == "classification") != bool(self.class_names):
            found = f"{len(self.class_names)} class names" if self.class_names else "no class names"
            raise ValueError(f"task {self.name!r}: a {self.kind} task with {found}")
        check_templates(f"task {self.name!r}", self.templates)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 unless the task is a classification."""
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """A head's outputs per sample: the number of classes, 1 for regression, 0 if the model has its own head."""
        return 1 if self.kind == "regression" else self.num_classes


def check_templates(where: str, templates: Sequence[str]) -> None:
    """Raise a ValueError if a prompt has not exactly one place for a class's name."""
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{where}: a template needs exactly one {{}}, got {template!r}")


def check_kind(where: str, kind: str, metric: str | None) -> None:
    """Check a kind of task and its metric.

    Args:
        where: the beginning of error messages.
        kind: the kind of task.
        metric: the metric; None is always valid.

    Raises:
        ValueError: if there is no such kind, or the metric does not suit it.
    """
    if kind not in METRICS:
        raise ValueError(f"{where}: kind must be one of {', '.join(METRICS)}, got {kind!r}")
    if metric is None or metric in METRICS[kind]:
        return
    if "recall@k" in METRICS[kind] and metric.startswith("recall@") and metric[7:].isdigit() and int(metric[7:]) > 0:
        return
    near = difflib.get_close_matches(metric, METRICS[kind], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{where}: metric {metric!r} does not suit {kind}; choose {', '.join(METRICS[kind])}{hint}")
