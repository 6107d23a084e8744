"""The commands that need a suite of tasks, built on Lightning's CLI, whose flags all keep their meaning.

    python -m freemerge fit --config configs/quickstart.yaml

`fit` runs a suite's pipeline (`freemerge.pipeline`); `tune` searches for a merging method's parameters with the results
of `fit`; `validate`, `test` and `predict` run the finished FREE model.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import update_wrapper
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.markup import escape

# Short class names in configurations resolve once their modules are imported.
import freemerge.quickstart  # noqa: F401
import freemerge_callbacks  # noqa: F401
from freemerge.checkpoints import expand
from freemerge.cli import advise as advise_command
from freemerge.cli import help_cache
from freemerge.cli import merge as merge_command
from freemerge.cli.commands import ABOUT, COMMANDS, OF_CHECKPOINTS
from freemerge.cli.ending import raised_in
from freemerge.cli.options import command_help
from freemerge.cli.parsing import OneLineErrors
from freemerge.cli.printing import print_error
from freemerge.cli.problems import innermost
from freemerge.data import TaskSuite
from freemerge.evaluation import MultiTaskEvaluator, TaskMetric, write_predictions
from freemerge.models import FreeModel, has_builtin_backbone, instantiate_and_record
from freemerge.pipeline import (
    CheckError,
    ExpertsSettings,
    FinetuneSettings,
    MergeSettings,
    Others,
    PretrainSettings,
    RouterSettings,
    RunSettings,
    Settings,
    SuiteRun,
    TuneSettings,
    from_rank_zero,
)
from freemerge.runtime import own_process
from freemerge.runtime.process_group import in_process_group
from freemerge.training import FineTuner

_T = TypeVar("_T")
_DEV_FOLDER = "_FREEMERGE_DEV_FOLDER"
_STAGE_SETTINGS = {
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
    "merge": MergeSettings,
    "experts": ExpertsSettings,
    "router": RouterSettings,
    "tune": TuneSettings,
}


_COMMANDS = {name: about for name, about in COMMANDS.items() if name not in OF_CHECKPOINTS}
_EPILOG = """Every option can also be set in a YAML file for --config; the last value wins, in files and in options.
Files and options override environment variables: FREEMERGE_{command}__TRAINER__MAX_EPOCHS=3.
--print_config shows all settings; --model.help CLASS, --data.help CLASS, … show a class's settings."""


def _instantiate(class_type: type[_T], *args: Any, **kwargs: Any) -> _T:
    return class_type(*args, **kwargs)


class _Instantiator:
    """Makes objects of configured classes, and keeps the first error.

    Factories of optimizers hold it, and the strategy `ddp_spawn` pickles these, so it is not a local function.
    """

    def __init__(self, instantiate: Callable[..., Any], refusals: list[Exception]) -> None:
        update_wrapper(self, instantiate)  # jsonargparse reads its signature
        self.instantiate = instantiate
        self.refusals = refusals

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.instantiate(*args, **kwargs)
        except Exception as error:
            self.refusals.append(error)
            raise


class _Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors.

    Attributes:
        refusals: the errors that configured classes raised. If an option has several types, jsonargparse may report
            the error of another type instead of the first one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.refusals: list[Exception] = []
        super().__init__(*args, **kwargs)

    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register a function that makes objects of a class."""
        super().add_instantiator(_Instantiator(instantiator, self.refusals), *args, **kwargs)


class FreemergeCLI(LightningCLI):
    """Lightning's CLI whose `fit` runs a suite's pipeline.

    Args:
        args: the arguments; None for those of the process.
        caches_help: whether to cache the command's help and options, see `freemerge.cli.help_cache`.
    """

    def __init__(self, args: list[str] | None = None, caches_help: bool = False) -> None:
        self._arguments = list(sys.argv[1:] if args is None else args)
        self._caches_help = caches_help
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            FineTuner,
            TaskSuite,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # a run has many fits; `fit` saves the configuration once, in its folder
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={
                "prog": "python -m freemerge",
                "description": ABOUT,
                "parser_mode": "omegaconf+",
            },
            args=args,
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers = {}
        commands = parser.add_subcommands()
        asked = self._arguments[0] if self._arguments else None
        for name in (asked,) if asked in _COMMANDS else _COMMANDS:  # building a parser takes seconds
            about = _COMMANDS[name]
            subparser = self._prepare_subcommand_parser(
                self.trainer_class,
                name,
                usage=f"python -m freemerge {name} --config FILE [options]",
                description=about,
                epilog=_EPILOG.format(command=name.upper()),
            )
            self._subcommand_parsers[name] = subparser
            commands.add_subcommand(name, subparser, help=about)
        if asked in _COMMANDS:
            return
        # Only for `--help`: `main` runs these before a parser with models and data is built.
        for command in (merge_command, advise_command):
            name = command.__name__.rpartition(".")[2]
            commands.add_subcommand(name, command.build_parser(), help=COMMANDS[name])

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "tune":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(**kwargs)  # the Trainer has no method `tune`
        self._add_arguments(parser)
        self._subcommand_method_arguments[subcommand] = []
        return parser

    def _run_subcommand(self, subcommand: str) -> None:
        getattr(self, subcommand)(**self._prepare_subcommand_kwargs(subcommand))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's and the stages' settings."""
        parser.add_class_arguments(RunSettings, "run")
        for key, settings in _STAGE_SETTINGS.items():
            parser.add_class_arguments(settings, key)

    def before_instantiate_classes(self) -> None:
        """Let modules remember their class and arguments, so that a saved folder can record them."""
        self.parser.add_instantiator(instantiate_and_record, torch.nn.Module)
        self.parser.add_instantiator(_instantiate, object)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, without Lightning's warning when `main` is called from Python."""
        if self._caches_help:
            for command, each in self._subcommand_parsers.items():
                help_cache.store(command, command_help(each))
        assert isinstance(parser, _Parser)  # as `__init__` says to Lightning
        assert args is None or isinstance(args, list)  # likewise
        self.config = parser.parse_args(args)
        parser.check_environment(self.config.subcommand)

    def _parse_ckpt_path(self) -> None:
        """Warn if a checkpoint's hyperparameters differ; Lightning's own method would silently use them."""
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path:
            return
        if not expand(path).exists():
            keyword = "; an interrupted run resumes without this option" if path in ("last", "best", "hpc") else ""
            raise ValueError(f"--ckpt_path: there is no file or folder {path}{keyword}")
        if not expand(path).is_file():
            return
        saved = torch.load(expand(path), weights_only=True, map_location="cpu").get("hyper_parameters", {})
        configured = self.config[command].model.get("init_args", {})
        for name, value in saved.items():
            if name in configured and configured[name] != value and not hasattr(value, "keys"):
                rank_zero_warn(
                    f"{path}: was made with {name}={value!r}; using the configured value {configured[name]!r}"
                )

    def instantiate_classes(self) -> None:
        """Instantiate all classes except loggers: each fit makes its own, because copying a W&B logger starts a run."""
        trainer = self.config[self.config.subcommand].trainer
        configured = trainer.logger
        if self.config.subcommand in ("fit", "tune"):
            trainer.logger = False
        try:
            super().instantiate_classes()
        except ValueError as error:
            assert isinstance(self.parser, _Parser)  # as `__init__` says to Lightning
            if not self.parser.refusals or _origin(error) != "jsonargparse":
                raise
            raise ValueError(innermost(self.parser.refusals[0])) from error
        finally:
            trainer.logger = configured

    def _dump_config(self) -> None:
        """Describe the configuration for the modules' hyperparameters; Lightning's own method checks it once more."""
        if hasattr(self, "config_dump"):
            return
        text = self.parser.dump(
            self.config, skip_link_targets=False, skip_none=False, format="yaml", skip_validation=True
        )
        self.config_dump = yaml.safe_load(text)[self.config.subcommand]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Pass the Trainer a copy of the callbacks: Lightning adds its default callbacks to the list that it gets."""
        given = config.get("callbacks") or []
        own = list(given) if isinstance(given, list) else [given]
        return super()._instantiate_trainer({**config, "callbacks": own}, callbacks)

    # -- the subcommands ----------------------------------------------------------------------------------------------

    def fit(self, model: FineTuner, datamodule: TaskSuite, ckpt_path: str | None = None, **_: Any) -> None:
        """Run the suite's stages."""
        settings = self._get(self.config_init, "run")
        if self._started_from_outside:  # these ranks exist before the first fit and must wait for rank 0
            self.trainer.strategy.setup_environment()
        if self._is_dev_run:
            self._dev_run(model, datamodule, settings.stages)
            return
        path = expand(settings.folder) / "config.yaml"
        assert self.subcommand is not None  # it is `fit`
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False, skip_validation=True)
        text = f"# python -m freemerge fit --config {path}\n{text}"
        self._suite_run(model, datamodule, settings.folder, ckpt_path, text).run(settings.stages)

    @property
    def _is_dev_run(self) -> bool:
        """Whether this run is only a trial: Lightning's `fast_dev_run`."""
        trainers = [self._get(self.config_init, "trainer")]
        settings = [self._get(self.config_init, key) for key in _STAGE_SETTINGS]
        trainers += [each.trainer for each in settings if hasattr(each, "trainer")]
        return any(each.get("fast_dev_run") for each in trainers)

    def _dev_run(self, model: FineTuner, datamodule: TaskSuite, stages: list[str]) -> None:
        """Run the stages in a temporary folder, so that no finished run is changed."""
        rank_zero = getattr(rank_zero_only, "rank", 0) == 0
        # Processes that a fit launches run this command again, and must find rank 0's folder.
        folder = os.environ.get(_DEV_FOLDER) or (tempfile.mkdtemp(prefix="freemerge-") if rank_zero else None)
        folder = from_rank_zero(lambda: folder)
        os.environ[_DEV_FOLDER] = folder
        try:
            self._suite_run(model, datamodule, folder).run(stages)
        finally:
            del os.environ[_DEV_FOLDER]
            if rank_zero:
                shutil.rmtree(folder, ignore_errors=True)
        if rank_zero:
            print("fast_dev_run: every stage ran; nothing was saved, and the numbers are meaningless")

    def tune(self, model: FineTuner, datamodule: TaskSuite, **_: Any) -> None:
        """Search for a merging method's parameters, with one process for each device."""
        alone = self._started_from_outside or self._get(self.config_init, "tune").part == "search"
        commands = [
            [*self._arguments, "--tune.part", "search", "--trainer.strategy", "auto", "--trainer.num_nodes", "1",
             "--trainer.devices", "1" if isinstance(self.trainer.accelerator, CPUAccelerator) else f"[{device}]"]
            for device in self.trainer.device_ids[1:]
        ]  # fmt: skip
        self._suite_run(model, datamodule, self._get(self.config_init, "run").folder).tune(
            None if alone or not commands else Others(commands)
        )

    @property
    def _started_from_outside(self) -> bool:
        """Whether srun, torchrun or the like started a process for each device, so that Lightning will start none."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        if environment is None or isinstance(environment, LightningEnvironment):  # the default of `ddp`
            return False
        return environment.creates_processes_externally

    def _suite_run(
        self,
        model: FineTuner,
        suite: TaskSuite,
        folder: str,
        ckpt_path: str | None = None,
        config_text: str | None = None,
    ) -> SuiteRun:
        run = self._get(self.config_init, "run")
        settings = Settings(**{key: self._get(self.config_init, key) for key in _STAGE_SETTINGS})
        if self._is_dev_run:
            settings = replace(settings, pretrain=replace(settings.pretrain, cache=None))
        logger = Namespace(logger=self._get(self.config, "trainer").logger).clone().as_dict()["logger"]
        return SuiteRun(
            model,
            suite,
            folder,
            {
                **self._get(self.config_init, "trainer"),
                "logger": logger,
            },  # a description: each fit makes its own logger
            settings,
            trainer_class=self.trainer_class,
            seed=self._get(self.config, "seed_everything"),
            ckpt_path=ckpt_path,
            overwrite=run.overwrite,
            config_text=config_text,
            checkpoint_steps=run.checkpoint_steps,
            checkpoint_minutes=run.checkpoint_minutes,
        )

    def validate(self, model: FineTuner, datamodule: TaskSuite, ckpt_path: str | None = None, **_: Any) -> None:
        """Evaluate the FREE model on validation data."""
        self._evaluate("validate", model, datamodule, ckpt_path)

    def test(self, model: FineTuner, datamodule: TaskSuite, ckpt_path: str | None = None, **_: Any) -> None:
        """Evaluate the FREE model on test data."""
        self._evaluate("test", model, datamodule, ckpt_path)

    def _evaluate(self, verb: str, model: FineTuner, suite: TaskSuite, ckpt_path: str | None) -> None:
        evaluator = self._evaluator(model, suite, ckpt_path)
        getattr(self.trainer, verb)(evaluator, datamodule=suite, verbose=False)
        if self.trainer.is_global_zero:
            from rich.table import Table

            table = Table(title=f"{verb}, {'merged' if evaluator.oracle else 'routed'} (%)", title_justify="left")
            table.add_column("task")
            table.add_column("metric")
            table.add_column("score", justify="right")
            for task, value in evaluator.results.items():
                table.add_row(escape(task), evaluator.metrics.named[task].name, f"{100 * value:.1f}")
            Console().print(table)

    def predict(self, model: FineTuner, datamodule: TaskSuite, ckpt_path: str | None = None, **_: Any) -> None:
        """Run the FREE model, and write one row per sample: its file or row, its routed task, and its prediction."""
        evaluator = self._evaluator(model, datamodule, ckpt_path)
        predictions: Any = self.trainer.predict(evaluator, datamodule=datamodule)
        if getattr(self.trainer, "fast_dev_run", False):
            print("fast_dev_run: the predictions were computed; nothing was written")
            return
        per_loader = predictions if len(datamodule.names) > 1 else [predictions]
        path = expand(self._get(self.config_init, "run").folder) / f"predictions{self._rank_suffix()}.csv"
        tasks = {name: datamodule.task(name) for name in datamodule.names}
        by_task = dict(zip(datamodule.names, per_loader, strict=True))
        write_predictions(path, evaluator.model, tasks, by_task, self.trainer.global_rank, self.trainer.world_size)
        print(path)

    def _rank_suffix(self) -> str:
        return f"-rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""

    def _evaluator(self, model: FineTuner, suite: TaskSuite, ckpt_path: str | None) -> MultiTaskEvaluator:
        """The finished model: the folder in `--ckpt_path`, or the run's own."""
        folder = expand(ckpt_path) if ckpt_path else expand(self._get(self.config_init, "run").folder) / "free_model"
        suite.prepare_data()
        tasks = {name: suite.task(name) for name in suite.names}
        metrics = {name: TaskMetric.of(task) for name, task in tasks.items()}
        # The folder may not import custom classes; the configuration has instantiated them already.
        backbone = None if has_builtin_backbone(folder) else model.backbone
        heads = {name: model.make_head(task.num_outputs) for name, task in tasks.items()}
        loaded = FreeModel.from_pretrained(folder, backbone, heads=heads if model.makes_own_heads else None)
        return MultiTaskEvaluator(loaded, suite.names, metrics=metrics)


_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""Errors caused by a path or its file system, not by a bug."""


def quieten() -> None:
    """Silence Lightning's repeated messages in a run of many fits; relevant warnings are kept."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    harmless = (
        "was deprecated in v4.49.0",  # jsonargparse's instantiate_classes, which LightningCLI calls
        "does not have many workers",
        "Checkpoint directory .* exists",
        "is smaller than the logging",
        "`tensorboardX` has been removed",
        "in eval mode at the start of training",  # ExpertTrainer keeps its frozen backbone in eval mode on purpose
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # raised inside Lightning with torch ≥ 2.10
    )
    for message in harmless:
        warnings.filterwarnings("ignore", message=f".*{message}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(args: list[str], caches_help: bool = False) -> int:
    """Run one of the commands; returns the exit code.

    Args:
        args: the arguments.
        caches_help: see `FreemergeCLI`.
    """
    quieten()
    own_process()
    guest = in_process_group()
    try:
        FreemergeCLI(args, caches_help)
    except CheckError as error:
        for fault in error.faults:
            print_error(fault)
        return 2
    except (ValueError, MisconfigurationException) as error:
        origin = _origin(error)
        if origin not in ("freemerge", "freemerge_callbacks", "lightning", "jsonargparse"):
            raise  # not raised by these packages, so the user needs the traceback
        print_error(innermost(error) if origin == "jsonargparse" else error)
        return 2
    except OSError as error:
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        print_error(f"{error.filename}: cannot be read or written ({error.strerror})")
        return 2
    except KeyboardInterrupt as interrupt:
        rest = f": {interrupt}; the same command continues from there" if str(interrupt) else ""
        print(f"interrupted{rest}", file=sys.stderr)
        return 130
    finally:
        # Lightning leaves gloo's threads running; they abort the process if they free a tensor while it exits.
        if in_process_group() and not guest:
            torch.distributed.destroy_process_group()
    return 0


def _origin(error: Exception) -> str:
    """The package that raised an error."""
    return raised_in(error).partition(".")[0]
