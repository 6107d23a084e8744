"""Rewrite options in their usual shell forms into the forms that jsonargparse parses.

- `--overwrite` alone becomes `--overwrite true`; `--overwrite false` is left unchanged.
- `--finetuned a b`, and `--finetuned a --finetuned b`, become `--finetuned '[a, b]'`. A list in brackets or a mapping
  is left unchanged, and replaces earlier values.
"""

from __future__ import annotations

import types
from argparse import Action
from collections.abc import Sequence
from typing import Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from freemerge.cli.yaml_text import check_names, in_brackets


def spell_out(arguments: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Rewrite a command line so that each option has one value.

    Args:
        arguments: the command line as typed, without the command.
        parser: the command's parser; the types of its options tell flags and lists apart.

    Returns:
        The same options, each flag with a value, each list in brackets.

    Raises:
        ValueError: YAML does not read a list in brackets as a list of names.
    """
    kinds = {
        option: kind
        for action in parser._actions
        if (kind := kind_of(action))
        for option in action.option_strings
        if not option.endswith("+")
    }
    result: list[list[str]] = []
    places: dict[str, int] = {}  # option → index of its list in `result`
    names: dict[str, list[str]] = {}  # option → its values so far
    index = 0
    while index < len(arguments):
        option, equals, value = arguments[index].partition("=")
        index += 1
        kind = kinds.get(option)
        if kind is None:
            result.append([arguments[index - 1]])
            continue
        if kind == "flag":
            bare = not equals and (index == len(arguments) or _is_option(arguments[index]))
            result.append([option, "true"] if bare else [arguments[index - 1]])
            continue
        values = [value] if equals else []
        while index < len(arguments) and not _is_option(arguments[index]):
            values.append(arguments[index])
            index += 1
        whole = _as_one_value(values, option, kind)
        if whole is not None or not values:
            names.pop(option, None)
            result.append([option, *([] if whole is None else [whole])])
            continue
        if option in names:
            result[places[option]] = []
        names[option] = [*names.get(option, []), *(each for item in values for each in _items(item))]
        places[option] = len(result)
        result.append([option, _as_list(names[option], kind)])
    return [word for part in result for word in part]


def kind_of(action: Action) -> str | None:
    """The kind of an option: `flag`, `names` (a list of strings), `values` (a list of numbers), or None."""
    hint = getattr(action, "_typehint", action.type)
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if bool in choices:
        return "flag"
    lists = [get_args(choice)[0] for choice in choices if get_origin(choice) is list and get_args(choice)]
    if not lists or {str, int, float} & set(choices):
        return None
    if lists[0] is str or get_origin(lists[0]) is Literal:
        return "names"
    return "values" if lists[0] in (int, float) else None


def _is_option(word: str) -> bool:
    return word.startswith("--") or word in ("-h", "-c")


def _as_one_value(values: Sequence[str], option: str, kind: str) -> str | None:
    """The text of a list, a mapping or null, if the values were typed as one; None if they are single names."""
    if not values:
        return None
    first, last = values[0], values[-1]
    closing = {"[": "]", "{": "}"}.get(first[:1])
    # Brackets without quotes, `[a, b]`, come from the shell as several words.
    if closing and last.endswith(closing) and (len(values) == 1 or not first.endswith(closing)):
        text = " ".join(values)
        if kind == "names":
            check_names(text, option)
        return text
    return first if len(values) == 1 and (kind == "values" or not _is_name(first)) else None


def _is_name(text: str) -> bool:
    """Whether YAML reads a word as text, not as null or a number."""
    try:
        return text != "" and isinstance(yaml.safe_load(text), (str, dict, list))
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date such as the 31st of February
        return True


def _items(word: str) -> list[str]:
    """The names in a word: the word itself, or the items of a list in brackets."""
    if word.startswith("[") and word.endswith("]"):
        try:
            found = yaml.safe_load(word)
        except (yaml.YAMLError, ValueError):
            return [word]
        return [str(item) for item in found]
    return [word]


def _as_list(values: Sequence[str], kind: str) -> str:
    return in_brackets(values) if kind == "names" else f"[{', '.join(values)}]"
