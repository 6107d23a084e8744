"""The settings of a run's stages: one dataclass and one configuration key for each stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from freemerge.experts import Encoding, Expert, extract, extract_low_rank, kind_of
from freemerge.merging import FRMerging, MergeMethod, PCBMerging, TaskArithmetic, Ties, WeightAverage, has_scale
from freemerge.pipeline.trainer_arguments import TrainerArguments, check_trainer
from freemerge.training import Schedule, check_mixup
from freemerge.tuning import Range, Sampler

Stage = Literal["pretrain", "finetune", "merge", "experts", "router", "evaluate"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune", "merge", "experts", "router", "evaluate")


@dataclass
class FitSettings:
    """Settings of every stage that fits a model.

    Args:
        trainer: Trainer arguments for this stage, which override those of `trainer`.
        batch_size: training batch size; by default the suite's.
        optimizer: function that makes the optimizer; by default AdamW.
        schedule: how the learning rate falls after warm-up.
        warmup: fraction of the steps over which the learning rate rises.
    """

    trainer: TrainerArguments = field(default_factory=dict)
    batch_size: int | None = None
    optimizer: OptimizerCallable | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_trainer(type(self).__name__.removesuffix("Settings").lower(), self.trainer)

    @property
    def optimization(self) -> dict[str, Any]:
        """The optimizer arguments that all training modules share."""
        return {"optimizer": self.optimizer, "schedule": self.schedule, "warmup": self.warmup}


@dataclass
class PretrainSettings(FitSettings):
    """The stage that pretrains the backbone on the suite's own pretraining data; skipped by suites that have none.

    Args:
        cache: folder of pretrained backbones, keyed by the hash of their settings and data, which other runs reuse.
    """

    cache: str | None = None


@dataclass
class FinetuneSettings:
    """The stage that fine-tunes the base on each task. Configured by `model` and `trainer`.

    Args:
        trainer: Trainer arguments for this stage, which override those of `trainer`.
        weights: the weights of the task vector: those at the end of the fit (`last`), or those with the best val/acc.
        models: task → its finished fine-tuned model, which is taken instead of a fit: a checkpoint, an adapter, or a
            model's name on the Hub, as `merge` takes them. Only the head is made here, from the base. Models of tasks
            that the suite has, but that are not selected, are left alone.
        exclude: patterns of tensors that these models lack, or that are heads; the base's are used.
    """

    trainer: TrainerArguments = field(default_factory=dict)
    weights: Literal["last", "best"] = "last"
    models: dict[str, str] = field(default_factory=dict)
    exclude: list[str] | None = None

    def __post_init__(self) -> None:
        check_trainer("finetune", self.trainer)


def default_methods() -> dict[str, MergeMethod]:
    """The default methods: row of the report → merging method."""
    return {
        "average": WeightAverage(),
        "task arithmetic": TaskArithmetic(),
        "TIES": Ties(),
        "PCB": PCBMerging(),
        "FR": FRMerging(),
    }


@dataclass
class MergeSettings:
    """The stage that merges the task vectors with every method, each at its best scale on validation data.

    Args:
        methods: row of the report → merging method; if not given, plain averaging, task arithmetic, TIES, PCB and FR.
        scales: the grid of scales, the same for every method that has one. Of a method with a scale for each task, what
            each of them is multiplied by. Null: each method at the scale that it is configured with, without a search.
        free: the method whose merged backbone carries the experts.
        batch_norm_batches: batches of all tasks' training data on which a merged backbone's batch norm, if it has any,
            is measured again; 0 keeps the merged statistics.
        statistics_samples: training samples of each task on which methods with `statistics: collect` (RegMean,
            FisherMerging) are measured.
    """

    methods: dict[str, MergeMethod] | None = None
    scales: list[float] | None = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0])
    free: str = "FR"
    batch_norm_batches: int = 50
    statistics_samples: int = 256

    def __post_init__(self) -> None:
        if self.methods is None:  # not a default factory: a configuration file cannot show instances
            self.methods = self.lines
        if self.batch_norm_batches < 0:
            raise ValueError(f"merge.batch_norm_batches: must be at least 0, got {self.batch_norm_batches}")
        if self.statistics_samples < 1:
            raise ValueError(f"merge.statistics_samples: must be at least 1, got {self.statistics_samples}")
        if self.scales is not None and not self.scales:
            raise ValueError("merge.scales: give at least one scale, or null for those of the methods")
        if self.free not in self.lines:
            raise ValueError(f"merge.free: there is no method {self.free!r}; methods: {', '.join(self.lines)}")

    @property
    def lines(self) -> dict[str, MergeMethod]:
        """Row of the report → method: the configured methods, or the default ones."""
        return default_methods() if self.methods is None else self.methods

    def scales_of(self, method: MergeMethod) -> list[float]:
        """The scales at which to try a method, as `rescaled` takes them; 1 for a method that has none."""
        if not has_scale(method):
            return [1.0]
        if self.scales is not None:
            return self.scales
        own: float | list[float] = getattr(method, "scale", 1.0)
        return [1.0] if isinstance(own, (list, tuple)) else [own]


@dataclass
class ExpertsSettings(FitSettings):
    """The stage that extracts each task's expert from the residual, then trains it against the fine-tuned teacher.

    Args:
        kind: `sparse` experts hold the largest entries of the residual, `low_rank` ones its leading directions. The
            import path of a class of your own, derived from `freemerge.experts.Expert`, is a kind too: its `extract`
            receives those of `density`, `scope`, `vectors` and `rescale` that it has parameters for.
        arguments: further arguments of the class's `extract`.
        density: fraction d of the backbone's parameters that an expert holds as values.
        scope: where a sparse expert's entries are ranked: over the whole model, in each tensor, or in each row.
        vectors: norms and biases are `ranked` like all others, kept `whole` as far as half the density goes, or left
            out (`none`).
        rescale: `none`, or `released` for the released code's rescaling of a sparse expert's extracted values.
        values: how files store values: `int8` or `int4` with a scale per tensor, `bf16` or `float32`; training
            takes the rounding to `int4` into account.
        feature_weight: weight of the features' loss.
        feature_loss: `mse` or `cosine`.
        logit_weight: weight of the logits' loss.
        temperature: temperature of the softened logits.
        cache_teacher: compute the teacher's features of each input once and keep them: for data without augmentation.
        mixup: largest fraction of another input that is blended into each, for teacher and student alike; for images,
            and not with `cache_teacher`. It helps with few training data, if there are more epochs.
    """

    kind: Literal["sparse", "low_rank"] | type[Expert] = "sparse"
    arguments: dict[str, Any] = field(default_factory=dict)
    density: float = 0.01
    scope: Literal["model", "tensor", "row"] = "model"
    vectors: Literal["whole", "ranked", "none"] = "ranked"
    rescale: Literal["none", "released"] = "none"
    values: Encoding = "int8"
    feature_weight: float = 1.0
    feature_loss: Literal["mse", "cosine"] = "mse"
    logit_weight: float = 1.0
    temperature: float = 2.0
    cache_teacher: bool = False
    mixup: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mixup(self.mixup, self.cache_teacher)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"experts.density: must be in (0, 1], got {self.density}")
        self._check_kind()

    def cut(self, residual: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Expert:
        """Extract an expert of this kind and size, before training.

        Args:
            residual: the task's weights minus those of the merged backbone, by name.
            metadata: text to store with the expert.

        Returns:
            The expert.
        """
        return self._extraction(residual, **self.extraction).tagged(**(metadata or {}))

    @property
    def extraction(self) -> dict[str, Any]:
        """The keyword arguments of the extraction."""
        given = {name: getattr(self, name) for name in ("density", "scope", "vectors", "rescale")}
        known = inspect.signature(self._extraction).parameters
        return {name: value for name, value in given.items() if name in known} | self.arguments

    @property
    def _extraction(self) -> Callable[..., Expert]:
        """The function that extracts an expert of this kind."""
        named: dict[str, Callable[..., Expert]] = {"sparse": extract, "low_rank": extract_low_rank}
        return named[self.kind] if isinstance(self.kind, str) else self.kind.extract

    def _check_kind(self) -> None:
        """Raise a ValueError if files cannot name the class, or if its `extract` does not take the arguments."""
        if not isinstance(self.kind, str):
            try:
                kind_of(self.kind)
            except ValueError as error:
                raise ValueError(f"experts.kind: {error}") from error
            if self.kind.extract.__func__ is Expert.extract.__func__:  # type: ignore[attr-defined]
                raise ValueError(f"experts.kind: {self.kind.__qualname__} has no class method `extract`; add one")
        try:
            inspect.signature(self._extraction).bind({}, **self.extraction)
        except TypeError as error:
            name = self.kind if isinstance(self.kind, str) else self.kind.__qualname__
            raise ValueError(f"experts.arguments: extracting a {name} expert: {error}") from error

    @property
    def training(self) -> dict[str, Any]:
        """The arguments of `ExpertTrainer` except models and data."""
        names = ("feature_weight", "logit_weight", "temperature", "feature_loss", "cache_teacher", "mixup")
        return self.optimization | {name: getattr(self, name) for name in names} | {"encoding": self.values}


@dataclass
class RouterSettings(FitSettings):
    """The stage that trains the router on a balanced mixture of all tasks.

    Args:
        kind: `conv` is a small network on images; `early` uses features from an early point of the merged backbone, for
            any inputs.
        width: channels of a `conv` router's first convolution.
        point: the submodule of the backbone's model whose output an `early` router uses.
        hidden: width of the router's hidden layer; 0 makes it linear.
        directions: number of leading directions of the router's features that the out-of-distribution score uses; 0
            disables the score.
        fraction: fraction of the validation samples that must be routed. It sets the confidence and the
            out-of-distribution score below which an input gets the plain merged backbone; 1 routes everything.
        top_n: number of the most likely tasks whose experts are mixed.
        share: former name of `fraction`, for old configurations.
    """

    kind: Literal["conv", "early"] = "conv"
    width: int = 16
    point: str = "embeddings"
    hidden: int = 64
    directions: int = 16
    fraction: float = 0.99
    top_n: int = 1
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None:
            self.fraction, self.share = self.share, None
        for name, least in (("width", 1), ("hidden", 0), ("directions", 0), ("top_n", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"router.{name}: must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"router.fraction: must be in (0, 1], got {self.fraction}")

    @property
    def judging(self) -> dict[str, int]:
        """The arguments that every kind of router takes."""
        return {"hidden": self.hidden, "directions": self.directions}


@dataclass
class TuneSettings:
    """The command `tune`: a search for one method's parameters on validation data.

    Args:
        line: the name in `merge.methods` of the method to tune; by default `merge.free`.
        method: a method to tune instead, with the initial values of the search.
        space: parameter (`scale`, `ratio`, `filter.cutoff`, …) → its range; by default λ of each task.
        trials: total number of points to try; a later command with a larger number continues the search.
        seconds: time limit of one command; a trial that has begun is finished.
        sampler: `cmaes`, the evolutionary search of PCB-Merging, or Optuna's `tpe`, or `random`.
        goal: the mean accuracy over the tasks (`mean`), the mean of accuracy ÷ individual accuracy (`normalized`), or
            the lowest such ratio (`worst`).
        models: another run's folder, whose fine-tuned models are used instead of this run's own.
        part: `search` only joins the search of another process, which finishes it.
    """

    line: str | None = None
    method: MergeMethod | None = None
    space: dict[str, Range] | None = None
    trials: int = 100
    seconds: float | None = None
    sampler: Sampler = "cmaes"
    goal: Literal["mean", "normalized", "worst"] = "mean"
    models: str | None = None
    part: Literal["all", "search"] = "all"

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"tune.trials: must be at least 1, got {self.trials}")
        if self.line is not None and self.method is not None:
            raise ValueError("tune: give either a line of merge.methods or a method, not both")


@dataclass
class RunSettings:
    """The run's folder, its stages, and how often it writes checkpoints.

    Args:
        folder: the run's folder; a second run with the same configuration continues there.
        stages: the stages to run, out of pretrain, finetune, merge, experts, router, evaluate.
        overwrite: replace results that were made with other settings or from other files; otherwise they are an error
            that names the stages and the differences.
        checkpoint_steps: write the checkpoint for resuming every so many steps, in addition to once per epoch.
        checkpoint_minutes: also write it whenever so many minutes have passed; null turns this off.
    """

    folder: str = "runs/freemerge"
    stages: list[Stage] = field(default_factory=lambda: list(STAGES))
    overwrite: bool = False
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = 5.0

    def __post_init__(self) -> None:
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise ValueError(f"run.checkpoint_steps: must be at least 1, got {self.checkpoint_steps}")
        if self.checkpoint_minutes is not None and self.checkpoint_minutes < 0:
            raise ValueError(f"run.checkpoint_minutes: must be at least 0, got {self.checkpoint_minutes}")


@dataclass
class Settings:
    """All stages' settings."""

    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    experts: ExpertsSettings = field(default_factory=ExpertsSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    tune: TuneSettings = field(default_factory=TuneSettings)
