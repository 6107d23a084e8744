"""The options of a parser: their keys, their types, and what a command line, files and the environment set them to."""

from __future__ import annotations

import os
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from freemerge.cli.help_cache import CommandHelp
from freemerge.cli.yaml_text import read_configuration

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""The keys that describe a configured class."""


def options(parser: ArgumentParser) -> list[str]:
    """The keys of the options of a parser and its subcommands, such as `trainer.max_epochs`, and of their groups."""
    keys: dict[str, None] = {}
    for each in (parser, *subcommands(parser).values()):
        for dest in _actions(each):
            keys |= dict.fromkeys((dest.partition(".")[0], dest))
    return list(keys)


def command_help(parser: ArgumentParser) -> CommandHelp:
    """The help and the options of a parser without subcommands."""
    names = {name.strip("-+") for action in parser._actions for name in action.option_strings}
    return CommandHelp(parser.format_help(), options(parser), sorted(names))


def types(parser: ArgumentParser) -> dict[str, Any]:
    """Key → type annotation, for a parser's options; groups of options are not among them."""
    return {dest: type_of(action) for dest, action in _actions(parser).items() if dest not in groups(parser)}


def groups(parser: ArgumentParser) -> set[str]:
    """The keys of the groups of a parser's options, such as `trainer`."""
    return {dest.rpartition(".")[0] for dest in _actions(parser)} - {""}


def required(parser: ArgumentParser) -> list[str]:
    """The keys of the options that a parser requires; to be asked before it parses, as it changes them meanwhile."""
    names = ("_extra_required_keys", "required_args")  # of jsonargparse since 4.48, and before
    virtual = {key for name in names for key in getattr(parser, name, ())}  # options of LightningCLI's classes
    return sorted({key for key, action in _actions(parser).items() if action.required} | virtual)


def type_of(action: Action) -> Any:
    """The type annotation of an option; None if it has none."""
    return getattr(action, "_typehint", action.type)


def subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Name → parser, for a parser's subcommands."""
    return parser._subcommands_action._name_parser_map if parser._subcommands_action else {}


def given_values(arguments: Sequence[str], parser: ArgumentParser, folder: Path) -> dict[str, Any]:
    """What the user set the options to, as nested mappings; invalid keys and values included.

    Args:
        arguments: the command line without the command, as `spell_out` rewrites it.
        parser: the command's parser.
        folder: the folder that relative paths of configuration files start from.

    Raises:
        ValueError: a configuration file cannot be read, or a word is neither an option nor the value of one.
    """
    values: dict[str, Any] = {}
    for option, text in [*_from_environment(parser), *_pairs(arguments, parser)]:
        if option in ("config", "c"):
            path = folder / Path(text).expanduser()
            if not path.is_file():
                raise ValueError(f"config: there is no file {text}")
            _merge(values, yaml.safe_load(read_configuration(path)))
        else:
            _set(values, option.removesuffix("+").split("."), _parsed(text))
    return values


def _actions(parser: ArgumentParser) -> dict[str, Action]:
    """Key → option, without the options for help."""
    return {
        action.dest: action
        for action in parser._actions
        if action.dest not in (SUPPRESS, "help", "print_config") and not action.dest.endswith(".help")
    }


def _from_environment(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    prefix = f"{parser.env_prefix}_".upper()
    for name, text in os.environ.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix).lower().replace("__", "."), text


def _pairs(arguments: Sequence[str], parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """The options on a command line with their values, without dashes; options that take no value are left out."""
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            raise ValueError(f"unexpected argument '{argument}'; options begin with --")
        option, equals, text = argument.partition("=")
        action = parser._option_string_actions.get(option)
        if equals:
            yield option.lstrip("-"), text
        elif action is None or action.nargs not in (0, "?"):
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{option} needs a value")
            yield option.lstrip("-"), value


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date such as the 31st of February
        return text


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set one value in nested mappings; below a class, keys are those of its arguments."""
    first, *rest = keys
    if not rest:
        _merge(values, {first: value})
        return
    inner = values.get(first)
    if isinstance(inner, str):  # a class by its name alone
        inner = {"class_path": inner}
    if isinstance(inner, list) and inner:  # options after `--callbacks+=X` set arguments of the last one
        inner = inner[-1]
    inner = values[first] = dict(inner) if isinstance(inner, dict) else {}
    if "class_path" in inner and rest[0] not in CLASS_KEYS:
        rest = ["init_args", *rest]
    _set(inner, rest, value)


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Add nested mappings to others; later values win, and another class starts from its own defaults."""
    for key, value in more.items():
        old = values.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        if both and old.get("class_path", value.get("class_path")) == value.get("class_path", old.get("class_path")):
            _merge(old, value)
        else:
            values[key] = value
