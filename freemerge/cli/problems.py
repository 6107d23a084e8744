"""Turn jsonargparse's errors about a configuration into one line that suggests the right name.

jsonargparse reports an invalid value as an indented tree of everything that it tried. `explain` picks the deepest
branch that names the fault, follows the keys and classes that lead to it, and looks up the names that would be valid.
This stays our own code because jsonargparse offers no structured errors.
"""

from __future__ import annotations

import inspect
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, NamedTuple, get_args, get_type_hints

from jsonargparse import ArgumentParser

from freemerge.cli.names import closest, combination, unknown_option


def explain(message: str, parser: ArgumentParser) -> str:
    """Explain an error of jsonargparse in one line.

    Args:
        message: jsonargparse's message.
        parser: the parser that failed; a subcommand's own, if it failed there.

    Returns:
        The fault, with a suggestion if a known name is close. Unknown messages are returned unchanged.
    """
    try:
        return _explain(message, parser)
    except Exception:  # the lookup imports modules that the user named, and these may raise anything
        return message


def _explain(message: str, parser: ArgumentParser) -> str:
    lines = message.splitlines()
    if found := re.match(r"unrecognized arguments: (.*)", message):
        return _unknown_argument(found[1], parser)
    if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        known = re.findall(r"[\w-]+", found[2])
        return f"there is no command '{found[1]}'{closest(found[1], known) or '; commands: ' + ', '.join(known)}"
    if found := re.match(r'expected "subcommand" to be one of \{(.*)\}', message):
        return f"name a command: {found[1].replace(',', ', ')}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        keys = [key.partition(".")[2] if key.partition(".")[0] in subcommands(parser) else key
                for key in found[1].split(", ")]  # fmt: skip
        return f"missing: {', '.join(keys)}; give them as --{keys[0]} … or in a --config file"
    if found := re.match(r"(?:Group '(.*?)'|Option '(.*?)'|Subcommand '.*?') does not accept option '(.*?)'", message):
        key = f"{found[1]}.{found[3]}" if found[1] else found[3]
        return f"there is no key '{key}'{closest(key, options(parser))}"
    if found := re.match(r"Option '(.*?)' is not accepted", message):
        return f"there is no key '{found[1]}'{closest(found[1], options(parser))}"
    if message.startswith("Problems parsing config:"):
        return f"a configuration is not valid YAML: {' '.join(message.partition(':')[2].split())}"
    if lines and lines[0].startswith('Parser key "'):
        return _wrong_value(lines, parser)
    return message


def refusal(message: str) -> str:
    """The message of a class that refused its arguments, extracted from jsonargparse's tree of errors."""
    said = [leaf.text for leaf in _leaves(message.splitlines()) if not leaf.text.startswith("Expected a")]
    return " ".join(said) or message


def options(parser: ArgumentParser) -> list[str]:
    """The keys of the options of a parser and its subcommands, such as `trainer.max_epochs`, and of their groups."""
    keys: dict[str, None] = {}
    for action in (action for each in (parser, *subcommands(parser).values()) for action in each._actions):
        if action.dest != SUPPRESS and not action.dest.endswith(".help"):
            keys |= dict.fromkeys((action.dest.partition(".")[0], action.dest))
    return list(keys)


def subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Name → parser, for a parser's subcommands."""
    return parser._subcommands_action._name_parser_map if parser._subcommands_action else {}


def _unknown_argument(text: str, parser: ArgumentParser) -> str:
    word = text.split()[0]
    if not word.startswith("-"):
        return f"unexpected argument '{word}'; options begin with --"
    return unknown_option(word.partition("=")[0], options(parser))


class _Leaf(NamedTuple):
    """One fault that jsonargparse reports, with its place in the configuration."""

    weight: int
    depth: int
    keys: tuple[str, ...]
    class_path: str | None
    text: str


# What says most of what was meant comes first: a wrong name inside of a class that was found tells more than that the
# class is not a number.
_WEIGHTS = (
    (r"Option '(.*?)' is not accepted", 6),
    (r"(?:Group|Subcommand) '.*?' does not accept option '.*?'", 6),
    (r"has no attribute '|No module named '|does not correspond to a subclass of", 5),
    (r"[Aa]rguments are required: |is required but not included", 5),
    (r"Expected a dot import path string: ", 4),
    (r"Expected a typing.Literal\[", 3),
    (r"Not a valid subclass of ", 2),
    (r"File does not exist: ", 1),
)
_BOILERPLATE = (
    "Does not validate against any of", "Subtypes:", "Errors:", "Given value", "Subclass types expect one of",
    "Expected a path but", "a class path (str)", "a dict with",
)  # fmt: skip


def _wrong_value(lines: list[str], parser: ArgumentParser) -> str:
    leaves = list(_leaves(lines))
    if not leaves:
        return " ".join(" ".join(lines).split())
    value = next((line.strip()[len("Given value: ") :] for line in reversed(lines) if "Given value: " in line), None)
    best = max(leaves, key=lambda leaf: (leaf.weight, leaf.depth))
    key = ".".join(best.keys)
    kind = _load(best.class_path) if best.class_path else None
    if found := re.search(r"(?:Option|option) '([\w.]+)'(?: is not accepted|$|\.)", best.text):
        owner = kind
        if inside := re.search(r"class_path='([\w.]+)'", best.text):  # an optimizer: its class is in the value alone
            owner = _load(inside[1])
        known = _parameters(owner)
        name = owner.__name__ if owner is not None else "the class"
        hint = closest(found[1], known) or (f"; it has {', '.join(known)}" if known else "")
        return f"{key}: {name} has no parameter '{found[1]}'{hint}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", best.text):
        names = [name for name in dir(import_module(found[1])) if not name.startswith("_")]
        return f"{key}: the module {found[1]} has no '{found[2]}'{closest(found[2], names)}"
    if found := re.search(r"No module named '([\w.]+)'", best.text):
        return f"{key}: there is no module '{found[1]}'; is it misspelt, or not in the working directory?"
    if found := re.search(r"Expected a dot import path string: (.*)", best.text):
        known = sorted({each.__name__ for each in _classes(best, parser)})
        hint = combination(found[1], known, key) or closest(found[1], known)
        hint = hint or (f"; known: {', '.join(known)}" if known else "")
        return f"{key}: there is no class '{found[1]}'{hint}"
    if found := re.search(r"Import path (\S+ )?does not correspond to a subclass of (\w+)", best.text):
        return f"{key}: {(found[1] or value or 'this').strip()} is not a {found[2]}"
    if found := re.search(r'[Aa]rguments are required: (.*)|Key "(.*?)" is required', best.text):
        return f"{key}: {kind.__name__ if kind else 'the class'} needs {found[1] or found[2]}"
    if found := re.search(r"Expected a typing.Literal(\[.*?\])(?:. Got value: (.*))?$", best.text):
        known = [str(choice) for choice in re.findall(r"'([^']*)'|(\d+)", found[1]) for choice in choice if choice]
        given = found[2] or value or ""
        return f"{key}: expected one of {', '.join(known)}, got '{given}'{closest(given, known)}"
    if "Not a valid subclass of " in best.text:
        return _no_class(key, best.text, value)
    expected = [_type_name(found) for leaf in leaves if leaf.keys == best.keys
                for found in re.findall(r"Expected an? (.*?)(?:\. Got value: .*)?$", leaf.text)]  # fmt: skip
    if expected and all(re.match(r"[\w\[\], |.]+$", name) for name in expected):
        wanted = sorted(dict.fromkeys(expected), key=lambda name: name == "null")
        given = value if value is not None else best.text.partition("Got value: ")[2]
        return f"{key}: expected {' or '.join(wanted)}, got {_shorten(given)}"
    return f"{key}: {best.text}" + (f", got {_shorten(value)}" if value is not None else "")


def _leaves(lines: Iterable[str]) -> Iterator[_Leaf]:
    """The tree's leaves: lines that open no branch and are not boilerplate."""
    branches: list[tuple[int, str | None, str | None]] = []  # indent, key, class path
    for line in lines:
        text = line.lstrip(" -")
        if not text:
            continue
        indent = len(line) - len(text)
        while branches and branches[-1][0] >= indent:
            branches.pop()
        if found := re.match(r'Parser key "(.*?)":\s*(.*)', text):
            branches.append((indent, found[1], None))
            text = found[2]
        elif found := re.match(r"Problem with given class_path '(.*?)':\s*(.*)", text):
            branches.append((indent, None, found[1]))
            text = found[2]
        if not text or text.startswith(_BOILERPLATE):
            continue
        weight = next((weight for pattern, weight in _WEIGHTS if re.search(pattern, text)), 0)
        keys = tuple(key for _, key, _ in branches if key)
        kinds = [kind for _, _, kind in branches if kind]
        yield _Leaf(weight, len(branches), keys, kinds[-1] if kinds else None, text)


def _no_class(key: str, text: str, value: str | None) -> str:
    """The message for a mapping that describes a class but is not `class_path` and `init_args`."""
    found = re.search(r"Not a valid subclass of (\w+)", text)
    wanted = found[1] if found else "class"
    known = ("class_path", "init_args", "dict_kwargs")
    given = re.findall(r"[{,] '(\w+)':|^\{'(\w+)':", value or "")
    names = [name for pair in given for name in pair if name]
    for name in names:
        if name not in known and closest(name, known):
            return f"{key}: a class is given by class_path and init_args, not by '{name}'{closest(name, known)}"
    return f"{key}: expected the name of a {wanted}, or class_path and init_args, got {_shorten(value)}"


def _classes(leaf: _Leaf, parser: ArgumentParser) -> list[type]:
    """The classes that are valid for a leaf's key: all loaded subclasses of the key's annotation."""
    hint: Any = None
    if leaf.class_path and leaf.keys:
        hint = _annotation(_load(leaf.class_path), leaf.keys[-1])
    else:
        hint = next((getattr(action, "_typehint", None) for action in parser._actions if action.dest == leaf.keys[0]),
                    None)  # fmt: skip
    return [each for base in _types(hint) for each in _subclasses(base) if not inspect.isabstract(each)]


def _types(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not get_args(hint) and hint.__module__ not in ("builtins", "collections.abc"):
        yield hint
    for inner in hint if isinstance(hint, (list, tuple)) else get_args(hint):
        yield from _types(inner)


def _subclasses(base: type) -> Iterator[type]:
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from _subclasses(child)


def _annotation(kind: type | None, name: str) -> Any:
    for each in getattr(kind, "__mro__", ()):
        try:
            hints = get_type_hints(each.__init__)
        except Exception:  # an annotation that only a type checker can resolve
            continue
        if name in hints:
            return hints[name]
    return None


def _parameters(kind: Any) -> list[str]:
    """Names of a class's parameters, including its ancestors' if it accepts `**kwargs`."""
    names: dict[str, None] = {}
    for each in getattr(kind, "__mro__", (kind,)):
        if each is object or each is None:
            continue
        try:
            parameters = inspect.signature(each).parameters.values()
        except (TypeError, ValueError):
            continue
        names |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "self"]


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _type_name(text: str) -> str:
    name = re.sub(r"<class '([\w.]+)'>", lambda found: found[1].rpartition(".")[2], text)
    return {"NoneType": "null"}.get(name, name)


def _shorten(value: str | None, length: int = 60) -> str:
    text = " ".join(str(value).split())
    return f"'{text if len(text) <= length else text[: length - 1] + '…'}'"
