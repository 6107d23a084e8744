"""Loggers with a run for each fit, named after it."""

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
"""A logger as `make_loggers` takes it."""

LoggerSpecs = LoggerSpec | list[LoggerSpec] | tuple[LoggerSpec, ...]
"""One, or several."""

_NAMES = ("run_name", "name")  # what loggers call the argument for a run's name; MLFlowLogger has both


def make_loggers(spec: LoggerSpecs, folder: Path, name: str) -> bool | list[Logger]:
    """The loggers of one fit.

    Args:
        spec: None or True for a CSVLogger in the fit's folder; False for no logger; `class_path` and `init_args` of one
            as in Lightning's configurations; a function from a fit's name to its logger; a logger, of which each fit
            gets a copy as it is; or a list of these.
        folder: the fit's folder.
        name: the fit's name, such as `finetune/birds`. Where a configuration names the run, this comes behind a slash.

    Raises:
        ValueError: there is no such logger.
    """
    if spec is False:
        return False
    specs = spec if isinstance(spec, (list, tuple)) else [spec]
    return [_make(each, folder, name) for each in specs if each is not False]


def has_logger(spec: LoggerSpecs) -> bool:
    """Whether a fit with this specification of loggers has any."""
    return any(each is not False for each in spec) if isinstance(spec, (list, tuple)) else spec is not False


def check_loggers(where: str, spec: LoggerSpecs) -> None:
    """Raise a ValueError that begins with `where` if a configuration of loggers is wrong; none is made."""
    for each in spec if isinstance(spec, (list, tuple)) else [spec]:
        if isinstance(each, (str, Mapping)):
            try:
                _read(each)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def _make(spec: LoggerSpec, folder: Path, name: str) -> Logger:
    if spec is None or isinstance(spec, bool):  # True: whoever wants none has been left out
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
        # Its name since jsonargparse 4.49; the older one is deprecated.
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
    """Tells a fit's loggers what the fit depends on, beside the hyperparameters of its module.

    Args:
        configuration: plain data.
    """

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.configuration = dict(configuration)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.configuration)


def running_elsewhere() -> Any:
    """The run of W&B that is under way in this process, whoever began it; None if there is none."""
    return getattr(sys.modules.get("wandb"), "run", None)


def end_run(before: Any) -> None:
    """End the run of W&B that a fit began, as the next fit would go on in it.

    Args:
        before: what `running_elsewhere` said before the fit.
    """
    now = running_elsewhere()
    if now is not None and now is not before:
        now.finish()
