"""Loggers: each fit is a run of its own, named after the fit."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

LoggerSpec = bool | str | Mapping[str, Any] | Logger | Callable[[str], Logger] | None
"""The specification of a logger, see `make_loggers`."""

LoggerSpecs = LoggerSpec | list[LoggerSpec] | tuple[LoggerSpec, ...]
"""The specification of one or several loggers."""

_NAMES = ("run_name", "name")  # the arguments for a run's name; MLFlowLogger has both


def make_loggers(spec: LoggerSpecs, folder: Path, name: str) -> bool | list[Logger]:
    """Make the loggers of one fit.

    Args:
        spec: None or True for a CSVLogger in the fit's folder; False for no logger; `class_path` and `init_args` as in
            Lightning's configurations; a function from the fit's name to its logger; a logger, which is copied for each
            fit; or a list of these.
        folder: the fit's folder.
        name: the fit's name, such as `finetune/birds`. If the configuration names the run, it is appended to that name
            after a slash.

    Returns:
        The loggers; False if there are none.

    Raises:
        ValueError: a configuration names no logger, or has wrong arguments.
    """
    if spec is False:
        return False
    specs = spec if isinstance(spec, (list, tuple)) else [spec]
    return [_make(each, folder, name) for each in specs if each is not False]


def has_logger(spec: LoggerSpecs) -> bool:
    """Whether a fit with this specification of loggers has any."""
    return any(each is not False for each in spec) if isinstance(spec, (list, tuple)) else spec is not False


def check_loggers(where: str, spec: LoggerSpecs) -> None:
    """Check the configuration of loggers without making one.

    Args:
        where: the configuration key, for the message.
        spec: the specification, see `make_loggers`.

    Raises:
        ValueError: the configuration is wrong; the message begins with `where`.
    """
    for each in spec if isinstance(spec, (list, tuple)) else [spec]:
        if isinstance(each, (str, Mapping)):
            try:
                _read(each)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def _make(spec: LoggerSpec, folder: Path, name: str) -> Logger:
    if spec is None or isinstance(spec, bool):  # `make_loggers` leaves out False
        return CSVLogger(folder, name="logs")  # a resumed fit gets a version of its own
    if isinstance(spec, (str, Mapping)):
        config, kind = _read(spec)
        parameters = inspect.signature(kind).parameters
        called = next((each for each in _NAMES if each in parameters), None)
        if called is not None:
            given = config.logger.init_args.get(called)
            is_default = given is None or given == parameters[called].default
            config.logger.init_args[called] = name if is_default else f"{given}/{name}"
        parser = _parser()
        # `instantiate` is the method's name since jsonargparse 4.49; the older one is deprecated.
        return getattr(parser, "instantiate", parser.instantiate_classes)(config).logger
    return copy.deepcopy(spec) if isinstance(spec, Logger) else spec(name)


def _read(spec: str | Mapping[str, Any]) -> tuple[Any, type[Logger]]:
    """The parsed configuration of a logger, and its class."""
    try:
        config = _parser().parse_object({"logger": dict(spec) if isinstance(spec, Mapping) else spec})
    except ArgumentError as error:
        raise ValueError(f"no logger of Lightning's: {' '.join(str(error).split())}") from error
    module, _, name = config.logger.class_path.rpartition(".")
    return config, getattr(sys.modules[module], name)


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--logger", type=Logger)
    return parser


class LogConfiguration(Callback):
    """Logs the configuration that a fit depends on, in addition to the hyperparameters of its module.

    Args:
        configuration: the configuration, as plain data.
    """

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.configuration = dict(configuration)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.configuration)


def active_wandb_run() -> Any:
    """The active W&B run of this process, whoever started it; None if there is none."""
    return getattr(sys.modules.get("wandb"), "run", None)


def end_wandb_run(before: Any) -> None:
    """End the W&B run that a fit started; otherwise the next fit would continue it.

    Args:
        before: the result of `active_wandb_run` before the fit.
    """
    now = active_wandb_run()
    if now is not None and now is not before:
        now.finish()
