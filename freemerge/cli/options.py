"""The options of a parser: keys, types, and the values on a command line, in files and in the environment."""

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

_PRINTING = ("help", "print_config")  # options that print, and have no value
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""The keys that describe a configured class."""


def options(parser: ArgumentParser) -> list[str]:
    """The keys of the options of a parser and its subcommands, such as `trainer.max_epochs`, and of their groups."""
    keys: dict[str, None] = {}
    for each in (parser, *subcommands(parser).values()):
        for dest in (*_actions(each), *_PRINTING):
            keys |= dict.fromkeys((dest.partition(".")[0], dest))
    return list(keys)


def command_help(parser: ArgumentParser, version: str | None = None) -> CommandHelp:
    """The help and the options of a parser without subcommands.

    Args:
        parser: the parser.
        version: adds the option `--version`, which prints this; None adds nothing.
    """
    if version is not None:
        parser.add_argument("--version", action="version", version=version, help="Show freemerge's version and exit.")
    names = {name.strip("-+") for action in parser._actions for name in action.option_strings}
    return CommandHelp(parser.format_help(), options(parser), sorted(names))


def types(parser: ArgumentParser) -> dict[str, Any]:
    """Key → type annotation, for a parser's options without groups."""
    return {dest: type_of(action) for dest, action in _actions(parser).items() if dest not in groups(parser)}


def groups(parser: ArgumentParser) -> set[str]:
    """The keys of the groups of a parser's options, such as `trainer`."""
    return {dest.rpartition(".")[0] for dest in _actions(parser)} - {""}


def required(parser: ArgumentParser) -> list[str]:
    """The keys of the required options. Call it before parsing: jsonargparse changes `required` while it parses."""
    names = ("_extra_required_keys", "required_args")  # in jsonargparse since 4.48, and before
    virtual = {key for name in names for key in getattr(parser, name, ())}  # options of LightningCLI's classes
    return sorted({key for key, action in _actions(parser).items() if action.required} | virtual)


def type_of(action: Action) -> Any:
    """The type annotation of an option; None if it has none."""
    return getattr(action, "_typehint", action.type)


def subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Name → parser, for a parser's subcommands."""
    return parser._subcommands_action._name_parser_map if parser._subcommands_action else {}


def given_values(arguments: Sequence[str], parser: ArgumentParser, folder: Path) -> dict[str, Any]:
    """The values that the user gave, as nested mappings; invalid keys and values are included.

    Args:
        arguments: the command line without the command, as `spell_out` rewrites it.
        parser: the command's parser.
        folder: the folder of relative paths of configuration files.

    Returns:
        Key → value, or a mapping of the keys below it.

    Raises:
        ValueError: a configuration file cannot be read, an option has no value, or an argument is not an option.
    """
    values: dict[str, Any] = {}
    for option, text in [*_from_environment(parser), *_pairs(arguments, parser)]:
        if option in ("config", "c"):
            path = folder / Path(text).expanduser()
            if not path.is_file():
                raise ValueError(f"config: there is no file {text}")
            read = getattr(parser, "read_options", read_configuration)
            _merge(values, yaml.safe_load(read(path)))
        else:
            _set(values, option.removesuffix("+").split("."), _parsed(text))
    return values


def _actions(parser: ArgumentParser) -> dict[str, Action]:
    """Key → option, without the options that print help or the configuration."""
    return {
        action.dest: action
        for action in parser._actions
        if action.dest not in (SUPPRESS, *_PRINTING) and not action.dest.endswith(".help")
    }


def _from_environment(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    prefix = f"{parser.env_prefix}_".upper()
    for name, text in os.environ.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix).lower().replace("__", "."), text


def _pairs(arguments: Sequence[str], parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the options on a command line, without dashes, with their values; options without a value are left out."""
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
    """Set one value in nested mappings; keys below a class are its arguments."""
    first, *rest = keys
    if not rest:
        _merge(values, {first: value})
        return
    inner = values.get(first)
    if isinstance(inner, str):  # a class by its name alone
        inner = {"class_path": inner}
    if isinstance(inner, list) and inner:  # options after `--callbacks+=X` set arguments of the last class
        inner = inner[-1]
    inner = values[first] = dict(inner) if isinstance(inner, dict) else {}
    if "class_path" in inner and rest[0] not in CLASS_KEYS:
        rest = ["init_args", *rest]
    _set(inner, rest, value)


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Merge nested mappings into others; later values win, and a class that replaces another loses its arguments."""
    for key, value in more.items():
        old = values.get(key)
        both = (old, value) if isinstance(old, dict) and isinstance(value, dict) else None
        if both and len({each["class_path"] for each in both if "class_path" in each}) < 2:
            _merge(*both)
        else:
            values[key] = value
