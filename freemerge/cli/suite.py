"""The commands that need a suite of tasks, on Lightning's CLI, all of whose flags keep their meaning.

    python -m freemerge fit --config configs/quickstart.yaml

`fit` runs a suite's pipeline (`freemerge.pipeline`), `tune` searches for a merging method's parameters on what `fit`
left behind; `validate`, `test` and `predict` run the finished FREE model.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
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
from freemerge.cli import merge as merge_command
from freemerge.cli.commands import ABOUT, COMMANDS
from freemerge.cli.ending import raised_in
from freemerge.cli.parsing import OneLineErrors, said_by
from freemerge.cli.printing import print_error
from freemerge.cli.problems import refusal
from freemerge.cli.remembered import remember
from freemerge.data import TaskSuite
from freemerge.evaluation import MultiTaskEvaluator, TaskMetric, write_predictions
from freemerge.models import FreeModel, make_and_remember, names_own_backbone
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

_DEV_FOLDER = "_FREEMERGE_DEV_FOLDER"
_STAGE_SETTINGS = {
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
    "merge": MergeSettings,
    "experts": ExpertsSettings,
    "router": RouterSettings,
    "tune": TuneSettings,
}


_COMMANDS = {name: about for name, about in COMMANDS.items() if name != "merge"}
_EPILOG = """Every option may also stand in a YAML file for --config; files layer, and later ones and options win.
Environment variables count below files and options: FREEMERGE_{command}__TRAINER__MAX_EPOCHS=3.
--print_config shows all settings; --model.help CLASS, --data.help CLASS, … explain a class's own."""


class _Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class FreemergeCLI(LightningCLI):
    """Lightning's CLI with a suite's pipeline behind `fit`.

    Args:
        args: the arguments; those of the process if None.
        remembers: keep what the command's parser says, for `--help` without it.
    """

    def __init__(self, args: list[str] | None = None, remembers: bool = False) -> None:
        self._arguments = list(sys.argv[1:] if args is None else args)
        self._remembers = remembers
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            FineTuner,
            TaskSuite,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # one run is many fits: `fit` keeps the configuration once, in the run's folder
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
        for name in (asked,) if asked in _COMMANDS else _COMMANDS:  # a parser of everything takes its time to build
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
        # For `--help` alone: `main` hands `merge` on before a parser with models and data is built.
        commands.add_subcommand("merge", merge_command.build_parser(), help=COMMANDS["merge"])

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "tune":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(**kwargs)  # no method of the Trainer's stands behind it
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
        """Let modules remember what the configuration made them of, so that a folder can say it."""
        self.parser.add_instantiator(make_and_remember, torch.nn.Module)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike Lightning's own, without a warning where `main` is called with arguments from Python."""
        if self._remembers:
            for command, each in self._subcommand_parsers.items():
                remember(command, said_by(each))
        assert isinstance(parser, _Parser)  # as `__init__` says to Lightning
        assert args is None or isinstance(args, list)  # likewise
        self.config = parser.parse_args(args)
        parser.check_environment(self.config.subcommand)

    def _parse_ckpt_path(self) -> None:
        """Say where a checkpoint's hyperparameters differ; Lightning's own would let them win, without a word."""
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path:
            return
        if not expand(path).exists():
            keyword = "; an interrupted run goes on by itself" if path in ("last", "best", "hpc") else ""
            raise ValueError(f"--ckpt_path: there is no file or folder {path}{keyword}")
        if not expand(path).is_file():
            return
        saved = torch.load(expand(path), weights_only=True, map_location="cpu").get("hyper_parameters", {})
        configured = self.config[command].model.get("init_args", {})
        for name, value in saved.items():
            if name in configured and configured[name] != value and not hasattr(value, "keys"):
                rank_zero_warn(
                    f"{path}: was made with {name}={value!r}, the configuration says {configured[name]!r}, which counts"
                )

    def instantiate_classes(self) -> None:
        """Make everything but the loggers of fits, which each fit makes: a mere copy of one of W&B's begins a run."""
        trainer = self.config[self.config.subcommand].trainer
        configured = trainer.logger
        if self.config.subcommand in ("fit", "tune"):
            trainer.logger = False
        try:
            super().instantiate_classes()
        finally:
            trainer.logger = configured

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Lightning's own Trainer puts its default callbacks into the list that it is given: not into the fits'."""
        given = config.get("callbacks") or []
        own = list(given) if isinstance(given, list) else [given]
        return super()._instantiate_trainer({**config, "callbacks": own}, callbacks)

    # -- what the subcommands do --------------------------------------------------------------------------------------

    def fit(self, model: FineTuner, datamodule: TaskSuite, ckpt_path: str | None = None, **_: Any) -> None:
        """Run the suite's stages."""
        settings = self._get(self.config_init, "run")
        if self._started_from_outside:  # these ranks are there before the first fit, and must not run ahead of rank 0
            self.trainer.strategy.setup_environment()
        if self._is_dev_run:
            self._dev_run(model, datamodule, settings.stages)
            return
        path = expand(settings.folder) / "config.yaml"
        assert self.subcommand is not None  # it is `fit`
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        text = f"# python -m freemerge fit --config {path}\n{text}"
        self._suite_run(model, datamodule, settings.folder, ckpt_path, text).run(settings.stages)

    @property
    def _is_dev_run(self) -> bool:
        """Whether this is to try out whether everything runs, and no more: Lightning's `fast_dev_run`."""
        trainers = [self._get(self.config_init, "trainer")]
        settings = [self._get(self.config_init, key) for key in _STAGE_SETTINGS]
        trainers += [each.trainer for each in settings if hasattr(each, "trainer")]
        return any(each.get("fast_dev_run") for each in trainers)

    def _dev_run(self, model: FineTuner, datamodule: TaskSuite, stages: list[str]) -> None:
        """Run the stages in a folder that is removed at the end, so that no finished run is touched."""
        rank_zero = getattr(rank_zero_only, "rank", 0) == 0
        # Processes that a fit launches run this command anew, and have to find rank 0's folder.
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
            print("fast_dev_run: all of it ran; nothing is kept, and the numbers mean nothing")

    def tune(self, model: FineTuner, datamodule: TaskSuite, **_: Any) -> None:
        """Search for a merging method's parameters; on several devices, with a process for each."""
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
        if environment is None or isinstance(environment, LightningEnvironment):  # which `ddp` itself starts with
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
            {**self._get(self.config_init, "trainer"), "logger": logger},  # which is made anew for each fit
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
        """Run the FREE model; write one line per sample: its file or row, its routed task, and what is said of it."""
        evaluator = self._evaluator(model, datamodule, ckpt_path)
        predictions: Any = self.trainer.predict(evaluator, datamodule=datamodule)
        if getattr(self.trainer, "fast_dev_run", False):
            print("fast_dev_run: the predictions were made; nothing is written")
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
        # The folder may not import classes of the user's own; the configuration has built them already.
        backbone = None if names_own_backbone(folder) else model.backbone
        heads = {name: model.make_head(task.num_outputs) for name, task in tasks.items()}
        loaded = FreeModel.from_pretrained(folder, backbone, heads=heads if model.makes_own_heads else None)
        return MultiTaskEvaluator(loaded, suite.names, metrics=metrics)


_OF_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""Errors that say something of a file's place, and nothing of who asked for it."""


def quieten() -> None:
    """Keep Lightning's per-Trainer chatter out of a run of many fits; warnings that matter stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    harmless = (
        "does not have many workers",
        "Checkpoint directory .* exists",
        "is smaller than the logging",
        "`tensorboardX` has been removed",
        "in eval mode at the start of training",  # ExpertTrainer keeps its frozen backbone there on purpose
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own affair with torch ≥ 2.10
    )
    for message in harmless:
        warnings.filterwarnings("ignore", message=f".*{message}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(args: list[str], remembers: bool = False) -> int:
    """Run one of the commands; returns the exit code.

    Args:
        args: the arguments.
        remembers: see `FreemergeCLI`.
    """
    quieten()
    own_process()
    guest = in_process_group()
    try:
        FreemergeCLI(args, remembers)
    except CheckError as error:
        for fault in error.faults:
            print_error(fault)
        return 2
    except (ValueError, MisconfigurationException) as error:
        origin = _origin(error)
        if origin not in ("freemerge", "freemerge_callbacks", "lightning", "jsonargparse"):
            raise  # somebody else's: the traceback will be needed
        print_error(refusal(str(error)) if origin == "jsonargparse" else error)
        return 2
    except OSError as error:
        if error.errno not in _OF_PLACES or error.filename is None:
            raise
        print_error(f"{error.filename}: cannot be read or written ({error.strerror})")
        return 2
    except KeyboardInterrupt as interrupt:
        rest = f": {interrupt}; the same command goes on from there" if str(interrupt) else ""
        print(f"interrupted{rest}", file=sys.stderr)
        return 130
    finally:
        # Lightning leaves gloo's threads to the end of the process, which they abort if they still free a tensor then.
        if in_process_group() and not guest:
            torch.distributed.destroy_process_group()
    return 0


def _origin(error: Exception) -> str:
    """The package that raised an error."""
    return raised_in(error).partition(".")[0]
